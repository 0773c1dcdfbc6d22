"""Returns and advantages along time. Every array is [B, T]; `time_major` serves [T, B].

Masked steps are skipped, not zeroed: t+1 means the next unmasked step, so padding and tool outputs
inside a trajectory are invisible, and may hold anything.
"""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Scalar
from rlhf_jax.kernels.recurrence import next_unmasked, reverse_recurrence


def _constant(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Without gradient, in at least float32: a recurrence over thousands of steps in bfloat16 is noise."""
    return lax.stop_gradient(values).astype(jnp.promote_types(values.dtype, jnp.float32))


def generalized_advantage_estimation(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    gae_lambda: Scalar = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """GAE(lambda) advantages and lambda-returns (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma_t V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma_t lambda A_{t+1}

    Masked steps are skipped, not zeroed: t+1 is the next unmasked step, so padding and
    tool outputs inside a trajectory are invisible.

    Args:
      rewards: r_t, received for the action at t.
      values: V(s_t).
      discounts: gamma_t; 0 where the episode terminates at t (not where it is truncated).
      bootstrap_value: V of the state after the last unmasked step.
      mask: steps that count.
      gae_lambda: lambda; 0 is the one-step TD error, 1 is Monte Carlo minus the value.

    Returns:
      (advantages, returns), not whitened, 0 where masked, no gradient.
    """
    rewards, values, discounts = (clean(_constant(x), mask) for x in (rewards, values, discounts))
    bootstrap_value = _constant(bootstrap_value).astype(values.dtype)
    deltas = rewards + discounts * next_unmasked(values, mask, bootstrap_value) - values
    coefficients = jnp.where(mask, discounts * gae_lambda, 1).astype(values.dtype)
    carried = reverse_recurrence(coefficients, clean(deltas, mask), jnp.zeros_like(bootstrap_value))
    advantages = clean(carried, mask)
    return advantages, advantages + values
