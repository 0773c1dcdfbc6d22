"""AIRL: shaping against a loop, the best discriminator by enumeration, a run from a log."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, init_train_state, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import airl, ppo
from rlhf_jax.rl.algorithms.gail import PolicySteps
from rlhf_jax.rl.envs import environments, transitions
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import RolloutConfig
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.stages import rl_offline

CARTPOLE = environments.make("CartPole-v1")
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))


def steps_of(obs, action, next_obs, terminated=False):
    count = len(action)
    return Transition(
        obs=jnp.asarray(obs, jnp.float32),
        action=jnp.asarray(action, jnp.int32),
        reward=jnp.full(count, 9.0),  # never looked at
        terminated=jnp.arange(count) == (count - 1 if terminated else -1),
        truncated=jnp.zeros(count, bool),
        next_obs=jnp.asarray(next_obs, jnp.float32),
    )


@pytest.mark.parametrize("state_only", [True, False])
def test_shaping_alone_adds_up_to_the_potential_of_the_first_state(state_only):
    """f - g, discounted and summed over an episode that ends, is -h(s_0): it favours no policy."""
    model = airl.make_reward_model(airl.Config(encoder=MLP((5,)), state_only=state_only), CARTPOLE[0])
    params = model.init_fn(jax.random.key(0))
    states = np.random.default_rng(0).normal(size=(7, 4))
    seen = steps_of(states[:-1], [0, 1, 1, 0, 1, 0], states[1:], terminated=True)
    shaped = np.asarray(airl.shaped_reward(model, params, seen, gamma=0.8))
    reward = np.asarray(model.reward_fn(params.reward, seen))
    first = float(model.potential_fn(params.shaping, seen.obs[:1])[0])
    np.testing.assert_allclose(np.sum(0.8 ** np.arange(6) * (shaped - reward)), -first, atol=1e-5)
    other = dataclasses.replace(seen, action=1 - seen.action)
    assert np.array_equal(model.reward_fn(params.reward, other), reward) == state_only


def test_the_best_discriminator_knows_the_expert_s_policy():
    """Where both see the same states, f is log pi of the expert, and f - log pi what the learner is paid.

    All pairs as often as they are likely: in state 0 the expert has chances 3/4 and 1/4, in state 1 1/2 each;
    the learner 1/2, and in state 1 1/4 and 3/4.
    """
    states = np.eye(4)[[0] * 8 + [1] * 8]
    model = airl.make_reward_model(airl.Config(encoder=MLP((8,))), CARTPOLE[0])
    experts = [0] * 6 + [1] * 2 + [0] * 4 + [1] * 4
    own = [0] * 4 + [1] * 4 + [0] * 2 + [1] * 6
    chances = np.array([[0.5, 0.5], [0.25, 0.75]])
    parts = [
        PolicySteps(
            steps_of(states, actions, states),
            jnp.log(jnp.asarray(chances[states.argmax(1), actions], jnp.float32)),
        )
        for actions in (experts, own)
    ]
    update = airl.make_update(model, TX)
    hyper = dataclasses.replace(airl.default_hyper(), discriminator_learning_rate=jnp.float32(3e-2))
    learner = init_train_state(model.init_fn(jax.random.key(0)), TX)
    learner, _ = jax.jit(
        lambda learner: jax.lax.scan(lambda s, _: update(s, hyper, *parts), learner, length=800)
    )(learner)
    pairs = steps_of(np.eye(4)[[0, 0, 1, 1]], [0, 1, 0, 1], np.eye(4)[[0, 0, 1, 1]])
    found = airl.shaped_reward(model, learner.params, pairs, gamma=hyper.gamma)
    np.testing.assert_allclose(found, np.log([0.75, 0.25, 0.5, 0.5]), atol=0.02)


def balancing(state, obs, is_first, carry, key, *, deterministic):
    """An expert one of whose actions in ten is the other one."""
    best = (obs @ jnp.array([0.1, 0.5, 1.0, 1.0]) > 0).astype(jnp.int32)
    return jnp.where(jax.random.bernoulli(key, 0.1, best.shape), 1 - best, best), carry


def test_a_run_by_command_and_mistakes():
    log = transitions.collect(balancing, None, *CARTPOLE, jax.random.key(0), episodes=1)
    options = rl_offline.Options(algo="airl", steps=4_000)
    run, hyper = rl_offline.make_course(options, *CARTPOLE, log)
    state = jax.eval_shape(run.init, jax.random.key(0), hyper)
    _, metrics = jax.eval_shape(run.step, state, hyper)
    assert {"imitation_reward", "discriminator_loss", "episodes"} <= set(metrics)
    assert run.updates * run.steps_per_update <= 4_000
    normalized = dataclasses.replace(ppo.Config(), rollout=RolloutConfig(normalize_obs=True))
    with pytest.raises(UserError, match="normalize_obs"):
        airl.make_run(airl.Config(normalized), *CARTPOLE, log)
    remembering = dataclasses.replace(ppo.Config(), network=NetworkConfig(memory_width=8))
    with pytest.raises(UserError, match="memory_width"):
        airl.make_run(airl.Config(remembering), *CARTPOLE, log)


@pytest.mark.slow
def test_cartpole():
    """60,000 steps: at least 100 (a random policy gets 22, the log's about 480)."""
    log = transitions.collect(balancing, None, *CARTPOLE, jax.random.key(0), episodes=20)
    config = airl.Config(dataclasses.replace(ppo.Config(), total_steps=60_000))
    run = airl.make_run(config, *CARTPOLE, log)
    options = compiler_options()
    train = jax.jit(make_train_fn(run), compiler_options=options)
    state, _ = train(jax.random.key(0), airl.default_hyper())
    returns, _ = evaluate(run, state, *CARTPOLE, jax.random.key(1), episodes=16, deterministic=True)
    assert returns.mean() > 100
