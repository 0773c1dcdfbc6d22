"""Attention in blocks of queries that skip the columns nobody in the block sees.

What XLA's CPU compiler is slow at is passing over [T, S] matrices in memory, so there are as few such
passes as can be: a block's logits stay in the cache, causality halves them, the softmax divides [T, d]
outputs rather than [T, S] weights, and the backward pass computes the weights again (Dao et al. 2022,
algorithms 1 and 4) instead of keeping them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.core.types import Array, Bool, Float

ATTENDED = "attended"
"""The name under which a backward pass may keep outputs and log-sums instead of computing them again."""

BLOCK = 64
MOST_BLOCKS = 16  # they are unrolled: more would take long to compile


def blocked_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K v"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B H T S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T H v"]:
    """`plain_attention` of whole rows in blocks. The mask is causal; columns of a segment follow one another.

    The columns that there are more than queries come first, and any token may see them (a soft prompt).
    The bias is taken for a constant: it gets no gradient.
    """
    batch, time, heads, width = query.shape
    kv_heads = key.shape[2]
    scaled = (query * jnp.asarray(scale, query.dtype)).reshape(batch, time, kv_heads, -1, width)
    if bias is not None:
        bias = bias.reshape(batch, kv_heads, -1, *bias.shape[2:])
    outputs: Array = _blocked(  # pyright: ignore[reportAssignmentType] (custom_vjp hides the type)
        softcap,
        window,
        scaled.transpose(0, 2, 3, 1, 4),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask[:, None, None],
        bias,
    )
    return outputs.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    softcap: float | None,
    window: int | None,
    query: Float[Array, "B K G T d"],
    key: Float[Array, "B K S d"],
    value: Float[Array, "B K S v"],
    mask: Bool[Array, "B 1 1 T S"],
    bias: Float[Array, "B K G T S"] | None,
) -> Float[Array, "B K G T v"]:
    return _forward(softcap, window, query, key, value, mask, bias)[0]


def _blocks(mask: Bool[Array, "B 1 1 T S"], window: int | None) -> list[tuple[slice, slice]]:
    """Each block's queries and the columns that any of them sees, which begin with those of a prompt."""
    time, columns = mask.shape[3:]
    before, size = columns - time, max(BLOCK, -(-time // MOST_BLOCKS))
    starts = range(0, time, size)
    stops = [min(start + size, time) for start in starts]
    firsts = [0 if window is None or before else max(0, start - window + 1) for start in starts]
    return [
        (slice(*rows), slice(first, before + rows[1]))
        for *rows, first in zip(starts, stops, firsts, strict=True)
    ]


def _logits(softcap, query, key, mask, bias) -> tuple[Float[Array, "B K G t s"], Array | float]:
    """Logits of a block, and the slope of the soft-cap."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bkgtd,bksd->bkgts", query, key, preferred_element_type=wide)
    slope = 1.0
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1 - bounded**2
    if bias is not None:
        logits += bias
    return jnp.where(mask, logits, jnp.finfo(wide).min), slope


def _forward(softcap, window, query, key, value, mask, bias) -> tuple[Array, tuple]:
    outputs, log_totals = [], []
    for rows, seen in _blocks(mask, window):
        slanted = None if bias is None else bias[..., rows, seen]
        logits, _ = _logits(softcap, query[..., rows, :], key[:, :, seen], mask[..., rows, seen], slanted)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(value.dtype)
        product = jnp.einsum(
            "bkgts,bksv->bkgtv", weights, value[:, :, seen], preferred_element_type=total.dtype
        )
        outputs.append((product / total).astype(value.dtype))
        log_totals.append(highest + jnp.log(total))
    joined, log_total = (
        checkpoint_name(jnp.concatenate(parts, axis=3), ATTENDED) for parts in (outputs, log_totals)
    )
    return joined, (query, key, value, mask, bias, joined, log_total)


def _backward(softcap, window, kept, gradient) -> tuple:
    query, key, value, mask, bias, outputs, log_total = kept
    wide = log_total.dtype
    mean = jnp.sum(gradient.astype(wide) * outputs.astype(wide), axis=-1, keepdims=True)
    query_gradients = []
    key_gradient, value_gradient = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    for rows, seen in _blocks(mask, window):
        slanted = None if bias is None else bias[..., rows, seen]
        part, pull = query[..., rows, :], gradient[..., rows, :]
        logits, slope = _logits(softcap, part, key[:, :, seen], mask[..., rows, seen], slanted)
        weights = jnp.exp(logits - log_total[..., rows, :])
        weight_gradient = product("bkgtv,bksv->bkgts", pull, value[:, :, seen])
        logit_gradient = weights * (weight_gradient - mean[..., rows, :]) * slope
        logit_gradient = logit_gradient.astype(query.dtype)
        query_gradients.append(product("bkgts,bksd->bkgtd", logit_gradient, key[:, :, seen]))
        pulled = product("bkgts,bkgtv->bksv", weights.astype(value.dtype), pull)
        value_gradient = value_gradient.at[:, :, seen].add(pulled)
        key_gradient = key_gradient.at[:, :, seen].add(product("bkgts,bkgtd->bksd", logit_gradient, part))
    query_gradient = jnp.concatenate(query_gradients, axis=3)
    gradients = zip((query_gradient, key_gradient, value_gradient), (query, key, value), strict=True)
    return *(computed.astype(of.dtype) for computed, of in gradients), None, None


_blocked.defvjp(_forward, _backward)
