"""Meshes, where arrays live on them, and several hosts. Knows names and shapes of arrays, not models."""

from rlhf_jax.distributed.hosts import (
    DistributedOptions,
    abort,
    any_process,
    init_distributed,
    is_lost_peer,
    is_main_process,
    lost_peer_message,
)
from rlhf_jax.distributed.meshes import abstract_mesh, current_mesh, describe_mesh, make_mesh
from rlhf_jax.distributed.placement import (
    all_rows,
    all_values,
    init_sharded,
    local_rows,
    local_values,
    reshard_for_sampling,
    shard_batch,
    shard_params,
    shardings_of,
    shards_of_batch,
)
from rlhf_jax.distributed.sharding import PARAMETER_AXES, describe_shardings, logical_axes, tree_shardings

__all__ = [
    "PARAMETER_AXES",
    "DistributedOptions",
    "abort",
    "abstract_mesh",
    "all_rows",
    "all_values",
    "any_process",
    "current_mesh",
    "describe_mesh",
    "describe_shardings",
    "init_distributed",
    "init_sharded",
    "is_lost_peer",
    "is_main_process",
    "local_rows",
    "local_values",
    "logical_axes",
    "lost_peer_message",
    "make_mesh",
    "reshard_for_sampling",
    "shard_batch",
    "shard_params",
    "shardings_of",
    "shards_of_batch",
    "tree_shardings",
]
