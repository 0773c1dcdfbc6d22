"""PF-PPO: which of the answers to a prompt is learned from, and the training step on these alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular

from rlhf_jax.algorithms import ppo, selection
from rlhf_jax.core.types import StepRewards
from rlhf_jax.rollout.step import make_ppo_train_step

PLAIN = optax.identity()
REWARDS = np.array([[0.1, 0.7, 0.3, np.nan, 0.5], [2.0, np.nan, -1.0, 0.0, np.nan]])
SCORED = np.isfinite(REWARDS)
EXPECTED = {
    selection.best_of_n_weights: [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    selection.best_random_weights: [[1 / 6, 1 / 2, 1 / 6, 0, 1 / 6], [1 / 2, 0, 1 / 4, 1 / 4, 0]],
    selection.best_worst_weights: [[1 / 2, 1 / 2, 0, 0, 0], [1 / 2, 0, 1 / 2, 0, 0]],
}


@pytest.mark.parametrize("weights_fn", EXPECTED, ids=lambda function: function.__name__)
def test_answers_are_drawn_as_often_as_their_rank_says(weights_fn):
    def draw(key):
        arrays = (jnp.asarray(REWARDS), jnp.asarray(SCORED))
        return selection.filter_by_rank(*arrays, key, weights_fn=weights_fn)

    rows = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4_000)))
    shares = np.stack([np.mean(rows == row, axis=0) for row in range(10)])
    np.testing.assert_allclose(shares[:5, 0], EXPECTED[weights_fn][0], atol=0.03)
    np.testing.assert_allclose(shares[5:, 1], EXPECTED[weights_fn][1], atol=0.03)
    assert not shares[np.flatnonzero(~SCORED.reshape(-1))].any()


@pytest.mark.parametrize("weights_fn", EXPECTED, ids=lambda function: function.__name__)
def test_one_answer_or_none_with_a_reward(weights_fn):
    rewards = jnp.array([[jnp.nan, 1.0, jnp.nan], [jnp.nan] * 3])
    scored = jnp.isfinite(rewards)
    rows = selection.filter_by_rank(rewards, scored, jax.random.key(1), weights_fn=weights_fn)
    assert rows[0] == 1
    assert 3 <= rows[1] < 6  # without a reward, as all the others to this prompt


def train(config, rows, rewards, scored, steps):
    params = tabular.init()
    sequences = jax.tree.map(lambda x: x[rows], tabular.rows(0, (5, 2, 3, 1, 4, 4, 2, 3, 1, 5)))
    rollout = tabular.rollout(params, sequences, jnp.ones(len(rows), bool))
    hyper = ppo.Hyper(learning_rate=1.0)
    step = jax.jit(make_ppo_train_step(config, tabular.score, tabular.score, PLAIN))
    state = ppo.init(params, PLAIN, jax.random.key(0), hyper)
    given = jnp.asarray(rewards, jnp.float32)
    return step(state, hyper, tabular.init(1), rollout, given, jnp.asarray(scored), steps)


def test_a_filtered_step_is_that_of_the_chosen_answers():
    rng = np.random.default_rng(0)
    ends = rng.random((10, 6)) < 0.5
    worth = np.where(ends, 0.01 * rng.random((10, 6)), np.nan)
    steps = StepRewards(jnp.asarray(worth, jnp.float32), jnp.asarray(ends))
    whole = ppo.Config(num_ppo_epochs=1, num_minibatches=1)
    filtering = dataclasses.replace(whole, group_size=5, filter_fn=selection.best_of_n_weights)
    rewards, scored = REWARDS.reshape(-1), SCORED.reshape(-1)
    state, metrics = train(filtering, np.arange(10), rewards, scored, steps)
    best = np.array([1, 5])
    chosen = jax.tree.map(lambda x: x[best], steps)
    expected, of_chosen = train(whole, best, rewards[best], scored[best], chosen)
    jax.tree.map(np.testing.assert_array_equal, state.learner.params, expected.learner.params)
    np.testing.assert_allclose(metrics.pop("sampled_reward"), rewards[scored].mean(), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, metrics, of_chosen)
    assert not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(expected.key))


def test_what_steps_earn_counts_in_the_ranking():
    config = ppo.Config(1, 1, group_size=5, filter_fn=selection.best_of_n_weights)
    ends = np.zeros((10, 6), bool)
    ends[[2, 9], 1] = True
    steps = StepRewards(jnp.where(ends, 1.0, jnp.nan), jnp.asarray(ends))
    _, metrics = train(config, np.arange(10), np.zeros(10), np.ones(10, bool), steps)
    np.testing.assert_allclose(metrics["length"], (3 + 5) / 2)  # of the only two answers with a step
    np.testing.assert_allclose(metrics["steps"], 1)
