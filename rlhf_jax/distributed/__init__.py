"""Meshes, where arrays live on them, and several hosts. Knows names and shapes of arrays, not models."""

from rlhf_jax.distributed.hosts import (
    HostOptions,
    abandon,
    any_host,
    is_first_host,
    is_lost_peer,
    lost_peer_message,
    start_hosts,
)
from rlhf_jax.distributed.meshes import abstract_mesh, current_mesh, describe_mesh, make_mesh
from rlhf_jax.distributed.placement import (
    all_values,
    born_sharded,
    laid_out_for_sampling,
    local_rows,
    local_values,
    place,
    shard_batch,
    shardings_of,
    shards_of_batch,
)
from rlhf_jax.distributed.sharding import PARAMETER_AXES, describe_shardings, logical_axes, tree_shardings

__all__ = [
    "PARAMETER_AXES",
    "HostOptions",
    "abandon",
    "abstract_mesh",
    "all_values",
    "any_host",
    "born_sharded",
    "current_mesh",
    "describe_mesh",
    "describe_shardings",
    "is_first_host",
    "is_lost_peer",
    "laid_out_for_sampling",
    "local_rows",
    "local_values",
    "logical_axes",
    "lost_peer_message",
    "make_mesh",
    "place",
    "shard_batch",
    "shardings_of",
    "shards_of_batch",
    "start_hosts",
    "tree_shardings",
]
