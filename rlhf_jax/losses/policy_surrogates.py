"""Surrogate objectives of policy-gradient losses: what replaces ratio x advantage.

A surrogate takes `(log_ratio, advantages, mask, clip_low, clip_high)` and returns the objective to
*maximise* at each token, [B, T]. Pass it to `grpo_loss` as `surrogate_fn=`, its own options set with
`functools.partial`.
"""

import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Scalar
from rlhf_jax.losses.policy_ratios import bounded_exp


def clip_surrogate(
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_low: Scalar,
    clip_high: Scalar,
) -> Float[Array, "B T"]:
    """min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) (PPO, Schulman et al. 2017, eq. 7).

    Two bounds: clip_high > clip_low is DAPO's clip-higher (Yu et al. 2025, eq. 10).
    """
    del mask
    ratio = bounded_exp(log_ratio)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
