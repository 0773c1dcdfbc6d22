"""Sums over the unmasked entries of an array, safe against NaN and infinity in the masked ones."""

import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar, Shaped


def clean(values: Shaped[Array, "..."], mask: Bool[Array, "..."], fill: float = 0.0) -> Shaped[Array, "..."]:
    """Replaces masked entries by `fill`. Apply it *before* `exp`, `log` and products.

    A `where` after them would still let NaN through into gradients (0 * NaN = NaN).
    """
    return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def masked_sum(
    values: Shaped[Array, "..."], mask: Bool[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Shaped[Array, "..."]:
    """Sum over the unmasked entries."""
    return jnp.sum(clean(values, mask), axis=axis)


def masked_mean(
    values: Shaped[Array, "..."], mask: Bool[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Mean over the unmasked entries, in at least float32; 0 where there are none."""
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    count = jnp.sum(mask, axis=axis, dtype=wide.dtype)
    return masked_sum(wide, mask, axis) / jnp.maximum(count, 1)


def masked_quantile(values: Float[Array, "..."], mask: Bool[Array, "..."], q: Scalar) -> Float[Array, ""]:
    """The q-quantile of the unmasked entries, interpolated linearly; infinite where there are none."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=None)
    position = q * jnp.maximum(jnp.sum(mask) - 1, 0)
    below = jnp.floor(position).astype(jnp.int32)
    above = jnp.ceil(position).astype(jnp.int32)
    low, high = ordered[below], ordered[above]
    # At a whole position low itself, not low + 0 x gap: ties with a threshold must not be rounded away.
    return jnp.where(below == above, low, low + (position - below) * (high - low))


def last_unmasked_index(mask: Bool[Array, "*B T"]) -> Int[Array, "*B"]:
    """Index of the last True of each row; 0 where there is none."""
    time = jnp.arange(mask.shape[-1])
    return jnp.max(jnp.where(mask, time, 0), axis=-1)
