"""Whitening over unmasked entries, and running moments."""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.types import Array, Bool, Float, Scalar


def whiten(
    values: Float[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    shift_mean: bool = True,
    epsilon: Scalar = 1e-8,
) -> Float[Array, "..."]:
    """(x - mean) / sqrt(variance + epsilon) over the unmasked entries, which get mean 0 and variance 1.

    The variance is the population's (no Bessel correction), computed in two passes.

    Args:
      values: any shape; masked entries may hold anything.
      shift_mean: False puts the mean back after scaling, as is done for rewards (Ziegler et al. 2019).
      epsilon: added to the variance.

    Returns:
      Whitened values, 0 where masked; no gradient.
    """
    wide = clean(lax.stop_gradient(values), mask).astype(jnp.promote_types(values.dtype, jnp.float32))
    mean = masked_mean(wide, mask)
    variance = masked_mean(jnp.square(wide - mean), mask)
    whitened = (wide - mean) * lax.rsqrt(variance + epsilon)
    return clean(whitened if shift_mean else whitened + mean, mask)
