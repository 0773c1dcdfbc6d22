"""Inverse RL: gradient by finite differences, counts against simulation, recovered rewards, limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.tabular import dynamic_programming, inverse
from rlhf_jax.rl.tabular.prediction import sample_episodes

LAKE = dynamic_programming.frozen_lake(("SF", "FH", "FG"))
GAMMA = 0.9


@pytest.fixture(scope="module")
def demonstrators():
    """Arrivals of a soft-optimal policy of the lake, and that policy."""
    q, _, _ = inverse.soft_value_iteration(LAKE, gamma=GAMMA, temperature=0.1)
    policy = jax.nn.softmax(q / 0.1)
    return inverse.arrivals(LAKE, policy, gamma=GAMMA), policy


def test_the_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        process = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, LAKE
        )
        features, weights = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=3))
        demonstrated = jnp.asarray(rng.uniform(size=6))
        evaluate = jax.jit(
            functools.partial(
                inverse.loss_and_gradient,
                process,
                features=features,
                demonstrated=demonstrated,
                gamma=GAMMA,
                temperature=0.7,
                tolerance=1e-13,
            )
        )
        _, gradient = evaluate(weights)
        for index, step in enumerate(1e-5 * np.eye(3)):
            above, below = (float(evaluate(weights + sign * step)[0]) for sign in (1, -1))
            np.testing.assert_allclose(gradient[index], (above - below) / 2e-5, rtol=1e-6)


def test_soft_values_become_values_as_entropy_loses_worth():
    values, _ = dynamic_programming.value_iteration(LAKE, gamma=GAMMA)
    _, soft, _ = inverse.soft_value_iteration(LAKE, gamma=GAMMA, temperature=1e-3)
    np.testing.assert_allclose(soft, values, atol=2e-2)
    assert soft[5] == 0


def test_arrivals_are_those_of_sampled_episodes(demonstrators):
    expected, policy = demonstrators
    chain = dynamic_programming.induced_chain(LAKE, policy)
    episodes = sample_episodes(chain, jax.random.key(0), episodes=2000, length=60)
    found = inverse.demonstrated_arrivals(episodes, num_states=6, gamma=GAMMA)
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_the_reward_found_has_the_best_policy(demonstrators):
    demonstrated, _ = demonstrators
    config = inverse.Config(updates=300, max_sweeps=200)
    hyper = inverse.Hyper(gamma=GAMMA, learning_rate=0.05, temperature=0.1)
    state, history = jax.jit(inverse.make_train(config, LAKE, demonstrated))(hyper)
    assert history["counts_apart"][-1] < 0.02 < history["counts_apart"][0]
    assert jnp.argmax(state.params) == 5  # the goal
    found = inverse.with_rewards(LAKE, state.params, jnp.eye(6))
    actions, _, _ = dynamic_programming.policy_iteration(found, gamma=GAMMA)
    best, _ = dynamic_programming.value_iteration(LAKE, gamma=GAMMA)
    reached = dynamic_programming.policy_values(LAKE, jax.nn.one_hot(actions, 4), gamma=GAMMA)
    np.testing.assert_allclose(reached[0], best[0], rtol=1e-4)
