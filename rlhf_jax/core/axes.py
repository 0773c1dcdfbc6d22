"""Names for the axes of arrays, the one table that maps them to the axes of a mesh, and constraints by name.

Code that computes says `constrain(hidden, "batch", "time", None)` and knows no mesh; whoever runs it enters
one (`jax.set_mesh`). Without a mesh, or where its axes have size 1, nothing happens.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

MESH_AXES = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")
"""Slowest links first: `tensor` talks in every layer, `data` once a step, `pipeline` hands activations on."""

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = MappingProxyType(
    {
        # axes of batches and activations
        "batch": ("data", "fsdp", "expert"),
        "time": ("sequence",),
        "tokens": ("data", "fsdp", "expert", "sequence"),  # rows and columns as one axis
        # axes of parameters
        "layers": ("pipeline",),  # stacked layers, and stages that each run some of them
        "embed": ("fsdp",),  # the residual stream's width: gathered before use, so that no device holds all
        "embed_sampling": ("fsdp",),  # the same in sampling; () gathers once, not at every token
        "heads": ("tensor",),  # query and key-value heads, and what they project to
        "hidden": ("tensor",),  # width of feed-forwards
        "vocab": ("tensor",),
        "experts": ("expert",),
    }
)
"""Logical axis -> mesh axes it is split over. An axis that is not here is not split."""

GATHERED_SAMPLING: Rules = MappingProxyType({"embed_sampling": ()})
"""Changes `RULES` so that answers are sampled with parameters that are whole along `fsdp`."""

T = TypeVar("T", bound=jax.Array)
_table: contextvars.ContextVar[Rules] = contextvars.ContextVar("rlhf_jax_axis_rules", default=RULES)


@contextlib.contextmanager
def axis_rules(rules: Rules) -> Iterator[None]:
    """Lets `rules` win over the table. A program follows what holds when it is traced, at its first call."""
    token = _table.set({**_table.get(), **rules})
    try:
        yield
    finally:
        _table.reset(token)


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> tuple[PartitionSpec, tuple[str, ...]]:
    """Partition spec of an array with the logical axes `names` over `mesh`.

    A mesh axis serves the first dimension that asks for it. A dimension that the product of its mesh axes
    does not divide is not split at all.

    Returns:
      (spec, logical axes that could not be split).
    """
    table = _table.get()
    free = {axis: mesh.shape[axis] for axis in _usable(mesh)}
    entries, refused = [], []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in table.get(name or "", ()) if free.get(axis, 1) > 1)
        if size % math.prod(free[axis] for axis in axes):
            refused.append(name)
            axes = ()
        for axis in axes:
            del free[axis]
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries), tuple(refused)


def constrain(array: T, *names: str | None) -> T:
    """Tells the compiler to lay `array` out by its logical axes, one name (or None) for each dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _usable(mesh):
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(names, array.shape, mesh)[0])


def all_gathered(array: T, *names: str | None, over: str = "embed") -> T:
    """`array`, laid out by `names`, made whole along the axis `over` before it is used.

    A constraint holds for the gradient too, which would then be summed and held whole on every device; here
    the gradient goes straight back to where `names` put it.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return _gathered((names, over), array)  # pyright: ignore[reportReturnType]
    return array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(layout: tuple[tuple[str | None, ...], str], array: jax.Array) -> jax.Array:
    names, over = layout
    return constrain(array, *(None if name == over else name for name in names))


def _gathered_forward(layout: tuple[tuple[str | None, ...], str], array: jax.Array) -> tuple[jax.Array, None]:
    return _gathered(layout, array), None


def _gathered_backward(
    layout: tuple[tuple[str | None, ...], str], _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (constrain(gradient, *layout[0]),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def shards(name: str, size: int) -> int:
    """Into how many parts the entered mesh splits an axis of this name and size; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    entry = partition_spec([name], [size], mesh)[0][0]
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def mesh_size(name: str) -> int:
    """Number of devices of the entered mesh that a logical axis is meant to be split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _table.get()[name] if axis in _usable(mesh))


def _usable(mesh: Mesh | AbstractMesh) -> list[str]:
    """Axes of more than one device that the compiler, rather than a `shard_map`, is in charge of."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [axis for axis, kind in kinds if kind == AxisType.Auto and mesh.shape[axis] > 1]
