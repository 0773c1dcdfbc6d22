"""Losses on pairs that need no reference policy.

Notation and shared arguments: `rlhf_jax.losses.preference`. Log-probabilities are sums over the response;
a bar means per token: lbar_c = log p(y_c) / len_c. Where a loss adds the negative log-likelihood of the
chosen response, `nll` is a metric of its own.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.losses.preference_common import (
    clean_rows,
    paired,
    per_token,
    power_score,
    row_mean,
    smoothed_logistic,
)


def _log_odds(logp: Float[Array, "B"]) -> Float[Array, "B"]:
    """log p / (1 - p) from log p < 0, without cancellation at either end."""
    # A probability of 1 has infinite odds; the cap is the nearest log-probability that tells p from 1.
    logp = jnp.minimum(logp, -jnp.finfo(logp.dtype).eps)
    near_one = logp > -0.6931472
    log1mexp = jnp.where(
        near_one,
        jnp.log(-jnp.expm1(jnp.where(near_one, logp, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logp))),
    )
    return logp - log1mexp


def orpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    chosen_length: Int[Array, "B"],
    rejected_length: Int[Array, "B"],
    *,
    beta: Scalar = 0.1,
    nll_weight: Scalar = 1.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Odds ratio preference optimisation (ORPO, Hong et al. 2024, eqs. 6 and 7).

        w (-lbar_c) - b log s(log odds(lbar_c) - log odds(lbar_r)),    odds(l) = exp(l) / (1 - exp(l))

    The likelihood term is the mean over responses of their per-token means; TRL's is the mean over all
    tokens of the batch, prompts included.

    Args:
      chosen_length: number of response tokens summed in the chosen log-probabilities.
      rejected_length: the same for the rejected ones.
      beta: weight b of the odds ratio (the paper's lambda).
      nll_weight: weight w of the likelihood of the chosen response.
    Returns:
      (loss, metrics), with b lbar as rewards and the mean `log_odds_ratio`.
    """
    mask, (chosen, rejected) = clean_rows(mask, policy_chosen_logp, policy_rejected_logp)
    chosen, rejected = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    losses = -nll_weight * chosen - beta * jax.nn.log_sigmoid(log_odds_ratio)
    mean = row_mean(mask, weights, denominator)
    extra = {"nll": -chosen, "log_odds_ratio": log_odds_ratio}
    return paired(losses, beta * chosen, beta * rejected, mean, **extra)


def cpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    nll_weight: Scalar | Float[Array, "B"] = 1.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Contrastive preference optimisation (CPO, Xu et al. 2024).

        -(1 - e) log s(x) - e log s(-x) - w log p(y_c),    x = b (log p(y_c) - log p(y_r))

    DPO with a uniform reference, plus the likelihood of the chosen response.

    Args:
      beta: scale b of the log-probabilities.
      label_smoothing: probability e that a label is flipped.
      nll_weight: weight w of the chosen response's negative log-likelihood, which is a sum over its
        tokens as in the paper; one weight per pair, such as 1 / chosen_length, makes it per token.
    """
    nll_weight = jnp.broadcast_to(jnp.asarray(nll_weight), policy_chosen_logp.shape)
    mask, (chosen, rejected, nll_weight) = clean_rows(
        mask, policy_chosen_logp, policy_rejected_logp, nll_weight
    )
    losses = smoothed_logistic(beta * (chosen - rejected), label_smoothing) - nll_weight * chosen
    mean = row_mean(mask, weights, denominator)
    return paired(losses, beta * chosen, beta * rejected, mean, nll=-chosen)


def simpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    chosen_length: Int[Array, "B"],
    rejected_length: Int[Array, "B"],
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    label_smoothing: Scalar = 0.0,
    nll_weight: Scalar = 0.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Simple preference optimisation (SimPO, Meng et al. 2024, eq. 6).

        -(1 - e) log s(x) - e log s(-x) - w lbar_c,    x = b (lbar_c - lbar_r) - g

    The paper has e = w = 0; w > 0 is CPO-SimPO. Its gamma is g here; TRL's `simpo_gamma` is the same number.

    Args:
      chosen_length: number of response tokens summed in the chosen log-probabilities.
      rejected_length: the same for the rejected ones.
      beta: scale b of the log-probabilities per token.
      gamma: margin g by which the chosen reward must lead.
      label_smoothing: probability e that a label is flipped.
      nll_weight: weight w of the chosen response's negative log-likelihood per token.
    """
    mask, (chosen, rejected) = clean_rows(mask, policy_chosen_logp, policy_rejected_logp)
    chosen, rejected = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    losses = smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing) - nll_weight * chosen
    mean = row_mean(mask, weights, denominator)
    return paired(losses, beta * chosen, beta * rejected, mean, nll=-chosen)


def alpha_po_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    chosen_length: Int[Array, "B"],
    rejected_length: Int[Array, "B"],
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    alpha: Scalar = 0.25,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """AlphaPO: SimPO with another shape of reward (Gupta et al. 2025).

        -log s(b R_c - b R_r - g),    R = (1 - exp(-a lbar)) / a

    alpha = 0 is SimPO. Above -a lbar = 30 the exponential goes on along its tangent, to stay finite.

    Args:
      chosen_length: number of response tokens summed in the chosen log-probabilities.
      rejected_length: the same for the rejected ones.
      beta: scale b of the rewards.
      gamma: margin g by which the chosen reward must lead.
      alpha: shape a of the reward; positive values punish unlikely responses more.
    """
    mask, (chosen, rejected) = clean_rows(mask, policy_chosen_logp, policy_rejected_logp)
    chosen = beta * power_score(per_token(chosen, chosen_length), alpha)
    rejected = beta * power_score(per_token(rejected, rejected_length), alpha)
    losses = -jax.nn.log_sigmoid(chosen - rejected - gamma)
    return paired(losses, chosen, rejected, row_mean(mask, weights, denominator))
