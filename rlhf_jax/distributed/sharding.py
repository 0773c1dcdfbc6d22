"""Sharding rules of parameters: one table of names, and what follows from it for whole states."""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.core.axes import partition_spec
from rlhf_jax.core.trees import map_named, named_leaves

Axes = tuple[str | None, ...]

# The first pattern that matches the end of a leaf's name gives the logical axes of its last dimensions.
# Whatever no pattern matches, and what has fewer dimensions than its pattern, is held whole by every device
# that holds its layer: norms, biases of the residual stream, routers, counters, keys. Leaves under `layers`
# are stacked, and their first dimension is the layers'. Leaves of an optimizer end in the names of the
# parameters they belong to.
PARAMETER_AXES: Sequence[tuple[str, Axes]] = (
    ("position_embedding", (None, "embed")),
    ("*embedding", ("vocab", "embed")),
    # attention
    ("*attention/output/kernel", ("heads", "embed")),
    ("*attention/expand", (None, "heads")),
    ("*attention/query_down/kernel", ("embed", None)),
    ("*attention/latent/kernel", ("embed", None)),
    ("*attention/rotated_key/kernel", ("embed", None)),
    ("*attention/[qkv]*/kernel", ("embed", "heads")),
    ("*attention/[qkv]*/bias", ("heads",)),
    # feed-forwards; experts are stacked in front
    ("*feed_forward/router/*", ()),
    ("*feed_forward/down", ("experts", "hidden", "embed")),
    ("*feed_forward/gate", ("experts", "embed", "hidden")),
    ("*feed_forward/up", ("experts", "embed", "hidden")),
    ("*down/kernel", ("hidden", "embed")),
    ("*gate/kernel", ("embed", "hidden")),
    ("*up/kernel", ("embed", "hidden")),
    ("*gate/bias", ("hidden",)),
    ("*up/bias", ("hidden",)),
    # adapters: each factor is split as the side of the kernel that it shares, its rank is not
    ("*attention/output/lora_a", ("heads", None)),
    ("*attention/output/lora_b", (None, "embed")),
    ("*attention/*/lora_a", ("embed", None)),
    ("*attention/*/lora_b", (None, "heads")),
    ("*down/lora_a", ("hidden", None)),
    ("*down/lora_b", (None, "embed")),
    ("*/lora_a", ("embed", None)),
    ("*/lora_b", (None, "hidden")),
)


def logical_axes(name: str, ndim: int, table: Sequence[tuple[str, Axes]] = PARAMETER_AXES) -> Axes:
    """Logical axes of the leaf called `name` (`learner/params/layers/attention/query/kernel`)."""
    axes = _named_axes(name, table)
    if axes is None or ndim < len(axes):
        axes = ()
    before = ndim - len(axes)
    stacked = ("layers",) * (before > 0 and table is PARAMETER_AXES and "layers" in name.split("/"))
    return stacked + (None,) * (before - len(stacked)) + axes


def _named_axes(name: str, table: Sequence[tuple[str, Axes]]) -> Axes | None:
    return next((axes for pattern, axes in table if fnmatch.fnmatchcase(name, f"*{pattern}")), None)


def tree_shardings(
    mesh: Mesh | AbstractMesh, tree: Any, table: Sequence[tuple[str, Axes]] = PARAMETER_AXES
) -> Any:
    """The sharding of every leaf of parameters, or of a whole training state.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s in nested dicts and dataclasses.
      table: name patterns -> logical axes; logical axes -> mesh axes is `core.axes.RULES`.
    """

    def sharding(name: str, leaf: Any) -> NamedSharding:
        axes = logical_axes(name, len(leaf.shape), table)
        spec = partition_spec(axes, leaf.shape, mesh)[0]
        return NamedSharding(mesh, spec)  # pyright: ignore[reportArgumentType]

    return map_named(sharding, tree)


def describe_shardings(
    mesh: Mesh, tree: Any, table: Sequence[tuple[str, Axes]] = PARAMETER_AXES
) -> tuple[str, list[str]]:
    """Description of the shardings that the rules give `tree`, for people.

    Returns:
      (summary, fallbacks): a line with the bytes in all and on one device, and one line for each kind of
      leaf that has an axis meant to be split which the mesh's axes do not divide, or that is held whole
      because a table other than `PARAMETER_AXES`, which is complete, names no axes for it.
    """
    total = local = 0
    fallbacks: dict[str, int] = {}
    for name, leaf in named_leaves(tree).items():
        axes = logical_axes(name, len(leaf.shape), table)
        spec, refused = partition_spec(axes, leaf.shape, mesh)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        local += size // split_of(spec, mesh)
        what = f"{'/'.join(name.split('/')[-2:])} {list(leaf.shape)} is whole"
        line = f"{what} along {', '.join(refused)}" if refused else ""
        if table is not PARAMETER_AXES and leaf.shape and _named_axes(name, table) is None:
            line = f"{what}: no axes are named for it"
        if line:
            fallbacks[line] = fallbacks.get(line, 0) + 1
    summary = f"{total:,} bytes in all, {local:,} on each of {mesh.size} devices"
    return summary, [f"{line} ({count} such)" if count > 1 else line for line, count in fallbacks.items()]


def split_of(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    """Into how many different parts an array of this spec is cut."""
    axes = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(mesh.shape[axis] for axis in axes)
