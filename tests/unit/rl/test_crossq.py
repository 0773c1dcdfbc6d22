"""CrossQ and batch normalization: statistics and joint passes against NumPy, modes, resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.rl.algorithms import crossq, sac
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.continuous import Box
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.batch_norm import BatchNormMLP, apply_eval, apply_train, split_stats
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import Critics, applied

PENDULUM = environments.make("Pendulum-v1")
BOX = Box((-2.0,), (2.0,))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b1=0.5, b2=0.999))
NORMED = BatchNormMLP((5,), nn.relu, momentum=0.9)


def stirred(tree, seed=3):
    """Another tree of the same shapes; what must be above 0 is."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.abs(rng.normal(size=x.shape)) + 0.1, x.dtype), tree)


def normed(hidden, params, mean, var):
    return (hidden - mean) / np.sqrt(var + 1e-3) * np.asarray(params["scale"]) + np.asarray(params["bias"])


def mlp(params, inputs, stats=None):
    """Features in NumPy, and the statistics of each norm: the batch's, or those given."""
    used = []

    def norm(hidden, name):
        moments = (hidden.mean(0), hidden.var(0)) if stats is None else stats[name]
        used.append(moments)
        return normed(hidden, params[name], *moments)

    hidden = norm(inputs, "BatchNorm_0")
    layer = params["Dense_0"]
    hidden = np.maximum(hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
    return norm(hidden, "BatchNorm_1"), used


def test_modes_and_running_statistics_against_numpy():
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    params, stats = stirred(split_stats(NORMED.init(jax.random.key(0), inputs)))
    outputs, after = apply_train(NORMED, params, stats, inputs)
    expected, moments = mlp(params, np.asarray(inputs))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    for (mean, var), name in zip(moments, ("BatchNorm_0", "BatchNorm_1"), strict=True):
        np.testing.assert_allclose(after[name]["mean"], 0.9 * stats[name]["mean"] + 0.1 * mean, rtol=1e-4)
        np.testing.assert_allclose(after[name]["var"], 0.9 * stats[name]["var"] + 0.1 * var, rtol=1e-4)
    kept = {name: (np.asarray(kept["mean"]), np.asarray(kept["var"])) for name, kept in stats.items()}
    expected, _ = mlp(params, np.asarray(inputs), kept)
    np.testing.assert_allclose(apply_eval(NORMED, params, stats, inputs), expected, rtol=1e-4, atol=1e-5)


def test_runs_under_vmap_have_statistics_of_their_own():
    inputs = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    params, stats = split_stats(NORMED.init(jax.random.key(0), inputs[0]))
    together = jax.vmap(lambda x: apply_train(NORMED, params, stats, x))(inputs)
    for index in range(2):
        alone = apply_train(NORMED, params, stats, inputs[index])
        jax.tree.map(lambda a, b, i=index: np.testing.assert_allclose(a[i], b, atol=1e-5), together, alone)


def parts(delay=1):
    config = crossq.Config(encoder=MLP((6,), nn.relu), critic_encoder=NORMED, policy_delay=delay)
    actor, critics = sac.make_actor(config, PENDULUM[0]), Critics(NORMED, BOX.low, BOX.high, 2)
    actor_params = actor.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    variables = critics.init(jax.random.key(1), jnp.zeros((1, 3)), jnp.zeros((1, 1)))
    hyper = crossq.Hyper(temperature=0.4)
    state = crossq.init(actor_params, variables, TX, jax.random.key(2), hyper)
    state = dataclasses.replace(state, batch_stats=stirred(state.batch_stats))
    actor_fn = applied(actor)
    return state, hyper, actor_fn, jax.jit(crossq.make_update(config, actor_fn, critics, BOX, TX))


def batch_of(count):
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        action=jnp.asarray(rng.uniform(-2, 2, (count, 1)), jnp.float32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(3 + rng.normal(size=(count, 3)), jnp.float32),  # elsewhere: statistics differ
        weight=jnp.ones(count),
    )


def test_both_values_come_from_one_pass_over_both():
    (state, hyper, actor_fn, update), batch = parts(), batch_of(8)
    after, metrics, errors = update(state, hyper, batch)
    action, logp = actor_fn(state.actor.params, batch.next_obs).sample_and_logp(
        jax.random.split(state.key)[1]
    )
    obs, actions = (np.concatenate(x) for x in ((batch.obs, batch.next_obs), (batch.action, action)))
    inputs = np.concatenate([obs, actions / 2], axis=-1)
    values = []
    for index in range(2):
        head = state.critics.params[f"heads_{index}"]
        features, moments = mlp(state.critics.params[f"bodies_{index}"], inputs)
        values.append((features @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))[:, 0])
        kept = after.batch_stats[f"bodies_{index}"]["BatchNorm_0"]["mean"]
        before = state.batch_stats[f"bodies_{index}"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(kept, 0.9 * before + 0.1 * moments[0][0], rtol=1e-4)
    now, later = np.split(np.stack(values), 2, axis=1)
    targets = np.asarray(batch.reward) + batch.discount * (later.min(0) - 0.4 * np.asarray(logp))
    np.testing.assert_allclose(errors, now.mean(0) - targets, atol=2e-4)
    np.testing.assert_allclose(metrics["value_loss"], np.mean((now - targets) ** 2) / 2, rtol=1e-3)


@pytest.mark.slow
def test_the_actor_waits_and_looks_at_running_statistics():
    """With a rate of 0 the actor alone decides, and its step is the one with the statistics left behind."""
    (state, hyper, _, update), batch = parts(delay=2), batch_of(8)
    after, metrics, errors = update(state, hyper, batch)
    assert errors.shape == (8,)
    assert int(after.critics.steps) == 2
    assert int(after.actor.steps) == int(after.temperature.steps) == 1
    assert np.isfinite(float(metrics["actor_loss"]))
    still = dataclasses.replace(hyper, learning_rate=jnp.float32(0), actor_learning_rate=jnp.float32(0))
    first, metrics, _ = update(state, still, batch)
    moved = dataclasses.replace(state, batch_stats=jax.tree.map(lambda x: 2 * x, state.batch_stats))
    _, other, _ = update(moved, still, batch)
    assert float(metrics["value_loss"]) == float(other["value_loss"])  # of the batch's own statistics
    assert float(metrics["actor_loss"]) != float(other["actor_loss"])
    np.testing.assert_array_equal(
        first.critics.params["heads_0"]["kernel"], state.critics.params["heads_0"]["kernel"]
    )


def test_a_batch_that_cannot_be_parted_is_refused():
    config = crossq.Config(run=RunConfig(batch_size=10), policy_delay=3)
    with pytest.raises(UserError, match="policy_delay=3 does not divide"):
        crossq.make_run(config, *PENDULUM)


@pytest.mark.slow
def test_pendulum():
    """Two seeds, 10,000 steps each (a random policy gets about -1200)."""
    config = crossq.Config(
        run=RunConfig(
            total_steps=10_000,
            learning_starts=1000,
            train_every=3,
            capacity=10_000,
            batch_size=192,
            num_logs=4,
        ),
        critic_encoder=BatchNormMLP((128, 128)),
    )
    run = crossq.make_run(config, *PENDULUM)
    keys = jax.random.split(jax.random.key(0), 2)
    states, _ = jax.jit(jax.vmap(make_train_fn(run), (0, None)))(keys, crossq.Hyper())
    returns = jax.jit(
        jax.vmap(lambda s, k: evaluate(run, s, *PENDULUM, k, episodes=32, deterministic=True)[0])
    )(states, keys)
    assert jnp.mean(returns) > -300
