"""C51 and QR-DQN: targets against loops, identities with DQN, exact values of a lake."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from seeds_side_by_side import evaluation_returns
from tiers import few

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.evaluation.statistics import interquartile_mean
from rlhf_jax.losses.reductions import token_mean
from rlhf_jax.rl.algorithms import c51, dqn, qr_dqn
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import ActionValues
from rlhf_jax.rl.tabular import dynamic_programming

CARTPOLE = environments.make("CartPole-v1")
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))


def batch_of(count: int = 8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        action=jnp.asarray(rng.integers(0, 3, count), jnp.int32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        weight=jnp.ones(count),
    )


def test_c51_targets_against_a_loop():
    rng = np.random.default_rng(0)
    batch, hyper = batch_of(), c51.Hyper(v_min=-2.0, v_max=2.0)
    chosen, next_values = (jnp.asarray(rng.normal(size=(8, 5)), jnp.float32) for _ in range(2))
    loss, (_, errors) = c51.categorical_loss(chosen, next_values, batch, hyper, token_mean)
    losses, entropies = [], []
    for i in range(8):
        probs = np.exp(next_values[i]) / np.exp(next_values[i]).sum()
        target = np.zeros(5)
        for j, atom in enumerate(np.linspace(-2, 2, 5)):
            place = np.clip(batch.reward[i] + batch.discount[i] * atom, -2, 2) + 2  # spacing 1
            low = int(np.floor(place))
            target[low] += probs[j] * (1 - (place - low))
            if place > low:
                target[low + 1] += probs[j] * (place - low)
        log_probs = np.asarray(jax.nn.log_softmax(chosen[i]))
        losses.append(-(target * log_probs).sum())
        entropies.append(-(target[target > 0] * np.log(target[target > 0])).sum())
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    # The error of a transition is the KL from its target: cross-entropy less entropy.
    np.testing.assert_allclose(errors, np.array(losses) - entropies, atol=1e-5)


def test_ranking_actions_needs_no_support():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 7)), jnp.float32)
    for hyper in (c51.Hyper(v_min=-3.0, v_max=8.0), c51.Hyper(v_min=0.0, v_max=0.1)):
        means = jax.nn.softmax(logits) @ c51.atoms_of(7, hyper)
        np.testing.assert_array_equal(jnp.argmax(means, -1), jnp.argmax(c51.rank_actions(logits), -1))


def test_one_quantile_is_half_of_hubers_dqn():
    """tau = 1/2 weighs both sides by one half; Adam does not see the factor."""
    encoder = MLP((16,), nn.relu)
    quantile = ActionValues(ObsEncoder(encoder, (4,)), 3, outputs=1)
    params = quantile.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    tx = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999, epsilon=1e-30))
    plain_fns = dqn.network_fns(ActionValues(ObsEncoder(encoder, (4,)), 3))
    quantile_fns = dqn.network_fns(quantile, qr_dqn.rank_actions)
    one = jax.jit(dqn.make_update(dqn.Config(double=False), plain_fns, tx))
    other = jax.jit(qr_dqn.make_update(qr_dqn.Config(), quantile_fns, tx))
    a, metrics, errors = one(dqn.init(params, tx), dqn.Hyper(huber_delta=1.0), batch_of())
    b, same_metrics, same_errors = other(dqn.init(params, tx), qr_dqn.Hyper(huber_delta=1.0), batch_of())
    np.testing.assert_allclose(same_metrics["value_loss"], 0.5 * metrics["value_loss"], rtol=1e-5)
    np.testing.assert_allclose(same_errors, errors, atol=1e-6)
    for x, y in zip(jax.tree.leaves(a.learner.params), jax.tree.leaves(b.learner.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def lake_batch(lake: dynamic_programming.DecisionProcess, gamma: float) -> Batch:
    states, actions = np.meshgrid(np.flatnonzero(~np.asarray(lake.terminal)), np.arange(4), indexing="ij")
    states, actions = states.reshape(-1), actions.reshape(-1)
    next_states = np.argmax(np.asarray(lake.transitions)[states, actions], axis=-1)
    return Batch(
        obs=jnp.asarray(states),
        action=jnp.asarray(actions),
        reward=lake.rewards[states, actions, next_states],
        discount=jnp.where(lake.terminal[next_states], 0, gamma),
        next_obs=jnp.asarray(next_states),
        weight=jnp.ones(len(states)),
    )


@pytest.mark.parametrize("name", few(["c51", "qr_dqn"], "qr_dqn"))
@pytest.mark.slow
def test_means_are_the_exact_values_of_a_lake(name):
    lake = dynamic_programming.frozen_lake(slippery=False)
    exact, _ = dynamic_programming.value_iteration(lake, gamma=0.8)
    q = dynamic_programming.action_values(lake, exact, gamma=0.8)
    batch = lake_batch(lake, 0.8)
    network = ActionValues(ObsEncoder(MLP(()), (), 16), 4, outputs=11)
    if name == "c51":
        hyper = c51.Hyper(learning_rate=0.05, target_update_interval=20, v_min=-0.2, v_max=1.2)
        values = dqn.network_fns(network, c51.rank_actions)
        update = c51.make_update(c51.Config(), values, TX)
    else:
        hyper = qr_dqn.Hyper(learning_rate=0.01, target_update_interval=20, huber_delta=0.05)
        values = dqn.network_fns(network, qr_dqn.rank_actions)
        update = qr_dqn.make_update(qr_dqn.Config(), values, TX)
    params = network.init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]

    def step(state, _):
        return update(state, hyper, batch)[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=3000)[0])(dqn.init(params, TX))
    outputs = values.every_fn(state.learner.params, batch.obs)
    if name == "c51":
        means = jax.nn.softmax(outputs) @ c51.atoms_of(11, hyper)
    else:
        means = jnp.mean(outputs, axis=-1)
    np.testing.assert_allclose(means, q[batch.obs], atol=0.02)


def test_quantiles_of_a_coin():
    """Rewards 0 and 1 with equal chances, nothing after: the quantiles are 0s and 1s, half and half."""
    network = ActionValues(ObsEncoder(MLP(()), (), 1), 1, outputs=4)
    values = dqn.network_fns(network, qr_dqn.rank_actions)
    count = 64
    batch = Batch(
        obs=jnp.zeros(count, jnp.int32),
        action=jnp.zeros(count, jnp.int32),
        reward=jnp.arange(count) % 2.0,
        discount=jnp.zeros(count),
        next_obs=jnp.zeros(count, jnp.int32),
        weight=jnp.ones(count),
    )
    hyper = qr_dqn.Hyper(learning_rate=0.005, huber_delta=0.01)
    update = qr_dqn.make_update(qr_dqn.Config(), values, TX)
    params = network.init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]

    def step(state, _):
        return update(state, hyper, batch)[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=2000)[0])(dqn.init(params, TX))
    quantiles = jnp.sort(values.every_fn(state.learner.params, batch.obs[:1])[0, 0])
    np.testing.assert_allclose(quantiles, [0, 0, 1, 1], atol=0.02)


def test_users_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="at least 2"):
        c51.make_run(c51.Config(num_atoms=1), *CARTPOLE)
    with pytest.raises(UserError, match="at least 1"):
        qr_dqn.make_run(qr_dqn.Config(num_quantiles=0), *CARTPOLE)
    with pytest.raises(UserError, match="C51 needs discrete"):
        c51.make_run(c51.Config(), *environments.make("Pendulum-v1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "config"), [(c51, c51.Config()), (qr_dqn, qr_dqn.Config(num_quantiles=10))]
)
def test_cartpole(algorithm, config):
    """The table's settings, seeds and statistic: above 475, what gymnasium counts as solved."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, total_steps=500_000))
    run = algorithm.make_run(config, *CARTPOLE)
    assert interquartile_mean(evaluation_returns(run, CARTPOLE, algorithm.Hyper(), seeds=16)) > 475
