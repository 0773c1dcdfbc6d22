"""Shape checks at trace time: a wrong argument gets one sentence, and compiled programs pay nothing for it.

A shape is written as in annotations: names of axes, "B T", where `*S` stands for any number of them;
alternatives apart by `|`, as in "B T | B". A name stands for one size throughout a call.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError

ShapeCheck = tuple[Any, str] | tuple[Any, str, str]
"""(value, shape), or (value, shape, what to give instead)."""


def check_shapes(function: str, **arguments: ShapeCheck) -> tuple[Any, ...]:
    """The arguments as arrays, after their ranks and sizes were found to fit each other.

        rewards, mask = check_shapes("whiten", rewards=(rewards, "B T"), mask=(mask, "B T"))

    Args:
      function: its name, for the message.
      arguments: each with its shape; lists and NumPy arrays are converted, None is left as it is.
    Raises:
      UserError: a value is no array of numbers, or has another shape; names function and parameter.
    """
    known: dict[str, _Known] = {}
    arrays = []
    for name, (value, shape, *hint) in arguments.items():
        array = None if value is None else _as_array(function, name, value, shape)
        if array is not None and not any(_fits(array, axes, name, known) for axes in shape.split("|")):
            raise UserError(_message(function, name, array.shape, shape, known, hint))
        arrays.append(array)
    return tuple(arrays)


@dataclasses.dataclass(frozen=True)
class _Known:
    """Sizes that an axis name stands for, and the argument that set them."""

    sizes: tuple[int, ...]
    owner: str


def _as_array(function: str, name: str, value: Any, shape: str) -> Any:
    """The value itself where it is an array; lists, numbers and NumPy arrays become one."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = jnp.asarray(np.asarray(value))
    except (TypeError, ValueError):
        raise UserError(
            f"{function}: {name} has type {type(value).__name__}, expected an array of shape {_shown(shape)}"
        ) from None
    return array


def _fits(array: Any, axes: str, name: str, known: dict[str, _Known]) -> bool:
    """True if the array has these axes; remembers the sizes of those that are new."""
    names = axes.split()
    free = sum(axis.startswith("*") for axis in names)
    if (free == 0 and array.ndim != len(names)) or array.ndim < len(names) - free:
        return False
    sizes: dict[str, tuple[int, ...]] = {}
    at = 0
    for axis in names:
        width = array.ndim - len(names) + 1 if axis.startswith("*") else 1
        sizes[axis] = tuple(array.shape[at : at + width])
        at += width
    expected = [known[axis].sizes if axis in known else sizes[axis] for axis in names]
    try:
        chex.assert_shape(array, tuple(size for part in expected for size in part))
    except AssertionError:
        return False
    for axis in names:
        known.setdefault(axis, _Known(sizes[axis], name))
    return True


def _message(
    function: str, name: str, found: tuple[int, ...], shape: str, known: dict[str, _Known], hint: list[str]
) -> str:
    axes = [axis for axis in dict.fromkeys(shape.replace("|", " ").split()) if axis in known]
    owners = dict.fromkeys(known[axis].owner for axis in axes)
    sizes = ", ".join(f"{axis} = {', '.join(map(str, known[axis].sizes)) or 'nothing'}" for axis in axes)
    as_in = f" with {sizes} as in {' and '.join(owners)}" if axes else ""
    advice = f": {hint[0]}" if hint else ""
    return f"{function}: {name} has shape {tuple(found)}, expected {_shown(shape)}{as_in}{advice}"


def _shown(shape: str) -> str:
    return " or ".join(f"[{', '.join(axes.split())}]" for axes in shape.split("|"))
