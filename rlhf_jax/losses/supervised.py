"""Supervised losses on the log-probabilities of given tokens."""

import jax

from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.preference_common import full_precision
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
    loss = reduce(-full_precision(logp), mask, denominator=denominator)
    return loss, {"loss": jax.lax.stop_gradient(loss)}
