"""Preparation of arrays before the mathematics: precision, gradients, and entries that do not count.

Every kernel and loss begins with one of these, so that all of them treat bfloat16, targets and padding alike.
A mask may have fewer axes than the values ([B, T] for logits [B, T, V]) or more ([B, T] for one value a row).
"""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Shaped


def full_precision(values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """At least float32: sums of log-probs, and recurrences over time, have few correct digits in bfloat16."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def constant(values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Without gradient, in at least float32: targets, advantages, and what an older policy said."""
    return lax.stop_gradient(full_precision(values))


def cleaned(values: Shaped[Array, "..."], mask: Bool[Array, "..."]) -> Shaped[Array, "..."]:
    """In at least float32, and 0 where masked; gradient flows."""
    values = full_precision(values)
    missing = mask.ndim - values.ndim
    values = values.reshape(values.shape + (1,) * max(missing, 0))
    return clean(values, mask.reshape(mask.shape + (1,) * max(-missing, 0)))


def cleaned_constant(values: Shaped[Array, "..."], mask: Bool[Array, "..."]) -> Shaped[Array, "..."]:
    """`cleaned`, without gradient."""
    return lax.stop_gradient(cleaned(values, mask))


def mask_or_all(mask: Bool[Array, "..."] | None, values: Shaped[Array, "..."]) -> Bool[Array, "..."]:
    """The mask; where it is None, every entry of `values` counts."""
    return jnp.ones(values.shape, bool) if mask is None else mask
