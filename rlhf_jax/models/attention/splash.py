"""Splash attention, the TPU kernel that skips the blocks nobody sees."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf_jax.core.axes import partition_spec, shards
from rlhf_jax.core.types import Array, Float, Int
from rlhf_jax.models.attention.blocked import ATTENDED


def splash_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K v"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H v"]:
    """The TPU kernel that skips the blocks nobody sees. The columns of a segment follow one another.

    On a mesh every device runs it on its own rows and heads.

    Args:
      interpret: runs the kernel's operations one by one, on any machine (for tests).
    """
    local = functools.partial(
        splash_on_one_device, scale=scale, softcap=softcap, window=window, interpret=interpret
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(query, key, value, segment_ids)
    heads = "heads" if shards("heads", key.shape[2]) > 1 else None
    of_heads = partition_spec(("batch", None, heads, None), key.shape, mesh)[0]
    specs = (of_heads, of_heads, of_heads, PartitionSpec(of_heads[0]))
    split = jax.shard_map(local, in_specs=specs, out_specs=of_heads, check_vma=False)
    return split(query, key, value, segment_ids)


def splash_on_one_device(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool,
) -> Array:
    """The kernel on whole rows of the heads that a device has."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    time = query.shape[1]
    padding = -time % 128
    rows = [
        jnp.pad(heads, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
        for heads in (query * jnp.asarray(scale, query.dtype), key, value)
    ]
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    # On a mesh its tables are made within the program: outside, they would be put on the mesh's devices.
    make = _splash_kernel if jax.sharding.get_abstract_mesh().empty else _make_splash_kernel
    kernel = make(time + padding, query.shape[2], window, softcap, interpret)
    outputs = jax.vmap(kernel)(*rows, splash.SegmentIds(segments, segments))
    return outputs.swapaxes(1, 2)[:, :time].astype(value.dtype)


@functools.lru_cache(maxsize=32)
def _splash_kernel(*arguments: Any) -> Any:
    # Its tables are constants, also where the kernel is made while a program is traced.
    with jax.ensure_compile_time_eval():
        return _make_splash_kernel(*arguments)


def _make_splash_kernel(
    time: int, heads: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    square = (time, time)
    mask = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
    block = next(size for size in (512, 256, 128) if time % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENDED,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
