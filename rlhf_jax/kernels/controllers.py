"""Controllers of coefficients: (coefficient, what is measured) -> coefficient."""

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


def adaptive_entropy_update(
    coef: Scalar, entropy: Scalar, *, target: Scalar, step_size: Scalar
) -> Float[Array, ""]:
    """Adaptive entropy control (Skywork-OR1, He et al. 2025, arXiv 2505.22312, section 3.3).

        coef <- max(coef + step_size sign(target - entropy), 0)

    The coefficient acts only while the entropy is at most the target (`entropy_bonus_coef`). An entropy that
    is not finite leaves it as it was. The paper sets no lower bound; below 0 it would push the entropy down.

    Args:
      coef: the coefficient in use, 0 at first.
      entropy: measured entropy of the policy, in nats a token.
      target: the entropy to hold, in nats a token; 0.2 in the paper.
      step_size: what the coefficient moves by; 0.005 in the paper.

    Returns:
      The next coefficient.
    """
    coef, entropy = jnp.asarray(coef), jnp.asarray(entropy)
    moved = jnp.maximum(coef + step_size * jnp.sign(target - entropy), 0)
    return jnp.where(jnp.isfinite(entropy), moved, coef).astype(coef.dtype)


def entropy_bonus_coef(coef: Scalar, entropy: Scalar, *, target: Scalar) -> Float[Array, ""]:
    """Entropy coefficient in use: the coefficient while the entropy is at most the target, else 0."""
    return jnp.where(jnp.asarray(entropy) <= target, coef, 0)
