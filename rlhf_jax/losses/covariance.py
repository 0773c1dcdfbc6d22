"""Tokens by the covariance of log-probability and advantage, which drives the policy's entropy down.

Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (arXiv
2505.22617): the entropy falls with the covariance of log-probs and advantages, and a few tokens
make up most of it. Clip-Cov takes some of them out of the update, KL-Cov holds them to where they were.

Both sets are of the whole batch: choose them before it is split. The paper takes the policy at each
mini-batch, which is the same in the first one.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from rlhf_jax.kernels.prepare import cleaned_constant


def token_covariance(
    logp: Float[Array, "B T"], advantages: Float[Array, "..."], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Each token's share of the covariance of log-probability and advantage (arXiv 2505.22617).

        Cov_t = (log pi(y_t) - mean log pi) (A_t - mean A)

    Args:
      logp: log-probability in nats of each token under the policy at the start of the update.
      advantages: [B, T] or [B].
      mask: tokens that count, over which the means are.

    Returns:
      Covariances, 0 where masked; no gradient. Their mean is that of the batch.
    """
    logp, advantages, mask = check_shapes(
        "token_covariance", logp=(logp, "B T"), advantages=(advantages, "B T|B"), mask=(mask, "B T")
    )
    logp, advantages = cleaned_constant(logp, mask), cleaned_constant(advantages, mask)
    return clean((logp - masked_mean(logp, mask)) * (advantages - masked_mean(advantages, mask)), mask)


def _first(
    order_by: Float[Array, "B T"], mask: Bool[Array, "B T"], count: Int[Array, ""]
) -> Bool[Array, "B T"]:
    """The `count` unmasked entries of smallest value; of equals the first."""
    order = jnp.argsort(clean(order_by, mask, jnp.inf).reshape(-1), stable=True)
    place = jnp.argsort(order).reshape(mask.shape)
    return mask & (place < count)


def _count(fraction: Scalar, mask: Bool[Array, "B T"]) -> Int[Array, ""]:
    """A share of the tokens, rounded down, but one at least, as in the authors' code."""
    # Rounding in float32 must not take a token away.
    share = jnp.floor(fraction * jnp.sum(mask) + 1e-4)
    return jnp.maximum(share, 1).astype(jnp.int32)


def clip_cov_mask(
    logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    key: PRNGKeyArray,
    *,
    fraction: Scalar = 2e-4,
    low: Scalar = 1.0,
    high: Scalar = 5.0,
) -> Bool[Array, "B T"]:
    """Clip-Cov: a random few of the tokens whose covariance is high have no gradient (arXiv 2505.22617).

    Drawn uniformly among those with low <= Cov_t <= high are `fraction` of all tokens, one at least.

    Args:
      logp: log-probability in nats of each token under the policy at the start of the update.
      advantages: [B, T] or [B].
      mask: tokens that count.
      key: decides the draw.
      fraction: share of the batch's tokens that is detached.
      low: least covariance of a token that may be.
      high: largest one.

    Returns:
      Tokens that keep their gradient.
    """
    covariance = token_covariance(logp, advantages, mask)
    within = mask & (covariance >= low) & (covariance <= high)
    noise = jax.random.uniform(key, mask.shape, covariance.dtype)
    return mask & ~_first(noise, within, _count(fraction, mask))


def kl_cov_mask(
    logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    fraction: Scalar = 2e-3,
) -> Bool[Array, "B T"]:
    """KL-Cov: the tokens of highest covariance, which a KL holds to the old policy (arXiv 2505.22617).

    Args:
      logp: log-probability in nats of each token under the policy at the start of the update.
      advantages: [B, T] or [B].
      mask: tokens that count.
      fraction: share of the batch's tokens, one at least.

    Returns:
      Tokens that are held; give them to `grpo_loss` as `old_kl_mask`.
    """
    return _first(-token_covariance(logp, advantages, mask), mask, _count(fraction, mask))
