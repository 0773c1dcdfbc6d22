"""Arrays onto a mesh and back: parameters born there, batches of which each host brings its rows."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.core.axes import constrain, partition_spec
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import map_named
from rlhf_jax.distributed.meshes import current_mesh, describe_mesh
from rlhf_jax.distributed.sharding import PARAMETER_AXES, Axes, logical_axes, split_of, tree_shardings

T = TypeVar("T")


def init_sharded(
    init_fn: Callable[..., T],
    *args: Any,
    mesh: Mesh | None = None,
    table: Sequence[tuple[str, Axes]] = PARAMETER_AXES,
) -> T:
    """`init_fn(*args)`, every leaf made where it will live: no device ever holds the whole.

    The numbers do not depend on the mesh.

    Args:
      init_fn: makes parameters, or a whole state, from `args`.
      mesh: the entered one by default.
    """
    mesh = mesh or current_mesh()
    shardings = tree_shardings(mesh, jax.eval_shape(init_fn, *args), table)
    with jax.set_mesh(mesh):
        return jax.jit(init_fn, out_shardings=shardings)(*args)


def shard_params(
    tree: T, *, mesh: Mesh | None = None, table: Sequence[tuple[str, Axes]] = PARAMETER_AXES
) -> T:
    """Parameters or a state that exist already, moved to where the rules put them.

    Buffers may be shared with `tree`.
    """
    return jax.device_put(tree, tree_shardings(mesh or current_mesh(), tree, table))


def shardings_of(tree: T) -> T:
    """Sharding of each leaf, for `out_shardings`: a state comes out of an update as it went in."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def reshard_for_sampling(params: T, dtype: Any, *, table: Sequence[tuple[str, Axes]] = PARAMETER_AXES) -> T:
    """Parameters of a traced program, split along `embed_sampling` where the table splits them along `embed`.

    Where the rules put the two on the same mesh axes, as they do unless told otherwise, nothing happens.

    Args:
      dtype: what parameters are cast to before their use, and here before they are sent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def lay_out(name: str, leaf: jax.Array) -> jax.Array:
        axes = logical_axes(name, leaf.ndim, table)
        chosen = tuple("embed_sampling" if axis == "embed" else axis for axis in axes)
        if partition_spec(axes, leaf.shape, mesh) == partition_spec(chosen, leaf.shape, mesh):
            return leaf
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return constrain(leaf.astype(dtype) if is_float else leaf, *chosen)

    return map_named(lay_out, params)


# Batches -------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh | AbstractMesh, rows: int) -> NamedSharding:
    """Rows over the mesh axes of `batch`.

    Raises:
      UserError: those do not divide the rows.
    """
    spec, refused = partition_spec(["batch"], [rows], mesh)
    if refused:
        raise UserError(
            f"a batch of {rows} rows cannot be split evenly over the mesh, {describe_mesh(mesh)}: choose a "
            "batch size that the product of data, fsdp and expert divides"
        )
    return NamedSharding(mesh, spec)  # pyright: ignore[reportArgumentType]


def shards_of_batch(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts rows are split."""
    return split_of(batch_sharding(mesh, mesh.size).spec, mesh)


def local_rows(rows: int, *, mesh: Mesh | None = None) -> np.ndarray:
    """Rows of a batch of `rows` that this process must bring to `shard_batch`, ascending; alone, all."""
    sharding = batch_sharding(mesh or current_mesh(), rows)
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    everything = np.arange(rows)
    return np.unique(np.concatenate([everything[index] for index in slices if index is not None]))


def shard_batch(local: Any, *, mesh: Mesh | None = None) -> Any:
    """Host arrays -> arrays on the mesh, split along their first axis; scalars are copied to every device.

    Args:
      local: a pytree of this process's rows (`local_rows`); arrays that are on the mesh already stay.

    Raises:
      UserError: the mesh's axes do not divide the rows.
    """
    mesh = mesh or current_mesh()
    parts = shards_of_batch(mesh)
    owned = len(local_rows(parts, mesh=mesh))  # processes along `tensor` own, and bring, the same rows

    def put(leaf: Any) -> jax.Array:
        if (
            isinstance(leaf, jax.Array)
            and leaf.committed
            and leaf.sharding.device_set == set(mesh.devices.flat)
        ):
            return leaf
        if np.ndim(leaf) == 0:
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
        rows = len(leaf) * parts // owned
        sharding = batch_sharding(mesh, rows)
        shape = (rows, *np.shape(leaf)[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), shape)

    return jax.tree.map(put, local)


def all_values(array: jax.Array) -> np.ndarray:
    """The whole array in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def all_rows(local: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the order of the batch; all must ask together.

    Args:
      local: this process's (`local_rows`).
    """
    return local if jax.process_count() == 1 else all_values(shard_batch(local))


def local_values(array: jax.Array) -> np.ndarray:
    """This process's rows of an array split along its first axis, in the order of `local_rows`."""
    if array.is_fully_addressable:
        return np.asarray(array)
    rows: dict[int, np.ndarray] = {}
    for shard in array.addressable_shards:
        start = shard.index[0].start or 0 if shard.index else 0
        rows.setdefault(start, np.asarray(shard.data))
    return np.concatenate([rows[start] for start in sorted(rows)])
