"""Controllers of the KL coefficient: (coefficient, measured KL) -> coefficient."""

import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Scalar


def adaptive_kl_update(
    coef: Scalar,
    kl: Scalar,
    *,
    target: Scalar,
    horizon: Scalar,
    num_steps: Scalar,
) -> Float[Array, ""]:
    """The log-space proportional controller of Ziegler et al. 2019, section 2.2.

        error = clip(kl / target - 1, -0.2, 0.2)
        coef <- coef (1 + error num_steps / horizon)

    A KL that is not finite leaves the coefficient as it was.

    Args:
      coef: the coefficient in use.
      kl: measured KL(policy || reference) per sequence, in nats.
      target: the KL to hold, in nats.
      horizon: the larger, the slower: over `horizon` samples the factor is at most about e^0.2.
      num_steps: samples seen since the last update.

    Returns:
      The next coefficient.
    """
    coef = jnp.asarray(coef)
    error = jnp.clip(jnp.asarray(kl) / target - 1, -0.2, 0.2)
    return jnp.where(jnp.isfinite(kl), coef * (1 + error * num_steps / horizon), coef)


def fixed_kl_update(
    coef: Scalar, kl: Scalar, *, target: Scalar, horizon: Scalar, num_steps: Scalar
) -> Float[Array, ""]:
    """Leaves the coefficient as it is; takes what `adaptive_kl_update` takes, so that either fits."""
    del kl, target, horizon, num_steps
    return jnp.asarray(coef)
