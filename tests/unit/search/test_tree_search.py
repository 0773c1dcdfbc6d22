"""Searches over trees whose optimum is known by looking at every leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array
from rlhf_jax.search import graph, interface, mcts, tree
from rlhf_jax.search.interface import Candidates

WAYS, DEPTH, PROBLEMS = 3, 4, 8
LEAVES = np.random.default_rng(0).random((PROBLEMS, WAYS**DEPTH)).astype(np.float32)
BEST = LEAVES.argmax(axis=1)


@pytree_dataclass
class Path:
    """Where in which tree: the number of the path, and its length."""

    problem: Array
    number: Array
    depth: Array


ROOTS = Path(jnp.arange(PROBLEMS), jnp.zeros(PROBLEMS, int), jnp.zeros(PROBLEMS, int))


def done(path):
    return path.depth == DEPTH


def propose(path, key):
    """All ways; the first with half of the likelihood."""
    del key
    number = path.number[:, None] * WAYS + jnp.arange(WAYS)
    count = len(path.number)
    states = Path(
        jnp.broadcast_to(path.problem[:, None], number.shape),
        number,
        jnp.broadcast_to(path.depth[:, None] + 1, number.shape),
    )
    logp = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.25])), number.shape)
    there = jnp.ones(number.shape, bool)
    return Candidates(states, logp, jnp.ones(number.shape), there, jnp.full(count, float(WAYS)))


def leaf_value(path, key):
    """What a leaf is worth; nothing is known of other states."""
    del key
    return jnp.where(done(path), jnp.asarray(LEAVES)[path.problem, path.number], 0.5), jnp.zeros(
        path.number.shape
    )


def best_below(path, key):
    """The best leaf below a state: perfect knowledge."""
    del key
    span = WAYS ** (DEPTH - path.depth)
    place = jnp.arange(WAYS**DEPTH)
    below = (place >= (path.number * span)[:, None]) & (place < ((path.number + 1) * span)[:, None])
    return jnp.max(jnp.where(below, jnp.asarray(LEAVES)[path.problem], 0), axis=1), jnp.ones(
        path.number.shape
    )


def check_optimal(found, share=1.0):
    assert bool(jnp.all(found.done))
    right = np.asarray(found.states.number) == BEST
    assert right.mean() >= share
    np.testing.assert_allclose(np.asarray(found.values)[right], LEAVES.max(axis=1)[right])


def test_breadth_first_of_full_width_is_exhaustive():
    found = jax.jit(
        lambda key: tree.breadth_first(
            propose, tree.value_scorer(leaf_value), done, ROOTS, key, beam_width=WAYS**DEPTH, depth=DEPTH + 1
        )
    )(jax.random.key(0))
    check_optimal(found)
    # 1 + 3 + 9 + 27 states are expanded; those that are finished cost nothing more.
    np.testing.assert_array_equal(found.cost, WAYS * (1 + 3 + 9 + 27))


def test_breadth_first_of_width_one_follows_the_values():
    search = jax.jit(
        lambda key: tree.breadth_first(
            propose, tree.value_scorer(best_below), done, ROOTS, key, beam_width=1, depth=DEPTH
        )
    )
    found = search(jax.random.key(0))
    check_optimal(found)
    np.testing.assert_array_equal(found.cost, DEPTH * (WAYS + WAYS))  # proposals, and a value for each
    vote = jax.jit(
        lambda key: tree.breadth_first(propose, tree.vote_scorer, done, ROOTS, key, beam_width=1, depth=DEPTH)
    )
    greedy = vote(jax.random.key(0))
    np.testing.assert_array_equal(greedy.states.number, 0)  # the likeliest way, again and again


def test_an_unfinished_search_says_so():
    judge = tree.value_scorer(best_below)
    search = jax.jit(lambda key: tree.breadth_first(propose, judge, done, ROOTS, key, beam_width=2, depth=2))
    found = search(jax.random.key(0))
    assert not bool(jnp.any(found.done))
    assert (np.asarray(found.states.depth) == 2).all()


def test_depth_first_backtracks_to_the_optimum():
    def search(evaluate, **options):
        return jax.jit(lambda key: tree.depth_first(propose, evaluate, done, ROOTS, key, **options))(
            jax.random.key(0)
        )

    expansions = 1 + 3 + 9 + 27
    found = search(leaf_value, expansions=expansions, threshold=-1.0, accept=2.0)
    check_optimal(found)
    np.testing.assert_array_equal(found.cost, WAYS * expansions)
    short = search(leaf_value, expansions=expansions - 20, threshold=-1.0, accept=2.0)
    assert (np.asarray(short.states.number) != BEST).any()
    guided = search(best_below, expansions=expansions, threshold=-1.0, accept=0.8)
    check_optimal(guided)
    np.testing.assert_array_equal(guided.cost, 2 * WAYS * DEPTH)  # no step back was needed
    pruned = search(best_below, expansions=expansions, threshold=2.0, accept=2.0)
    assert not bool(jnp.any(pruned.done))
    np.testing.assert_array_equal(pruned.cost, 2 * WAYS)


@pytest.mark.slow
def test_monte_carlo_tree_search_finds_the_optimum():
    # Knowing nothing of what is no leaf, it finds the best of 81 leaves by exploring.
    blind = jax.jit(
        lambda key: mcts.search_step(
            propose, leaf_value, done, ROOTS, key, num_simulations=800, value_scale=0.001
        )
    )(jax.random.key(0))
    np.testing.assert_array_equal(blind.best.number, BEST)
    np.testing.assert_allclose(blind.best_value, LEAVES.max(axis=1))
    # With good advice, a few simulations come close: means over what was visited are not maxima.
    found = jax.jit(
        lambda key: mcts.monte_carlo_tree_search(
            propose, best_below, done, ROOTS, key, num_simulations=16, depth=DEPTH
        )
    )(jax.random.key(0))
    assert bool(jnp.all(found.done))
    regret = LEAVES.max(axis=1) - np.asarray(found.values)
    assert regret.mean() < 0.1 * (LEAVES.max(axis=1) - LEAVES.mean(axis=1)).mean()


@pytest.mark.slow
def test_one_search_counts_and_pays_once():
    roots = Path(jnp.arange(2), jnp.zeros(2, int), jnp.array([DEPTH - 1, DEPTH]))
    search = jax.jit(lambda key: mcts.search_step(propose, leaf_value, done, roots, key, num_simulations=30))
    found = search(jax.random.key(0))
    # Below the first root are three leaves, whose values are paid once, however often they are visited.
    np.testing.assert_allclose(found.values[0], LEAVES[0, :WAYS], rtol=1e-6)
    assert int(found.child.number[0]) == int(found.best.number[0]) == int(LEAVES[0, :WAYS].argmax())
    np.testing.assert_allclose(found.best_value, [LEAVES[0, :WAYS].max(), LEAVES[1, 0]], rtol=1e-6)
    assert float(found.cost[0]) == WAYS  # the leaves propose nothing
    assert float(found.cost[1]) == 0
    assert int(found.child.number[1]) == 0
    assert int(found.child.depth[1]) == DEPTH


def test_rollouts_are_means_of_leaves():
    def random_way(path, key):
        found = propose(path, key)
        way = jax.random.randint(key, path.number.shape, 0, WAYS)
        return Candidates(
            jax.tree.map(lambda x: x[jnp.arange(len(way)), way][:, None], found.states),
            found.logp[:, :1],
            found.count[:, :1],
            found.mask[:, :1],
            jnp.ones(path.number.shape),
        )

    rollout = interface.make_rollout_fn(random_way, leaf_value, done, steps=DEPTH)
    many = jax.tree.map(lambda x: jnp.repeat(x, 4000), ROOTS)
    values, cost = jax.jit(rollout)(many, jax.random.key(0))
    np.testing.assert_allclose(values.reshape(PROBLEMS, -1).mean(axis=1), LEAVES.mean(axis=1), atol=0.025)
    np.testing.assert_array_equal(cost, DEPTH)


# Graphs of thoughts: the sorting task of the paper --------------------------------------------------


def split(rows, key):
    """Two halves."""
    del key
    return rows.reshape(len(rows), 2, -1), jnp.zeros(len(rows))


def join(groups, key):
    """A merge of sorted parts, by rank."""
    del key
    return jnp.sort(groups.reshape(len(groups), -1), axis=1), jnp.ones(len(groups))


def improve(rows, key):
    """One swap of random neighbours."""
    place = jax.random.randint(key, (len(rows), 1), 0, rows.shape[1] - 1)
    columns = jnp.arange(rows.shape[1])
    order = jnp.where(columns == place, place + 1, jnp.where(columns == place + 1, place, columns))
    return jnp.take_along_axis(rows, order, axis=1), jnp.ones(len(rows))


def in_order(rows, key):
    """Minus the number of pairs in the wrong order."""
    del key
    wrong = jnp.triu(rows[:, :, None] > rows[:, None, :], 1)
    return -jnp.sum(wrong, axis=(1, 2)).astype(float), jnp.zeros(len(rows))


def test_a_graph_of_thoughts_sorts():
    rows = jax.vmap(lambda key: jax.random.permutation(key, 16))(jax.random.split(jax.random.key(1), 4))
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def think(rows):
        halves = graph.branch(split, in_order, rows, keys[0])
        refined = graph.refine(improve, in_order, halves, keys[1], rounds=20)
        merged = graph.merge(join, in_order, refined, keys[2], size=2)
        return halves, refined, merged, graph.keep_best(halves, count=1)

    halves, refined, merged, best = think(rows)
    assert halves.values.shape == (4, 2)
    assert (np.asarray(refined.values) >= np.asarray(halves.values)).all()
    assert float(refined.values.sum()) > float(halves.values.sum())
    np.testing.assert_array_equal(refined.cost, 40)
    np.testing.assert_array_equal(jnp.sort(refined.states, axis=-1), jnp.sort(halves.states, axis=-1))
    np.testing.assert_array_equal(merged.states, np.broadcast_to(np.arange(16), (4, 1, 16)))
    np.testing.assert_array_equal(merged.cost, 41)
    np.testing.assert_array_equal(best.values[:, 0], halves.values.max(axis=1))
