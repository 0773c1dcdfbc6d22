"""Supervised losses on the log-probabilities of given tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, cleaned_constant, full_precision
from rlhf_jax.losses.reductions import Reduction, token_mean


def cross_entropy_loss(
    logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the unmasked tokens, in nats per token under `token_mean`.

        -log p(y_t | x, y_<t)

    Args:
      logp: log-probability of each token, in nats.
      mask: tokens that count; the others may hold NaN.
      reduce: how tokens become one number.
      denominator: replaces the reduction's own, for micro-batches and shards.
    Returns:
      (loss, metrics). Perplexity is exp(loss) of the whole batch; it does not sum, so it is no metric.
    """
    logp, mask = check_shapes("cross_entropy_loss", logp=(logp, "B T"), mask=(mask, "B T"))
    loss = reduce(-full_precision(logp), mask, denominator=denominator)
    return loss, {"loss": jax.lax.stop_gradient(loss)}


def mtp_masks(
    mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], depth: int
) -> list[Bool[Array, "B T"]]:
    """Masks of multi-token prediction, for tokens foreseen k = 1 ... `depth` steps before: not those whose
    k + 1 predecessors are not all in their segment.
    """
    mask, segment_ids = check_shapes("mtp_masks", mask=(mask, "B T"), segment_ids=(segment_ids, "B T"))
    column = jnp.arange(mask.shape[1])
    return [
        mask & (column > k) & (segment_ids == jnp.roll(segment_ids, k + 1, axis=1))
        for k in range(1, depth + 1)
    ]


def mtp_loss(
    mtp_logp: Float[Array, "D B T"],
    masks: Sequence[Bool[Array, "B T"]],
    *,
    reduce: Reduction = token_mean,
    denominators: Sequence[Scalar] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Multi-token prediction: the mean over depths of each depth's cross-entropy (DeepSeek-V3 report, section
    2.2; its weight lambda is left to the caller).

        1/D sum_k reduce(-log p_k(y_t | y_<t-k))

    Args:
      mtp_logp: log-probability of each token as depth k = 1 ... D foresaw it, in nats.
      masks: tokens that count, for each depth (`mtp_masks`).
      denominators: replace the reduction's own, for micro-batches and shards; one for each depth.
    """
    totals = [None] * len(masks) if denominators is None else denominators
    losses = [
        reduce(-full_precision(logp), mask, denominator=total)
        for logp, mask, total in zip(mtp_logp, masks, totals, strict=True)
    ]
    loss = sum(losses[1:], losses[0]) / len(losses)
    return loss, {"further_loss": jax.lax.stop_gradient(loss)}


def advantage_weighted_loss(
    logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    inverse_temperature: Scalar = 1.0,
    max_weight: Scalar = 100.0,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Advantage-weighted regression (Peng et al. 2019; as in Kostrikov et al. 2022, eq. 7).

        -min(exp(beta A_t), w_max) log pi(a_t | s_t)

    beta = 0 is `cross_entropy_loss`, that is behaviour cloning; the larger beta, the more the better actions
    of a log count. It needs no log-probabilities of the policy that acted.

    Args:
      logp: log-probability in nats of each action of the log.
      advantages: A, in units of reward; without gradient.
      mask: actions that count; the others may hold NaN.
      inverse_temperature: beta, in 1 / units of reward.
      max_weight: w_max.
      reduce: how actions become one number.
      denominator: replaces the reduction's own, for micro-batches and shards.
    Returns:
      (loss, metrics): `loss`, and the mean `weight`.
    """
    logp, advantages, mask = check_shapes(
        "advantage_weighted_loss", logp=(logp, "B T"), advantages=(advantages, "B T"), mask=(mask, "B T")
    )
    advantages = cleaned_constant(advantages, mask)
    weight = jnp.minimum(jnp.exp(inverse_temperature * advantages), max_weight)
    loss = reduce(-weight * cleaned(logp, mask), mask, denominator=denominator)
    return loss, {
        "loss": jax.lax.stop_gradient(loss),
        "weight": reduce(weight, mask, denominator=denominator),
    }
