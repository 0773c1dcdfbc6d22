"""Meshes, where arrays live on them, and several hosts. Knows names and shapes of arrays, not models."""

from rlhf_jax.distributed.hosts import HostOptions, is_first_host, start_hosts
from rlhf_jax.distributed.meshes import current_mesh, describe_mesh, make_mesh
from rlhf_jax.distributed.placement import (
    born_sharded,
    local_rows,
    local_values,
    place,
    shard_batch,
    shardings_of,
)
from rlhf_jax.distributed.sharding import PARAMETER_AXES, describe_shardings, logical_axes, tree_shardings

__all__ = [
    "PARAMETER_AXES",
    "HostOptions",
    "born_sharded",
    "current_mesh",
    "describe_mesh",
    "describe_shardings",
    "is_first_host",
    "local_rows",
    "local_values",
    "logical_axes",
    "make_mesh",
    "place",
    "shard_batch",
    "shardings_of",
    "start_hosts",
    "tree_shardings",
]
