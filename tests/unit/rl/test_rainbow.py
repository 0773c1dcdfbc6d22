"""Rainbow and noisy networks: the noise's law, C51 without noise, a step against NumPy, whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiers import few

from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import c51, dqn, rainbow
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.noisy import init_noisy, sample_params
from rlhf_jax.rl.networks.q_networks import ActionValues

CARTPOLE = environments.make("CartPole-v1")
TX = make_optimizer(OptimizerConfig(clip_norm=10.0, b2=0.999))
NETWORK = ActionValues(ObsEncoder(MLP((6,), nn.relu), (4,)), 3, outputs=5, dueling=True)
VALUES = dqn.network_fns(NETWORK, c51.rank_actions)
HYPER = rainbow.Hyper(v_min=-2.0, v_max=2.0)


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


def params_of(seed=0):
    return NETWORK.init(jax.random.key(seed), jnp.zeros((1, 4)))["params"]


def test_noise_is_factorized_and_its_roots_are_normal():
    """The noise of a kernel is the outer product of inputs' and outputs' roots, the bias's the latter."""
    mean = {"layer": {"kernel": jnp.ones((600, 900)), "bias": jnp.ones(900)}, "scale": jnp.ones(4)}
    noisy = init_noisy(mean, sigma=0.5)
    drawn = sample_params(noisy, jax.random.key(1))
    np.testing.assert_array_equal(drawn["scale"], 1)
    spread = 0.5 / np.sqrt(600)
    kernel, bias = (np.asarray((drawn["layer"][name] - 1) / spread) for name in ("kernel", "bias"))
    column = int(np.argmax(np.abs(bias)))
    inputs = kernel[:, column] / bias[column]
    np.testing.assert_allclose(kernel, np.outer(inputs, bias), atol=2e-3)
    for roots in (inputs, bias):
        normal = np.sign(roots) * roots**2
        moments = [normal.mean(), normal.var(), np.mean(normal**4)]
        np.testing.assert_allclose(moments, [0, 1, 3], atol=0.7)
    other = sample_params(noisy, jax.random.key(2))
    assert not np.array_equal(other["layer"]["bias"], drawn["layer"]["bias"])


@pytest.mark.parametrize("double", few([False, True], False))
@pytest.mark.slow
def test_without_noise_a_step_is_that_of_c51(double):
    plain = dqn.State(dqn.init(params_of(), TX).learner, params_of(1))
    expected, _, errors = jax.jit(c51.make_update(c51.Config(double=double), VALUES, TX))(
        plain, c51.Hyper(v_min=-2.0, v_max=2.0), batch_of()
    )
    hyper = dataclasses.replace(HYPER, sigma=0.0)
    state = rainbow.init(params_of(), TX, jax.random.key(0), hyper)
    state = dataclasses.replace(state, target_params=init_noisy(params_of(1), sigma=0.0))
    update = rainbow.make_update(rainbow.Config(double=double), VALUES, TX)
    found, _, same_errors = jax.jit(update)(state, hyper, batch_of())
    np.testing.assert_allclose(same_errors, errors, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6),
        found.learner.params.mean["actions"]["bias"],
        expected.learner.params["actions"]["bias"],
    )


def test_three_draws_against_a_loop():
    """Own values, the choice of the next action and the target's value each have their own draw."""
    state = rainbow.init(params_of(), TX, jax.random.key(3), HYPER)
    state = dataclasses.replace(state, target_params=init_noisy(params_of(1), sigma=0.5))
    batch = batch_of()
    after, metrics, _ = jax.jit(rainbow.make_update(rainbow.Config(), VALUES, TX))(state, HYPER, batch)
    _, own, choice, target = jax.random.split(state.key, 4)

    def logits(noisy, key, obs):
        return np.asarray(NETWORK.apply({"params": sample_params(noisy, key)}, obs), np.float64)

    now = logits(state.learner.params, own, batch.obs)
    choosing = logits(state.learner.params, choice, batch.next_obs)
    later = logits(state.target_params, target, batch.next_obs)
    losses = []
    for i in range(8):
        means = [(np.exp(row) / np.exp(row).sum()) @ np.linspace(-2, 2, 5) for row in choosing[i]]
        row = later[i, int(np.argmax(means))]
        goal = np.zeros(5)
        for prob, atom in zip(np.exp(row) / np.exp(row).sum(), np.linspace(-2, 2, 5), strict=True):
            place = np.clip(batch.reward[i] + batch.discount[i] * atom, -2, 2) + 2  # spacing 1
            for neighbour in range(5):
                goal[neighbour] += prob * max(0, 1 - abs(place - neighbour))
        taken = now[i, batch.action[i]]
        losses.append(-batch.weight[i] * (goal @ (taken - np.log(np.exp(taken).sum()))))
    np.testing.assert_allclose(metrics["value_loss"], np.mean(losses), rtol=1e-4)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after.learner.params, state.learner.params)
    assert all(jax.tree.leaves(moved))  # sigma learns as mu does


@pytest.mark.slow
def test_runs_of_several_sigmas_side_by_side():
    course = RunConfig(total_steps=60, learning_starts=20, capacity=40, batch_size=4, num_logs=2, n_step=2)
    config = rainbow.Config(run=course, encoder=MLP((6,), nn.relu), num_atoms=5)
    train = rainbow.make_train(config, *CARTPOLE)
    sweep = dataclasses.replace(jax.tree.map(lambda _: None, HYPER), sigma=0)
    hyper = dataclasses.replace(HYPER, sigma=jnp.array([0.0, 0.5]))
    states, history = jax.jit(jax.vmap(train, (None, sweep)))(jax.random.key(0), hyper)
    assert history["value_loss"].shape == (2, 2)
    assert np.all(np.isfinite(history["value_loss"]))
    actions = states.replay.data.action
    assert not np.array_equal(actions[0], actions[1])


@pytest.mark.slow
def test_cartpole():
    """Two seeds, 30,000 steps each: at least 100 on average (a random policy gets 22)."""
    course = RunConfig(total_steps=30_000, learning_starts=1000, num_envs=4, train_every=4, n_step=3)
    run = rainbow.make_run(rainbow.Config(run=course), *CARTPOLE)
    hyper = rainbow.Hyper(learning_rate=1e-3, target_update_interval=100, v_min=0.0)
    keys = jax.random.split(jax.random.key(0), 2)
    options = compiler_options()
    states, _ = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=options)(keys, hyper)

    def score(state, key):
        return evaluate(run, state, *CARTPOLE, key, episodes=16, deterministic=True)[0]

    assert jnp.mean(jax.jit(jax.vmap(score), compiler_options=options)(states, keys)) > 100
