"""Attention over sequences whose columns are split over devices: heads are exchanged for columns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Int

LocalAttentionFn = Callable[[Any, Any, Any, Any, Any], Any]
"""(query, key, value, positions, segment_ids) -> outputs, of whole rows and some of the heads."""


def ulysses_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K v"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    axis_name: str,
    attention_fn: LocalAttentionFn,
) -> Float[Array, "B T H v"]:
    """DeepSpeed-Ulysses attention, inside a `shard_map` over `axis_name` (Jacobs et al. 2023, section 3.1).

    Every device holds T columns of its rows, in order, and all H heads. An all-to-all gives it all P T
    columns and H / P heads, on which any attention runs; a second one takes the outputs back. A device sends
    a share 1 / P of its activations to each other one, where a ring passes on keys and values P times. Where
    there are fewer heads of keys than devices, they are repeated until there are P.

    Args:
      attention_fn: attention of whole rows; P must divide its heads (see `serves`).

    Returns:
      The outputs of this device's columns.
    """
    size = jax.lax.axis_size(axis_name)
    missing = max(size // key.shape[2], 1)
    key, value = (jnp.repeat(heads, missing, axis=2) for heads in (key, value))
    query, key, value = (
        jax.lax.all_to_all(heads, axis_name, split_axis=2, concat_axis=1, tiled=True)
        for heads in (query, key, value)
    )
    positions, segment_ids = (
        jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (positions, segment_ids)
    )
    outputs = attention_fn(query, key, value, positions, segment_ids)
    return jax.lax.all_to_all(outputs, axis_name, split_axis=1, concat_axis=2, tiled=True)


def serves(devices: int, heads: int, kv_heads: int) -> bool:
    """True if heads can be dealt out to so many devices, those of keys after being repeated."""
    return heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)
