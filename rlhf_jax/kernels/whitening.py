"""Whitening over unmasked entries, and running moments."""

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean, masked_mean, masked_sum
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Scalar
from rlhf_jax.kernels.prepare import cleaned_constant


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
    values, mask = check_shapes("whiten", values=(values, "*S"), mask=(mask, "*S"))
    wide = cleaned_constant(values, mask)
    mean = masked_mean(wide, mask)
    variance = masked_mean(jnp.square(wide - mean), mask)
    whitened = (wide - mean) * lax.rsqrt(variance + epsilon)
    return clean(whitened if shift_mean else whitened + mean, mask)


@pytree_dataclass
class Moments:
    """Count, mean and sum of squared deviations of all values seen; merges exactly.

    Of one quantity, or of an array of them [*S], each with its own.

    Attributes:
      count: how many values.
      mean: their mean, 0 when there are none.
      squares: sum of (x - mean)^2.
    """

    count: Float[Array, "*S"]
    mean: Float[Array, "*S"]
    squares: Float[Array, "*S"]


def init_moments() -> Moments:
    """Moments of nothing."""
    return Moments(count=jnp.zeros(()), mean=jnp.zeros(()), squares=jnp.zeros(()))


def batch_moments(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Moments:
    """Moments of the unmasked entries of one batch; no gradient."""
    values, mask = check_shapes("batch_moments", values=(values, "*S"), mask=(mask, "*S"))
    wide = cleaned_constant(values, mask)
    mean = masked_mean(wide, mask)
    return Moments(
        count=jnp.sum(mask).astype(wide.dtype), mean=mean, squares=masked_sum(jnp.square(wide - mean), mask)
    )


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of values together (Chan, Golub & LeVeque 1983): associative, no cancellation."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    difference = b.mean - a.mean
    return Moments(
        count=count,
        mean=a.mean + difference * share,
        squares=a.squares + b.squares + jnp.square(difference) * a.count * share,
    )


def add_to_moments(moments: Moments, values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Moments:
    """`moments` and those of one batch together, each quantity as it was where the result is not finite.

    One infinite value, or one whose square is, would otherwise stay in the moments for ever.
    """
    merged = merge_moments(moments, batch_moments(values, mask))
    finite = jnp.isfinite(merged.mean) & jnp.isfinite(merged.squares)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), merged, moments)


def moments_variance(moments: Moments) -> Float[Array, "*S"]:
    """Population variance; 1 before anything was seen, so that dividing by it does nothing."""
    return jnp.where(moments.count > 0, moments.squares / jnp.maximum(moments.count, 1), 1.0)


def normalize(
    values: Float[Array, "..."], moments: Moments, *, shift_mean: bool = True, epsilon: Scalar = 1e-8
) -> Float[Array, "..."]:
    """(x - mean) / sqrt(variance + epsilon) with running moments.

    Args:
      values: any shape; gradient flows.
      moments: of all values seen so far.
      shift_mean: False only scales, as is done for rewards.
      epsilon: added to the variance.
    """
    shifted = values - moments.mean if shift_mean else values
    return shifted * lax.rsqrt(moments_variance(moments) + epsilon)


def denormalize(
    values: Float[Array, "..."], moments: Moments, *, epsilon: Scalar = 1e-8
) -> Float[Array, "..."]:
    """Inverse of `normalize`: x sqrt(variance + epsilon) + mean, with running moments.

    Args:
      values: any shape; gradient flows.
      moments: of all values seen so far.
      epsilon: added to the variance.
    """
    return values * jnp.sqrt(moments_variance(moments) + epsilon) + moments.mean
