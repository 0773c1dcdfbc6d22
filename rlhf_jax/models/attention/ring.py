"""Attention over sequences whose columns are split over devices: keys and values go around in a ring."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int

_NONE = -1e30  # the largest logit of a row that has seen no column: finite, so that differences stay finite


@pytree_dataclass
class Columns:
    """Indices that make the attention mask, for the columns of one device.

    Attributes:
      index: place of each column in the whole row.
      positions: within its segment.
      segment_ids: attention stays within one.
    """

    index: Int[Array, "T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def ring_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K v"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    axis_name: str,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B T H v"]:
    """Causal attention within segments, inside a `shard_map` over `axis_name` (Liu et al. 2023, section 3).

        o = sum_s exp(z_s - m) v_s / sum_s exp(z_s - m),   z = softcap(scale q k^T),  m = max z

    Every device holds T columns of its rows, in order. Blocks of keys and values pass by while each device
    keeps the running maximum, sum and output of its queries in at least float32; the backward pass lets them
    pass once more, with their gradients, so that neither holds more than two blocks.

    Args:
      window: how many tokens are seen, the current one included; None for all before.

    Returns:
      The outputs of this device's columns; rows of padding (segment 0) see padding only, as elsewhere.
    """
    time = query.shape[1]
    index = jax.lax.axis_index(axis_name) * time + jnp.arange(time)
    columns = Columns(index, positions, segment_ids)
    return _ring((axis_name, scale, softcap, window), query, key, value, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options: tuple[Any, ...], query, key, value, columns):
    return _forward(options, query, key, value, columns)[0]


def _forward(options, query, key, value, columns):
    grouped = _grouped(query, key)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    shape = (query.shape[0], key.shape[2], query.shape[2] // key.shape[2], query.shape[1])

    def look(seen, passing):
        largest, total, output = seen
        key, value, theirs = passing
        logits = _logits(options, grouped, key, columns, theirs)[0]
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - new_largest[..., None])
        kept = jnp.exp(largest - new_largest)
        total = total * kept + jnp.sum(weights, axis=-1)
        output = output * kept[..., None] + jnp.einsum("bkgts,bskv->bkgtv", weights, value.astype(wide))
        return new_largest, total, output

    seen = (jnp.full(shape, _NONE, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, value.shape[-1]), wide))

    def step(carry, _):
        seen, passing = carry
        return (look(seen, passing), _pass_on(options, passing)), None

    passing, length = (key, value, columns), _size(options) - 1
    (seen, passing), _ = jax.lax.scan(step, (seen, passing), None, length=length)
    largest, total, output = look(seen, passing)
    output = output / total[..., None]
    normaliser = largest + jnp.log(total)
    result = _ungrouped(output).astype(value.dtype)
    return result, (query, key, value, columns, output, normaliser)


def _backward(options, residuals, d_result):
    query, key, value, columns, output, normaliser = residuals
    scale, wide = options[1], output.dtype
    grouped = _grouped(query, key).astype(wide)
    d_output = _grouped(d_result, key).astype(wide)
    # sum_s p_s dp_s = o . do: what the softmax takes off every logit's gradient
    shared = jnp.sum(_bkgt(d_output) * output, axis=-1)

    def step(carry, _):
        d_query, passing = carry
        key, value, theirs, d_key, d_value = passing
        logits, slope = _logits(options, grouped, key, columns, theirs)
        weights = jnp.exp(logits - normaliser[..., None])
        d_value += jnp.einsum("bkgts,btkgv->bskv", weights, d_output)
        d_weights = jnp.einsum("btkgv,bskv->bkgts", d_output, value.astype(wide))
        d_logits = weights * (d_weights - shared[..., None]) * slope * scale
        d_query += jnp.einsum("bkgts,bskd->btkgd", d_logits, key.astype(wide))
        d_key += jnp.einsum("bkgts,btkgd->bskd", d_logits, grouped)
        return (d_query, _pass_on(options, (key, value, theirs, d_key, d_value))), None

    zeros = [jnp.zeros(x.shape, wide) for x in (grouped, key, value)]
    # After a full round the gradients of keys and values are back with their owners.
    carry = (zeros[0], (key, value, columns, *zeros[1:]))
    (d_query, (_, _, _, d_key, d_value)), _ = jax.lax.scan(step, carry, None, length=_size(options))
    gradients = (d_query.reshape(query.shape), d_key, d_value)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (query, key, value), strict=True)), None


_ring.defvjp(_forward, _backward)


def _size(options: tuple[Any, ...]) -> int:
    return jax.lax.axis_size(options[0])


def _pass_on(options: tuple[Any, ...], blocks: Any) -> Any:
    """Every block to the next device."""
    size = _size(options)
    return jax.lax.ppermute(blocks, options[0], [(i, (i + 1) % size) for i in range(size)])


def _logits(options, grouped, key, ours: Columns, theirs: Columns):
    """Masked logits [B, K, G, T, S], and how much a raw logit moves them."""
    _, scale, softcap, window = options
    wide = jnp.promote_types(key.dtype, jnp.float32)
    logits = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide)
    slope = jnp.ones((), wide)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    seen = (ours.segment_ids[:, :, None] == theirs.segment_ids[:, None]) & (
        ours.index[:, None] >= theirs.index
    )
    if window is not None:
        seen &= ours.positions[:, :, None] - theirs.positions[:, None] < window
    return jnp.where(seen[:, None, None], logits, 2 * _NONE), slope


def _grouped(heads: Float[Array, "B T H d"], key: Float[Array, "B S K d"]) -> Float[Array, "B T K G d"]:
    return heads.reshape(*heads.shape[:2], key.shape[2], -1, heads.shape[-1])


def _bkgt(grouped: Float[Array, "B T K G d"]) -> Float[Array, "B K G T d"]:
    return jnp.moveaxis(grouped, 1, 3)


def _ungrouped(output: Float[Array, "B K G T v"]) -> Float[Array, "B T H v"]:
    moved = jnp.moveaxis(output, 3, 1)
    return moved.reshape(*moved.shape[:2], -1, moved.shape[-1])
