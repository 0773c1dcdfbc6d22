"""Attention in blocks of queries that skip the columns nobody in the block sees.

What XLA's CPU compiler is slow at is passing over [T, S] matrices in memory, so there are as few such
passes as can be: a block's logits stay in the cache, causality halves them, the softmax divides [T, d]
outputs rather than [T, S] weights, and the backward pass computes the weights again (Dao et al. 2022,
algorithms 1 and 4) instead of keeping them.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float

BLOCK = 64
MOST_BLOCKS = 16  # they are unrolled: more would take long to compile


def blocked_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K v"],
    mask: Bool[Array, "B T T"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B H T T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T H v"]:
    """`plain_attention` of whole rows in blocks. The mask is causal; columns of a segment follow one another.

    The bias is taken for a constant: it gets no gradient.
    """
    batch, time, heads, width = query.shape
    kv_heads = key.shape[2]
    scaled = (query * jnp.asarray(scale, query.dtype)).reshape(batch, time, kv_heads, -1, width)
    scaled = scaled.transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    if bias is not None:
        bias = bias.reshape(batch, kv_heads, -1, time, time)
    size = max(BLOCK, -(-time // MOST_BLOCKS))
    outputs = []
    for start in range(0, time, size):
        rows = slice(start, min(start + size, time))
        seen = slice(0 if window is None else max(0, start - window + 1), rows.stop)
        slanted = None if bias is None else bias[..., rows, seen]
        inputs = (scaled[..., rows, :], key[:, :, seen], value[:, :, seen], mask[:, None, None, rows, seen])
        outputs.append(_block(softcap, *inputs, slanted))
    joined = jnp.concatenate(outputs, axis=3)
    return joined.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    softcap: float | None,
    query: Float[Array, "B K G T d"],
    key: Float[Array, "B K S d"],
    value: Float[Array, "B K S v"],
    mask: Bool[Array, "B 1 1 T S"],
    bias: Float[Array, "B K G T S"] | None,
) -> Float[Array, "B K G T v"]:
    return _forward(softcap, query, key, value, mask, bias)[0]


def _logits(softcap, query, key, mask, bias) -> tuple[Float[Array, "B K G T S"], Array | float]:
    """Logits, and the slope of the soft-cap."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bkgtd,bksd->bkgts", query, key, preferred_element_type=wide)
    slope = 1.0
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1 - bounded**2
    if bias is not None:
        logits += bias
    return jnp.where(mask, logits, jnp.finfo(wide).min), slope


def _forward(softcap, query, key, value, mask, bias) -> tuple[Array, tuple]:
    logits, _ = _logits(softcap, query, key, mask, bias)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    product = jnp.einsum(
        "bkgts,bksv->bkgtv", weights.astype(value.dtype), value, preferred_element_type=total.dtype
    )
    outputs = (product / total).astype(value.dtype)
    return outputs, (query, key, value, mask, bias, outputs, highest + jnp.log(total))


def _backward(softcap, kept, gradient) -> tuple:
    query, key, value, mask, bias, outputs, log_total = kept
    logits, slope = _logits(softcap, query, key, mask, bias)
    weights = jnp.exp(logits - log_total)
    wide = weights.dtype
    value_gradient = jnp.einsum("bkgts,bkgtv->bksv", weights.astype(value.dtype), gradient)
    weight_gradient = jnp.einsum("bkgtv,bksv->bkgts", gradient, value, preferred_element_type=wide)
    mean = jnp.sum(gradient.astype(wide) * outputs.astype(wide), axis=-1, keepdims=True)
    logit_gradient = (weights * (weight_gradient - mean) * slope).astype(query.dtype)
    query_gradient = jnp.einsum("bkgts,bksd->bkgtd", logit_gradient, key)
    key_gradient = jnp.einsum("bkgts,bkgtd->bksd", logit_gradient, query)
    return query_gradient, key_gradient, value_gradient, None, None


_block.defvjp(_forward, _backward)
