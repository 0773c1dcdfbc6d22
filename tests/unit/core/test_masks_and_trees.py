"""Masked sums and functions over trees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.masks import clean, last_unmasked_index, masked_mean, masked_quantile, masked_sum
from rlhf_jax.core.trees import (
    map_named,
    merge,
    named_leaves,
    partition,
    pytree_dataclass,
    tree_all_finite,
    tree_where,
)

MASK = np.array([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("dirt", [np.nan, np.inf, -np.inf])
def test_masked_entries_reach_neither_value_nor_gradient(dirt):
    values = jnp.where(MASK, jnp.array([[1.0, 0, 3], [0, 0, 0]]), dirt)

    def total(values):
        return jnp.sum(jnp.exp(clean(values, MASK, fill=-1.0))) + masked_sum(values, MASK) ** 2

    value, gradient = jax.value_and_grad(total)(values)
    np.testing.assert_allclose(value, np.exp([1, 3]).sum() + 4 * np.exp(-1) + 16, rtol=1e-6)
    expected = [[np.exp(1) + 8, 0, np.exp(3) + 8], [0, 0, 0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_means_along_axes_and_of_nothing():
    values = jnp.where(MASK, jnp.array([[1.0, 0, 3], [0, 0, 0]]), jnp.nan)
    assert float(masked_mean(values, MASK)) == 2.0
    np.testing.assert_array_equal(masked_mean(values, MASK, axis=1), [2.0, 0.0])
    np.testing.assert_array_equal(masked_mean(values, MASK, axis=0), [1.0, 0.0, 3.0])
    assert float(masked_mean(values, jnp.zeros_like(MASK))) == 0.0


def test_a_mean_of_many_bfloat16_numbers_is_exact():
    """Neither 1001 nor a running sum of ones beyond 256 is a bfloat16 number."""
    mean = masked_mean(jnp.ones(1001, jnp.bfloat16), jnp.ones(1001, bool))
    assert mean.dtype == jnp.float32
    assert float(mean) == 1.0


def test_last_unmasked_index():
    masks = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert last_unmasked_index(masks).tolist() == [1, 3, 0, 0]


def test_choosing_between_trees_keeps_keys_and_hides_the_other_branch():
    def tree(seed, fill):
        return {"key": jax.random.key(seed), "x": jnp.full(2, fill), "n": jnp.int32(seed)}

    for condition, seed in ((True, 0), (False, 1)):
        chosen = jax.jit(tree_where)(condition, tree(0, 1.0), tree(1, jnp.nan))
        expected = tree(seed, 1.0 if condition else jnp.nan)
        assert jnp.array_equal(jax.random.key_data(chosen["key"]), jax.random.key_data(expected["key"]))
        np.testing.assert_array_equal(chosen["x"], expected["x"])
        assert chosen["n"].dtype == jnp.int32


def test_finiteness_looks_at_floating_leaves_only():
    assert tree_all_finite({"n": jnp.int32(3), "x": jnp.ones(2)})
    assert tree_all_finite({"n": jnp.int32(3)})
    for bad in (jnp.nan, -jnp.inf):
        assert not tree_all_finite({"n": jnp.int32(3), "x": jnp.array([1.0, bad], jnp.bfloat16)})


def test_leaves_by_name():
    @pytree_dataclass
    class Pair:
        left: object
        right: object

    tree = Pair({"b": 1, "a": (2, 3)}, 4)
    assert named_leaves(tree) == {"left/a/0": 2, "left/a/1": 3, "left/b": 1, "right": 4}
    doubled = map_named(lambda name, leaf: leaf * (2 if name.startswith("left/a") else 1), tree)
    assert doubled == Pair({"b": 1, "a": (4, 6)}, 4)


def test_a_renamed_field_keeps_the_name_it_was_saved_as():
    @pytree_dataclass
    class Pair:
        new: object = dataclasses.field(metadata={"saved_as": "old"})
        same: object

    assert named_leaves(Pair(1, 2)) == {"old": 1, "same": 2}
    assert map_named(lambda name, leaf: name, Pair(1, 2)) == Pair("old", "same")


def test_a_tree_split_in_two_is_put_together_again():
    tree = {"a": {"x": 1, "deep": {"y": 2}}, "b": {"x": 3}, "c": 4}
    selected, rest = partition(tree, lambda name, leaf: name.endswith("x") or leaf == 4)
    assert selected == {"a": {"x": 1}, "b": {"x": 3}, "c": 4}
    assert rest == {"a": {"deep": {"y": 2}}}
    assert merge(selected, rest) == merge(rest, selected) == tree
    assert partition(tree, lambda *_: False) == ({}, tree)
    for a, b in ((tree, {"c": 5}), (tree, {"a": 5}), ({"a": 5}, tree)):
        with pytest.raises(ValueError, match="both trees have a leaf at"):
            merge(a, b)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.77, 1.0])
def test_masked_quantile_is_numpys_of_what_is_unmasked(q):
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(4, 5)), rng.random((4, 5)) > 0.4
    found = masked_quantile(jnp.asarray(np.where(mask, values, np.nan), jnp.float32), jnp.asarray(mask), q)
    np.testing.assert_allclose(found, np.quantile(values[mask], q), rtol=1e-5)
