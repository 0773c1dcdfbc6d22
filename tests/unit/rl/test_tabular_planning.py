"""Dynamic programming against exhaustive search, naive loops and textbook numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rl.tabular import dynamic_programming

LAKE = dynamic_programming.frozen_lake()
SMALL = dynamic_programming.frozen_lake(("SF", "FH", "FG"))


def random_process(seed: int, states: int = 4, actions: int = 2) -> dynamic_programming.DecisionProcess:
    rng = np.random.default_rng(seed)
    return dynamic_programming.DecisionProcess(
        transitions=jnp.asarray(rng.dirichlet(np.ones(states), (states, actions)), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=(states, actions, states)), jnp.float32),
        start=jnp.full(states, 1 / states),
        terminal=jnp.arange(states) == states - 1,
    )


def test_random_walk_values_are_the_textbooks():
    values = dynamic_programming.chain_values(dynamic_programming.random_walk(5), gamma=1.0)
    np.testing.assert_allclose(values, [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0], atol=1e-6)


def test_frozen_lake_rows_are_distributions_and_slip_sideways():
    np.testing.assert_allclose(jnp.sum(LAKE.transitions, axis=-1), 1, atol=1e-6)
    # From the start, left can only stay (wall, or slipping up) or slip down.
    np.testing.assert_allclose(LAKE.transitions[0, 0, [0, 4]], [2 / 3, 1 / 3], atol=1e-6)
    certain = dynamic_programming.frozen_lake(slippery=False)
    assert jnp.argmax(certain.transitions[14, 2]) == 15
    assert certain.rewards[14, 2, 15] == 1
    with pytest.raises(UserError, match="one length"):
        dynamic_programming.frozen_lake(("SF", "F"))


def test_certain_lake_is_the_shortest_path():
    values, _ = dynamic_programming.value_iteration(
        dynamic_programming.frozen_lake(slippery=False), gamma=0.9
    )
    np.testing.assert_allclose(values[0], 0.9**5, rtol=1e-5)


def test_slippery_lake_success_probability():
    """With no discount the optimal value of the start is 14/17, the known chance of the best policy."""
    values, _ = dynamic_programming.value_iteration(LAKE, gamma=1.0, tolerance=1e-8)
    np.testing.assert_allclose(values[0], 14 / 17, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_value_iteration_policy_iteration_and_search_agree(seed):
    process = random_process(seed)
    values, _ = dynamic_programming.value_iteration(process, gamma=0.9, tolerance=1e-7)
    _, iterated, _ = dynamic_programming.policy_iteration(process, gamma=0.9)
    _, searched = dynamic_programming.search_policies(process, gamma=0.9, batch_size=4)
    np.testing.assert_allclose(values, searched, atol=2e-5)
    np.testing.assert_allclose(iterated, searched, atol=2e-5)


def test_search_on_a_small_lake_and_its_limit():
    actions, values = dynamic_programming.search_policies(SMALL, gamma=0.95)
    best, exact, rounds = dynamic_programming.policy_iteration(SMALL, gamma=0.95)
    np.testing.assert_allclose(values, exact, atol=1e-6)
    q = dynamic_programming.action_values(SMALL, exact, gamma=0.95)
    free = np.flatnonzero(~np.asarray(SMALL.terminal))
    np.testing.assert_allclose(q[free, actions[free]], q[free, best[free]], atol=1e-6)
    assert rounds <= 6
    with pytest.raises(UserError, match="too many"):
        dynamic_programming.search_policies(
            dynamic_programming.frozen_lake(("SFFF", "FFFF", "FFFF", "FFFG")), gamma=0.9
        )


def test_tree_search_is_value_iteration_from_below():
    process = random_process(5, states=3)
    values = jnp.zeros(3)
    for depth in range(1, 5):
        q = dynamic_programming.action_values(process, values, gamma=0.8)
        tree = jnp.stack(
            [dynamic_programming.search_tree(process, s, depth=depth, gamma=0.8) for s in range(3)]
        )
        np.testing.assert_allclose(tree, q, atol=1e-5)
        values = jnp.max(q, axis=-1)


@pytest.mark.slow
def test_policy_values_against_a_loop():
    process = random_process(7)
    policy = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(2), 4), jnp.float32)
    values = np.zeros(4)
    for _ in range(300):
        new = np.zeros(4)
        for s in range(3):
            for a in range(2):
                for t in range(4):
                    later = 0.0 if t == 3 else 0.9 * values[t]
                    new[s] += policy[s, a] * process.transitions[s, a, t] * (process.rewards[s, a, t] + later)
        values = new
    np.testing.assert_allclose(
        dynamic_programming.policy_values(process, policy, gamma=0.9), values, atol=1e-5
    )


def test_planning_under_vmap():
    gammas = jnp.array([0.5, 0.9, 0.99])
    together = jax.vmap(lambda g: dynamic_programming.value_iteration(LAKE, gamma=g)[0])(gammas)
    alone = jnp.stack([dynamic_programming.value_iteration(LAKE, gamma=g)[0] for g in gammas])
    np.testing.assert_allclose(together, alone, atol=1e-6)
