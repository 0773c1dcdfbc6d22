"""MPO on control: targets against a loop, bounds that hold, actions in their box, Pendulum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import mpo
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.continuous import Box, critic_fns
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.distributions import DiagonalGaussian
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import applied

PENDULUM = environments.make("Pendulum-v1")
BOX = Box((-2.0,), (2.0,))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))
CONFIG = mpo.Config(encoder=MLP((6,), nn.relu), num_critics=2, num_samples=3)


def agent_of():
    actor = mpo.make_actor(CONFIG, PENDULUM[0])
    init_critics, critic_fn = critic_fns(PENDULUM[0], CONFIG.encoder, BOX, count=2)
    params = jax.jit(actor.init)(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    state = mpo.init(params, init_critics(jax.random.key(1)), TX, jax.random.key(2), mpo.Hyper())
    others = {
        "old_actor": jax.jit(actor.init)(jax.random.key(3), jnp.zeros((1, 3)))["params"],
        "target_critics": init_critics(jax.random.key(4)),
    }
    return jax.jit(applied(actor)), jax.jit(critic_fn), dataclasses.replace(state, **others)


def batch_of(count=4):
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        action=jnp.asarray(rng.uniform(-2, 2, (count, 1)), jnp.float32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        weight=jnp.ones(count),
    )


def test_a_step_against_a_loop():
    (actor_fn, critic_fn, state), batch = agent_of(), batch_of()
    update = jax.jit(mpo.make_update(CONFIG, actor_fn, critic_fn, BOX, TX))
    hyper = mpo.Hyper(temperature=0.5, target_update_interval=2)
    after, metrics, errors = update(state, hyper, batch)
    _, next_key, own_key = jax.random.split(state.key, 3)
    old, old_next = (actor_fn(state.old_actor, x) for x in (batch.obs, batch.next_obs))
    next_values, values, actions = [], [], []
    for own, other in zip(jax.random.split(own_key, 3), jax.random.split(next_key, 3), strict=True):
        clipped = jnp.clip(old_next.sample(other), -2, 2)
        next_values.append(critic_fn(state.target_critics, batch.next_obs, clipped).min(0))
        actions.append(old.sample(own))
        values.append(critic_fn(state.target_critics, batch.obs, jnp.clip(actions[-1], -2, 2)).min(0))
    targets = batch.reward + batch.discount * np.mean(next_values, axis=0)
    now = critic_fn(state.critics.params, batch.obs, batch.action)
    np.testing.assert_allclose(errors, now.mean(0) - targets, atol=1e-4)
    temperature = np.log1p(np.exp(np.asarray(state.duals.params.temperature)))
    np.testing.assert_allclose(temperature, 1.0, rtol=1e-5)  # as init was told
    new = actor_fn(state.actor.params, batch.obs)
    loss = 0.0
    for s in range(4):
        weights = np.exp([float(v[s]) / temperature for v in values])
        for weight, action in zip(weights / weights.sum(), actions, strict=True):
            for mean, log_std in ((new.mean, old.log_std), (old.mean, new.log_std)):
                z = (float(action[s, 0]) - float(mean[s, 0])) / np.exp(float(log_std[s, 0]))
                loss += weight * (z**2 / 2 + float(log_std[s, 0]) + np.log(2 * np.pi) / 2) / 4
    loss += float(metrics["kl_mean"]) + float(metrics["kl_std"])  # multipliers of 1
    np.testing.assert_allclose(metrics["actor_loss"], loss, rtol=1e-4)
    again, _, _ = update(after, hyper, batch)
    for old_params, due in ((after.old_actor, state.old_actor), (again.old_actor, again.actor.params)):
        jax.tree.map(np.testing.assert_array_equal, old_params, due)


def test_the_policy_stays_within_its_bounds():
    """One state, actions to the right better: the mean goes as far as its KL allows, and stays there."""
    old = DiagonalGaussian(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    actions = jnp.linspace(-2, 2, 9)[:, None, None]
    values = 10 * actions[..., 0]
    hyper = mpo.Hyper(epsilon_mean=0.02, epsilon_std=0.005)
    learners = {"actor": {"mean": jnp.zeros((1, 1)), "log_std": jnp.zeros((1, 1))}, "critics": {}}
    state = mpo.init(learners["actor"], learners["critics"], TX, jax.random.key(0), hyper)

    def step(state, _):
        actor, duals, metrics = mpo.improve_policy(
            state, hyper, old, actions, values, lambda p: DiagonalGaussian(p["mean"], p["log_std"]), TX
        )
        return dataclasses.replace(state, actor=actor, duals=duals), metrics

    state, history = jax.jit(lambda s: jax.lax.scan(step, s, length=6000))(state)
    mean, log_std = (float(state.actor.params[name][0, 0]) for name in ("mean", "log_std"))
    np.testing.assert_allclose(mean, np.sqrt(2 * 0.02), rtol=0.05)  # KL of unit normals: mean^2 / 2
    ratio = np.exp(-log_std)
    np.testing.assert_allclose(np.log(1 / ratio) + (ratio**2 - 1) / 2, 0.005, rtol=0.25)
    assert float(history["temperature"][-1]) != float(history["temperature"][0])


def test_users_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="MPO needs a vector of continuous actions"):
        mpo.make_run(mpo.Config(), *environments.make("CartPole-v1"))


@pytest.mark.slow
def test_pendulum():
    """8,000 steps (a random policy gets about -1200)."""
    course = dataclasses.replace(mpo.Config().run, total_steps=8_000, batch_size=64)
    config = mpo.Config(run=course, num_samples=10)
    run = mpo.make_run(config, *PENDULUM)
    keys = jax.random.split(jax.random.key(0), 1)
    options = compiler_options()
    states, _ = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=options)(keys, mpo.Hyper())
    assert np.all(np.abs(np.asarray(states.replay.data.action)) <= 2)

    def score(state, key):
        return evaluate(run, state, *PENDULUM, key, episodes=32, deterministic=True)[0]

    assert jnp.mean(jax.jit(jax.vmap(score), compiler_options=options)(states, keys)) > -500
