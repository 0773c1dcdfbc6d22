"""Weights of single tokens in a policy-gradient loss: which are kept, and how much they count.

Each function returns [B, T] for `grpo_loss(weights=...)`; several multiply. They carry no gradient and
do not change the denominator. Those that look at the whole batch are to be computed before it is split
into micro-batches.
"""

import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import clean, masked_quantile
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
    threshold = masked_quantile(entropy, mask, 1 - fraction)
    return mask & (entropy >= threshold)


def second_moment_mask(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    threshold: Scalar = 0.04,
) -> Bool[Array, "B T"]:
    """Drops the tokens that have drifted furthest, until the second moment is small (M2PO, Zheng et al. 2025,
    arXiv 2510.01161).

    Of the tokens that a clip would hold back (A > 0 and rho > 1, or A < 0 and rho < 1, with rho the ratio of
    policy to sampler) it keeps as many as it can, those of small |log rho| first, while

        mean (log rho)^2 <= threshold

    All other tokens stay. The bound is one of the batch: give it whole.

    Args:
      old_logp: log-probability in nats under the policy at the start of the update. The paper takes the
        policy at each mini-batch, which is the same in the first one.
      sampler_logp: as reported by the sampler.
      advantages: [B, T] or [B].
      mask: tokens that count.
      threshold: in nats squared; 0.04 in the paper.
    """
    old_logp, sampler_logp, advantages, mask = check_shapes(
        "second_moment_mask",
        old_logp=(old_logp, "B T"),
        sampler_logp=(sampler_logp, "B T"),
        advantages=(advantages, "B T|B"),
        mask=(mask, "B T"),
    )
    log_ratio = cleaned_constant(old_logp, mask) - cleaned_constant(sampler_logp, mask)
    bounded = mask & (log_ratio * cleaned_constant(advantages, mask) > 0)
    drift = jnp.where(bounded, jnp.square(log_ratio), jnp.inf).reshape(-1)
    order = jnp.argsort(drift)
    means = jnp.cumsum(drift[order]) / (1 + jnp.arange(drift.size))
    kept = jnp.zeros(drift.shape, bool).at[order].set(means <= threshold)
    return mask & (~bounded | kept.reshape(mask.shape))


def batch_mask(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    entropy: Float[Array, "B T"] | None = None,
    top_entropy_fraction: Scalar | None = None,
    second_moment_threshold: Scalar | None = None,
) -> Bool[Array, "B T"] | None:
    """The product of the masks that look at the whole batch, and so cannot wait for its mini-batches.

    Args:
      top_entropy_fraction: of `top_entropy_mask`, which needs `entropy`; None for without it.
      second_moment_threshold: of `second_moment_mask`; None for without it.

    Returns:
      Tokens that count; None where there is no mask.

    Raises:
      UserError: there is no entropy to rank tokens by.
    """
    kept = None
    if top_entropy_fraction is not None:
        if entropy is None:
            raise UserError("top_entropy_fraction needs the entropy of each token: give make_batch entropy=")
        kept = top_entropy_mask(entropy, mask, fraction=top_entropy_fraction)
    if second_moment_threshold is not None:
        near = second_moment_mask(old_logp, sampler_logp, advantages, mask, threshold=second_moment_threshold)
        kept = near if kept is None else kept & near
    return kept


def off_policy_mask(
    logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    threshold: Scalar,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Drops sequences of negative advantage that have become unlikely (DeepSeek-V3.2, 2025, eq. 9; OPSM).

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
