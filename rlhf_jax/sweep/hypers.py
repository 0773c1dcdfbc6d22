"""Settings to sweep over: a `Hyper` whose every leaf has a first axis, one entry a setting."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, PRNGKeyArray

H = TypeVar("H")
Draw = Callable[[PRNGKeyArray, tuple[int, ...]], Array]


def product(base: H, **axes: Sequence[float]) -> H:
    """Every combination of the values given; the last axis varies fastest.

    Args:
      base: a pytree dataclass of scalars, or of trees of them; fields that are not named keep its value.
      axes: values of each field, or of each entry of a field that is a dictionary (`loss_params`).

    Raises:
      UserError: there is no such field, or it got no values.
    """
    grids = np.meshgrid(*axes.values(), indexing="ij") if axes else []
    columns = {name: grid.reshape(-1) for name, grid in zip(axes, grids, strict=True)}
    return _stack(base, columns, count=grids[0].size if grids else 1)


def zipped(base: H, **axes: Sequence[float]) -> H:
    """The first values of all together, then the second ones, and so on.

    Raises:
      UserError: there is no such field, or the numbers of values differ.
    """
    lengths = {name: len(values) for name, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"zipped: as many values are needed for each field, not {lengths}")
    return _stack(base, dict(axes), count=next(iter(lengths.values()), 1))


def drawn(key: PRNGKeyArray, base: H, count: int, **draws: Draw) -> H:
    """`count` random settings.

        drawn(key, base, 50, learning_rate=lambda key, shape: 10 ** jax.random.uniform(key, shape) * 1e-4)

    Args:
      draws: (key, shape) -> values, for each field.

    Raises:
      UserError: there is no such field.
    """
    keys = jax.random.split(key, max(len(draws), 1))
    columns = {name: draw(keys[i], (count,)) for i, (name, draw) in enumerate(draws.items())}
    return _stack(base, columns, count=count)


def _column_name(path: tuple[Any, ...], columns: Mapping[str, Any]) -> str | None:
    """The column of a leaf: that of its field or, in a field that is a dictionary, of its key."""
    names = [path[0].name, *(entry.key for entry in path[1:2] if isinstance(entry, jax.tree_util.DictKey))]
    return next((name for name in names if name in columns), None)


def _stack(base: Any, columns: dict[str, Any], *, count: int) -> Any:
    held_by_name = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    for mapping in [held for held in held_by_name.values() if isinstance(held, Mapping)]:
        held_by_name |= mapping
    for name, values in columns.items():
        if name not in held_by_name:
            known = ", ".join(held_by_name)
            raise UserError(f"{type(base).__name__} has no field {name!r}: choose among {known}")
        if len(values) == 0:
            raise UserError(f"{name}: no values to sweep over: give at least one")
        if not jax.tree.leaves(held_by_name[name]):
            raise UserError(f"{type(base).__name__}.{name} is None: give the base a number to sweep over it")

    def column(path: tuple[Any, ...], held: Any) -> Array:
        name, held = _column_name(path, columns), jnp.asarray(held)
        if name is None:
            return jnp.broadcast_to(held, (count, *held.shape))
        values = jnp.asarray(columns[name])
        # A whole number among the values of a float field must not make integers of them all.
        return values.astype(held.dtype) if jnp.issubdtype(held.dtype, jnp.floating) else values

    return jax.tree_util.tree_map_with_path(column, base)
