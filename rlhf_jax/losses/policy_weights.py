"""Weights of single tokens in a policy-gradient loss: which are kept, and how much they count.

Each function returns [B, T] for `grpo_loss(weights=...)`; several multiply. They carry no gradient and
do not change the denominator. Those that look at the whole batch are to be computed before it is split
into micro-batches.
"""

import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.numerics import bounded_exp
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar
from rlhf_jax.kernels.prepare import cleaned_constant
from rlhf_jax.losses.policy_ratios import RatioFn, sequence_average, token_log_ratio


def top_entropy_mask(
    entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], *, fraction: Scalar = 0.2
) -> Bool[Array, "B T"]:
    """The tokens of highest entropy (Wang et al. 2025, "Beyond the 80/20 Rule", arXiv 2506.01939).

    Keeps entropy >= its (1 - fraction)-quantile, interpolated linearly, over the batch's unmasked tokens.

    Args:
      entropy: of the policy at each token, in nats.
      mask: tokens that count.
      fraction: share to keep, in (0, 1].
    """
    entropy, mask = check_shapes("top_entropy_mask", entropy=(entropy, "B T"), mask=(mask, "B T"))
    entropy = cleaned_constant(entropy, mask)
    ordered = jnp.sort(jnp.where(mask, entropy, jnp.inf), axis=None)
    position = (1 - fraction) * jnp.maximum(jnp.sum(mask) - 1, 0)
    below = jnp.floor(position).astype(jnp.int32)
    above = jnp.ceil(position).astype(jnp.int32)
    low, high = ordered[below], ordered[above]
    # At a whole position low itself, not low + 0 x gap: ties with the threshold must not be rounded away.
    threshold = jnp.where(below == above, low, low + (position - below) * (high - low))
    return mask & (entropy >= threshold)


def off_policy_mask(
    logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    threshold: Scalar,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Drops sequences of negative advantage that have become unlikely (DeepSeek-V3.2, 2025).

        keep = A >= 0  or  (1 / |y|) sum_t [log pi_sampler(y_t) - log pi(y_t)] <= threshold

    Args:
      logp: log-probability in nats of each token under the policy.
      sampler_logp: as reported by the sampler, so that both staleness and mismatch count.
      advantages: [B, T] or [B].
      mask: tokens that count.
      threshold: in nats a token.
      segment_ids: for packed rows; None when a row is a sequence.
    """
    logp, sampler_logp, advantages, mask = check_shapes(
        "off_policy_mask",
        logp=(logp, "B T"),
        sampler_logp=(sampler_logp, "B T"),
        advantages=(advantages, "B T|B"),
        mask=(mask, "B T"),
    )
    drift = sequence_average(
        cleaned_constant(sampler_logp, mask) - cleaned_constant(logp, mask), mask, segment_ids
    )
    return mask & ((cleaned_constant(advantages, mask) >= 0) | (drift <= threshold))


def _sampler_ratio(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    ratio_fn: RatioFn,
) -> Float[Array, "B T"]:
    return bounded_exp(ratio_fn(cleaned_constant(old_logp, mask), cleaned_constant(sampler_logp, mask), mask))


def truncated_importance_weights(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: Scalar = 0.0,
    high: Scalar = 2.0,
    ratio_fn: RatioFn = token_log_ratio,
) -> Float[Array, "B T"]:
    """Truncated importance sampling (TIS) weights: clip(pi_old / pi_sampler, low, high).

    They correct for a sampler whose numbers differ from the trainer's (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training").

    Args:
      old_logp: log-probability in nats under the policy that sampled, computed by the trainer.
      sampler_logp: the same as the sampler reported it.
      mask: tokens that count.
      low: least weight.
      high: largest weight.
      ratio_fn: `token_log_ratio`, or `sequence_total_log_ratio` for one weight a sequence.

    Returns:
      Weights, 0 where masked; no gradient.
    """
    old_logp, sampler_logp, mask = check_shapes(
        "truncated_importance_weights",
        old_logp=(old_logp, "B T"),
        sampler_logp=(sampler_logp, "B T"),
        mask=(mask, "B T"),
    )
    return clean(jnp.clip(_sampler_ratio(old_logp, sampler_logp, mask, ratio_fn), low, high), mask)


def masked_importance_weights(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: Scalar = 0.0,
    high: Scalar = 2.0,
    ratio_fn: RatioFn = token_log_ratio,
) -> Float[Array, "B T"]:
    """Masked importance sampling (MIS) weights: pi_old / pi_sampler within [low, high], 0 elsewhere.

    Outliers are dropped, not truncated, as by TRL's `token_mask` and `sequence_mask`.

    Args:
      old_logp: log-probability in nats under the policy that sampled, computed by the trainer.
      sampler_logp: the same as the sampler reported it.
      mask: tokens that count.
      low: least ratio kept.
      high: largest ratio kept.
      ratio_fn: `token_log_ratio`, or `sequence_total_log_ratio` for one weight a sequence.

    Returns:
      Weights, 0 where masked; no gradient.
    """
    old_logp, sampler_logp, mask = check_shapes(
        "masked_importance_weights",
        old_logp=(old_logp, "B T"),
        sampler_logp=(sampler_logp, "B T"),
        mask=(mask, "B T"),
    )
    ratio = _sampler_ratio(old_logp, sampler_logp, mask, ratio_fn)
    return clean(jnp.where((ratio >= low) & (ratio <= high), ratio, 0), mask)
