"""Preference losses without a reference policy: ORPO, CPO, SimPO, AlphaPO.

Notation and shared arguments: `rlhf_jax.losses.pair_logps`; lbar_c = log p(y_c) / len_c. Where a loss adds
the negative log-likelihood of the chosen response, `nll` is a metric of its own.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.pair_logps import (
    PairLogps,
    pair_loss_traits,
    paired,
    per_token,
    policy_logps,
    power_score,
    row_values,
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


@pair_loss_traits(uses_plain_logps=True)
def orpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    nll_weight: Scalar = 1.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Odds ratio preference optimization (ORPO, Hong et al. 2024, eqs. 6 and 7).

        w (-lbar_c) - b log s(log odds(lbar_c) - log odds(lbar_r)),    odds(l) = exp(l) / (1 - exp(l))

    The likelihood term is the mean over responses of their per-token means; TRL's is the mean over all
    tokens of the batch, prompts included.

    Args:
      beta: weight b of the odds ratio (the paper's lambda).
      nll_weight: weight w of the likelihood of the chosen response.
    Returns:
      (loss, metrics), with b lbar as rewards and the mean `log_odds_ratio`.
    """
    chosen, rejected, mean = policy_logps("orpo_loss", pairs, mask, weights, denominator)
    chosen, rejected = per_token("orpo_loss", pairs, chosen, rejected)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    losses = -nll_weight * chosen - beta * jax.nn.log_sigmoid(log_odds_ratio)
    extra = {"nll": -chosen, "log_odds_ratio": log_odds_ratio}
    return paired(losses, beta * chosen, beta * rejected, mean, **extra)


@pair_loss_traits(uses_plain_logps=True)
def cpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    nll_weight: Scalar | Float[Array, "B"] = 1.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Contrastive preference optimization (CPO, Xu et al. 2024).

        -(1 - e) log s(x) - e log s(-x) - w log p(y_c),    x = b (log p(y_c) - log p(y_r))

    DPO with a uniform reference, plus the likelihood of the chosen response.

    Args:
      beta: scale b of the log-probabilities.
      label_smoothing: probability e that a label is flipped.
      nll_weight: weight w of the chosen response's negative log-likelihood, which is a sum over its
        tokens as in the paper; one weight per pair, such as 1 / chosen_length, makes it per token.
    """
    chosen, rejected, mean = policy_logps("cpo_loss", pairs, mask, weights, denominator)
    nll_weight = row_values("cpo_loss", "nll_weight", nll_weight, chosen, mask)
    losses = smoothed_logistic(beta * (chosen - rejected), label_smoothing) - nll_weight * chosen
    return paired(losses, beta * chosen, beta * rejected, mean, nll=-chosen)


@pair_loss_traits(uses_plain_logps=True)
def simpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    label_smoothing: Scalar = 0.0,
    nll_weight: Scalar = 0.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Simple preference optimization (SimPO, Meng et al. 2024, eq. 6).

        -(1 - e) log s(x) - e log s(-x) - w lbar_c,    x = b (lbar_c - lbar_r) - g

    The paper has e = w = 0; w > 0 is CPO-SimPO. Its gamma is g here; TRL's `simpo_gamma` is the same number.

    Args:
      beta: scale b of the log-probabilities per token.
      gamma: margin g by which the chosen reward must lead.
      label_smoothing: probability e that a label is flipped.
      nll_weight: weight w of the chosen response's negative log-likelihood per token.
    """
    chosen, rejected, mean = policy_logps("simpo_loss", pairs, mask, weights, denominator)
    chosen, rejected = per_token("simpo_loss", pairs, chosen, rejected)
    losses = smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing) - nll_weight * chosen
    return paired(losses, beta * chosen, beta * rejected, mean, nll=-chosen)


@pair_loss_traits(uses_plain_logps=True)
def alpha_po_loss(
    pairs: PairLogps,
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
      beta: scale b of the rewards.
      gamma: margin g by which the chosen reward must lead.
      alpha: shape a of the reward; positive values punish unlikely responses more.
    """
    chosen, rejected, mean = policy_logps("alpha_po_loss", pairs, mask, weights, denominator)
    chosen, rejected = per_token("alpha_po_loss", pairs, chosen, rejected)
    chosen, rejected = beta * power_score(chosen, alpha), beta * power_score(rejected, alpha)
    losses = -jax.nn.log_sigmoid(chosen - rejected - gamma)
    return paired(losses, chosen, rejected, mean)
