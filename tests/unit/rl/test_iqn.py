"""IQN: QR-DQN at fixed levels, a loss against a loop, quantiles of a known distribution, whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import dqn, iqn, qr_dqn
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import ImplicitQuantiles

CARTPOLE = environments.make("CartPole-v1")
TX = make_optimizer(OptimizerConfig(clip_norm=10.0, b2=0.999))
NETWORK = ImplicitQuantiles(ObsEncoder(MLP((6,), nn.relu), (4,)), 3, num_cosines=4, num_levels=5, width=7)
VALUES = dqn.network_fns(NETWORK, qr_dqn.rank_actions)
every_fn = jax.jit(VALUES.every_fn)


def batch_of(count=8):
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        action=jnp.asarray(rng.integers(0, 3, count), jnp.int32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        weight=jnp.asarray(rng.uniform(0.1, 1, count), jnp.float32),
    )


@functools.cache
def params_of(seed):
    return jax.jit(NETWORK.init)(jax.random.key(seed), jnp.zeros((1, 4)))["params"]


def state_of(tx=TX):
    return dataclasses.replace(iqn.init(params_of(0), tx, jax.random.key(3)), target_params=params_of(1))


def test_the_network_against_numpy():
    params, rng = params_of(0), np.random.default_rng(1)
    obs, levels = rng.normal(size=(2, 4)).astype(np.float32), rng.uniform(size=(2, 3)).astype(np.float32)
    found = every_fn(params, obs, levels)
    weights = jax.tree.map(np.asarray, params)

    def dense(layer, inputs):
        return inputs @ layer["kernel"] + layer["bias"]

    for row in range(2):
        features = np.maximum(dense(weights["torso"]["body"]["Dense_0"], obs[row]), 0)
        for place in range(3):
            cosines = np.array([np.cos(np.pi * i * levels[row, place]) for i in (1, 2, 3, 4)])
            joined = features * np.maximum(dense(weights["levels"], cosines), 0)
            expected = dense(weights["actions"], np.maximum(dense(weights["join"], joined), 0))
            np.testing.assert_allclose(found[row, :, place], expected, rtol=1e-4, atol=1e-5)


def test_at_midpoints_a_step_is_that_of_qr_dqn():
    """A network asked for nothing else than the midpoints is a table of quantiles."""

    def fixed(key, shape):
        del key
        return jnp.broadcast_to((jnp.arange(shape[1]) + 0.5) / shape[1], shape)

    config, state = iqn.Config(num_levels=5, num_target_levels=5), state_of()
    update = jax.jit(iqn.make_update(config, VALUES, TX, levels_fn=fixed))
    found, metrics, errors = update(state, iqn.Hyper(huber_delta=0.7), batch_of())
    plain = jax.jit(qr_dqn.make_update(qr_dqn.Config(), VALUES, TX))
    expected, same_metrics, same_errors = plain(
        dqn.State(state.learner, state.target_params), qr_dqn.Hyper(huber_delta=0.7), batch_of()
    )
    np.testing.assert_allclose(errors, same_errors, atol=1e-6)
    np.testing.assert_allclose(metrics["value_loss"], same_metrics["value_loss"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (found.learner.params, expected.learner.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_levels_drawn_against_a_loop():
    """Three levels of the values and two of the targets: other numbers, other draws."""
    config, state, batch = iqn.Config(num_levels=3, num_target_levels=2), state_of(), batch_of()
    _, metrics, _ = jax.jit(iqn.make_update(config, VALUES, TX))(state, iqn.Hyper(huber_delta=0.7), batch)
    _, own_key, target_key = jax.random.split(state.key, 3)
    levels, target_levels = (
        np.asarray(jax.random.uniform(key, shape)) for key, shape in ((own_key, (8, 3)), (target_key, (8, 2)))
    )
    now = np.asarray(every_fn(state.learner.params, batch.obs, levels))
    after = np.asarray(every_fn(state.target_params, batch.next_obs, target_levels))
    ranks = np.asarray(every_fn(state.target_params, batch.next_obs)).mean(-1)
    losses = []
    for i in range(8):
        loss = 0.0
        for j in range(3):
            for k in range(2):
                target = batch.reward[i] + batch.discount[i] * after[i, np.argmax(ranks[i]), k]
                error = float(target - now[i, batch.action[i], j])
                size = abs(error)
                huber = size**2 / 2 if size < 0.7 else 0.7 * (size - 0.35)
                loss += abs(levels[i, j] - (error < 0)) * huber / 2
        losses.append(batch.weight[i] * loss)
    np.testing.assert_allclose(metrics["value_loss"], np.mean(losses), rtol=1e-4)


def test_users_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="num_target_levels=0: use at least 1"):
        iqn.make_run(iqn.Config(num_target_levels=0), *CARTPOLE)


@pytest.mark.slow
def test_quantiles_of_a_uniform_return():
    """Rewards uniform on [0, 1], nothing after: the quantile at level tau is tau, at levels never fixed."""
    network = ImplicitQuantiles(ObsEncoder(MLP(()), (), 1), 1, num_cosines=16)
    values = dqn.network_fns(network, qr_dqn.rank_actions)
    update = iqn.make_update(iqn.Config(), values, TX)
    hyper = iqn.Hyper(learning_rate=1e-3, huber_delta=0.01)
    params = network.init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]
    nothing = jnp.zeros(64, jnp.int32)

    def step(state, key):
        reward = jax.random.uniform(key, (64,))
        batch = Batch(nothing, nothing, reward, jnp.zeros(64), nothing, jnp.ones(64))
        return update(state, hyper, batch)[0], None

    keys = jax.random.split(jax.random.key(1), 4000)
    state = jax.jit(lambda s: jax.lax.scan(step, s, keys)[0])(iqn.init(params, TX, jax.random.key(2)))
    levels = jnp.array([[0.1, 0.3, 0.5, 0.77, 0.95]])
    found = values.every_fn(state.learner.params, nothing[:1], levels)[0, 0]
    np.testing.assert_allclose(found, levels[0], atol=0.06)


@pytest.mark.slow
def test_cartpole():
    """30,000 steps: at least 100 (a random policy gets 22)."""
    course = RunConfig(total_steps=30_000, num_envs=4, train_every=4, batch_size=64)
    levels = {"num_levels": 8, "num_target_levels": 8, "num_policy_levels": 16, "num_cosines": 16}
    run = iqn.make_run(iqn.Config(run=course, **levels), *CARTPOLE)
    hyper = iqn.Hyper(learning_rate=1e-3, epsilon_steps=10_000.0, target_update_interval=100)
    keys = jax.random.split(jax.random.key(0), 1)
    options = compiler_options()
    states, _ = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=options)(keys, hyper)

    def score(state, key):
        return evaluate(run, state, *CARTPOLE, key, episodes=16, deterministic=True)[0]

    assert jnp.mean(jax.jit(jax.vmap(score), compiler_options=options)(states, keys)) > 100
