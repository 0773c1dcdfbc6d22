"""Rows of a cache: taken, repeated, replaced. A cache is any pytree, of which only the shapes matter."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int

Tree = TypeVar("Tree")

NOT_BY_ROW = -1


@pytree_dataclass
class RecordedCache:
    """A cache with the experts that each of its columns went through, which samplers hand on.

    Attributes:
      cache: the model's.
      experts: see `Sequences`.
    """

    cache: Any
    experts: Int[Array, "B S R k"]


def experts_of(cache: Any) -> Int[Array, "B S R k"] | None:
    """Experts that a cache has recorded; None where it records none."""
    return cache.experts if isinstance(cache, RecordedCache) else None


def row_axes(make: Callable[[int], Tree]) -> Tree:
    """Batch axis of each cache leaf, found by comparing the shapes for two and three rows.

    Args:
      make: the tree for a number of rows; only traced.
    """

    def axis(two: jax.ShapeDtypeStruct, three: jax.ShapeDtypeStruct) -> int:
        differing = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
        return differing[0] if differing else NOT_BY_ROW

    return jax.tree.map(axis, jax.eval_shape(lambda: make(2)), jax.eval_shape(lambda: make(3)))


def take_rows(tree: Tree, axes: Any, rows: Int[Array, "R"]) -> Tree:
    """The rows of these numbers, in this order."""
    return jax.tree.map(
        lambda leaf, axis: leaf if axis == NOT_BY_ROW else jnp.take(leaf, rows, axis=axis), tree, axes
    )


def put_rows(tree: Tree, axes: Any, rows: Int[Array, "R"], new: Tree) -> Tree:
    """The tree with `new` in the places of these rows; numbers beyond the last row are left out."""

    def put(leaf: Array, axis: int, values: Array) -> Array:
        if axis == NOT_BY_ROW:
            return leaf
        return leaf.at[(slice(None),) * axis + (rows,)].set(values, mode="drop")

    return jax.tree.map(put, tree, axes, new)
