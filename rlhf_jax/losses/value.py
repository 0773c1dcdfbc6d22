"""Losses of value functions: scalar, and distributional.

All take `(prediction, ..., target, mask, *, reduce=, denominator=)` and return `(loss, metrics)`. Targets
carry no gradient; masked entries may hold anything. Computation is in at least float32.
"""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.reductions import Reduction, token_mean


def _cleaned(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return clean(values, mask).astype(jnp.promote_types(values.dtype, jnp.float32))


def _constant(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return lax.stop_gradient(_cleaned(values, mask))


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip: Scalar = 0.2,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped value loss, as OpenAI's code has it; the paper does not.

        V^clip_t = clip(V_t, V^old_t - clip, V^old_t + clip)
        loss_t   = max((V_t - R_t)^2, (V^clip_t - R_t)^2) / 2

    Args:
      values: V of the value function in training.
      old_values: V at the start of the update.
      returns: targets R, in units of reward.
      mask: steps that count.
      clip: how far a value may move in one update, in units of reward; `jnp.inf` for no clipping.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_clip_fraction`, `value_error` (mean of V - R), `value_mean`.
    """
    values = _cleaned(values, mask)
    old_values, returns = _constant(old_values, mask), _constant(returns, mask)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    plain_error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    loss_per_step = 0.5 * jnp.maximum(plain_error, clipped_error)
    per_step = {
        "value_loss": loss_per_step,
        "value_clip_fraction": (clipped_error > plain_error).astype(values.dtype),
        "value_error": values - returns,
        "value_mean": values,
    }
    loss = reduce(loss_per_step, mask, denominator=denominator)
    metrics = {name: reduce(x, mask, denominator=denominator) for name, x in per_step.items()}
    return loss, lax.stop_gradient(metrics)
