"""DAgger: one set of the log and of what was seen, the expert's labels, and what they are worth."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.rl.algorithms import bc, dagger
from rlhf_jax.rl.envs import environments, transitions
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Replay
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import applied
from rlhf_jax.stages import rl_offline

CARTPOLE = environments.make("CartPole-v1")


def balance(obs):
    """An expert: it pushes towards where the pole falls, and the cart home."""
    return (obs @ jnp.array([0.1, 0.5, 1.0, 1.0]) > 0).astype(jnp.int32)


def steps_of(obs, action):
    nothing = jnp.zeros(action.shape, bool)
    return Transition(obs, action, jnp.zeros(action.shape), nothing, nothing, obs)


def log_of(count):
    """Steps of an expert, from the first of its episode on."""

    def act(state, obs, is_first, carry, key, *, deterministic):
        return balance(obs), carry

    log = transitions.collect(act, None, *CARTPOLE, jax.random.key(0), episodes=1)
    return jax.tree.map(lambda x: x[:count], log)


def test_a_batch_is_of_one_set_with_the_expert_s_actions():
    """30 steps of the log and 2 x 45 seen: a quarter and three; nobody's own actions are looked at."""
    log = offline.as_replay(steps_of(jnp.full((30, 4), 7.0), jnp.full(30, 5, jnp.int32)))
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2, 4)), jnp.float32)
    replay = Replay(steps_of(obs, jnp.full((50, 2), 9, jnp.int32)), jnp.int32(45), jnp.int32(45))
    indices = jax.random.randint(jax.random.key(1), (4000,), 0, 90)
    aggregated = jax.jit(lambda i, k: dagger.aggregated(log, replay, i, k, balance))
    batch = aggregated(indices, jax.random.key(0))
    of_log = np.all(np.asarray(batch.obs) == 7.0, axis=1)
    np.testing.assert_allclose(of_log.mean(), 0.25, atol=0.03)
    flat = np.asarray(obs).reshape(100, 4)
    np.testing.assert_array_equal(batch.obs[~of_log], flat[np.asarray(indices)[~of_log]])
    label = (np.asarray(batch.obs) @ np.array([0.1, 0.5, 1.0, 1.0]) > 0).astype(int)
    np.testing.assert_array_equal(batch.action, label)
    assert set(label[of_log]) == {1}
    assert set(label[~of_log]) == {0, 1}


def test_the_command_needs_a_fitting_expert(tmp_path):
    options = rl_offline.Options(algo="dagger")
    with pytest.raises(UserError, match="needs --expert"):
        rl_offline.make_course(options, *CARTPOLE, log_of(9))
    about = {"algo": "dqn", "env": "Acrobot-v1", "seeds": 1, "seed": 0, "steps": 0}
    (tmp_path / "agent.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="is for Acrobot-v1, not for CartPole-v1"):
        rl_offline.make_course(dataclasses.replace(options, expert=tmp_path), *CARTPOLE, log_of(9))
    with pytest.raises(UserError, match="--expert is for dagger, not for bc"):
        rl_offline.make_course(rl_offline.Options(algo="bc", expert=tmp_path), *CARTPOLE, log_of(9))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_who_acts(decay):
    """In the first collection the expert; then the learner, or the expert for ever."""
    course = RunConfig(
        total_steps=40, learning_starts=0, num_envs=2, train_every=5, updates=1, batch_size=4, num_logs=1
    )
    config = dagger.Config(course, encoder=MLP((4,), nn.relu))
    log = steps_of(jnp.ones((9, 4)), jnp.ones(9, jnp.int32))
    run = dagger.make_run(config, *CARTPOLE, log, lambda obs: jnp.zeros(obs.shape[0], jnp.int32))
    hyper = dagger.Hyper(learning_rate=0.0, expert_decay=decay)
    state, _ = jax.jit(make_train_fn(run))(jax.random.key(0), hyper)
    actions = np.asarray(state.replay.data.action)
    assert actions.shape == (40 // 2, 2)
    assert not actions[:5].any()
    policy_fn = applied(offline.make_policy(CARTPOLE[0], config.encoder))
    obs = state.replay.data.obs.reshape(-1, 4)
    own = np.asarray(policy_fn(state.agent.params, obs).mode()).reshape(actions.shape)
    assert own[5:].any()
    np.testing.assert_array_equal(actions[5:], own[5:] if decay == 0 else 0)


@pytest.mark.slow
def test_cartpole_from_forty_steps():
    """Cloning forty steps falls once it is elsewhere; asking the expert there gives the expert's 500."""
    log = log_of(40)
    course = RunConfig(
        total_steps=4_000, learning_starts=0, num_envs=4, train_every=25, updates=25, num_logs=2
    )
    runs = {
        "dagger": (dagger.make_run(dagger.Config(course), *CARTPOLE, log, balance), dagger.Hyper()),
        "bc": (bc.make_run(bc.Config(offline.RunConfig(updates=1_000)), CARTPOLE[0], log), bc.Hyper()),
    }
    means = {}
    for name, (run, hyper) in runs.items():
        state, _ = jax.jit(make_train_fn(run))(jax.random.key(0), hyper)
        returns, _ = evaluate(run, state, *CARTPOLE, jax.random.key(1), episodes=16, deterministic=True)
        means[name] = float(returns.mean())
    assert means["dagger"] > 450
    assert means["bc"] < 350
