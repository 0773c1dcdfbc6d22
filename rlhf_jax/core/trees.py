"""Dataclasses as pytrees, and small functions over trees of arrays."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=False, field_specifiers=(dataclasses.field,))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are all pytree children (use `dataclasses.replace` to change one).

    JAX builds trees of anything (None, shardings, names of axes), not only of what the fields are annotated
    with; so unflattening sets the fields without calling `__init__`, and whoever checks the types of its
    arguments sees only what people construct.

    A field whose metadata have `saved_as` keeps that name in checkpoints, which were written before it was
    renamed.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    names = tuple(field.name for field in fields)
    keys = tuple(jax.tree_util.GetAttrKey(field.metadata.get("saved_as", field.name)) for field in fields)

    def flatten(node: T) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(node, name) for name in names), None

    def flatten_with_keys(node: T) -> tuple[tuple[tuple[Any, Any], ...], None]:
        return tuple((key, getattr(node, name)) for key, name in zip(keys, names, strict=True)), None

    def unflatten(_: None, children: Iterable[Any]) -> T:
        node = object.__new__(cls)
        node.__dict__.update(zip(names, children, strict=True))
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def tree_where(condition: jax.Array, if_true: T, if_false: T) -> T:
    """`jnp.where` with one scalar condition over every leaf; the branch not taken may hold NaN."""
    return jax.tree.map(lambda a, b: _where(condition, a, b), if_true, if_false)


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    if a is b:  # said outright, so that loops and conditionals pass it through without a copy
        return a
    if jax.dtypes.issubdtype(getattr(a, "dtype", None), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jnp.where(condition, jax.random.key_data(a), jax.random.key_data(b)), impl=jax.random.key_impl(a)
        )
    return jnp.where(condition, a, b)


def tree_add(a: T, b: T) -> T:
    """Leafwise sum of two trees."""
    return jax.tree.map(jnp.add, a, b)


def tree_all_finite(tree: Any) -> jax.Array:
    """Scalar bool: no NaN or infinity in any floating leaf."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def not_finite(tree: Any) -> dict[str, int]:
    """Counts of values that are NaN or infinite, by the `a/b/0` names of the leaves that have any."""
    floats = {n: x for n, x in named_leaves(tree).items() if jnp.issubdtype(jnp.result_type(x), jnp.inexact)}
    return {name: int(count) for name, count in jax.device_get(_counts_not_finite(floats)).items() if count}


@jax.jit
def _counts_not_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One program for all leaves: on a mesh several at once can wait for each other's devices without end."""
    return {name: jnp.sum(~jnp.isfinite(leaf)) for name, leaf in leaves.items()}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as `a/b/0`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by `a/b/0` name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[[str, Any], Any], tree: T) -> T:
    """`jax.tree.map` whose function also gets the leaf's `a/b/0` name."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), tree)


def partition(tree: Any, predicate: Callable[[str, Any], bool]) -> tuple[Any, Any]:
    """Nested dictionaries split in two: (leaves for which `predicate(name, leaf)` holds, the others).

    Each half holds its leaves where they were, and no empty dictionaries; `merge` puts them together again.
    """

    def split(node: Any, prefix: str) -> tuple[Any, Any]:
        selected, rest = {}, {}
        for key, child in node.items():
            name = f"{prefix}{key}"
            if isinstance(child, dict):
                for half, part in zip((selected, rest), split(child, f"{name}/"), strict=True):
                    if part:
                        half[key] = part
            else:
                (selected if predicate(name, child) else rest)[key] = child
        return selected, rest

    return split(tree, "")


def merge(a: Any, b: Any) -> Any:
    """The union of two trees of nested dictionaries.

    Raises:
      ValueError: both have a leaf in the same place.
    """
    merged = dict(a)
    for key, child in b.items():
        if key not in merged:
            merged[key] = child
        elif isinstance(merged[key], dict) and isinstance(child, dict):
            merged[key] = merge(merged[key], child)
        else:
            raise ValueError(f"both trees have a leaf at `{key}`")
    return merged
