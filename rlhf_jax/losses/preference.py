"""Preference losses against a frozen reference policy: DPO and its family.

Notation and shared arguments: `rlhf_jax.losses.pair_logps`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.pair_logps import (
    REFERENCED,
    PairLogps,
    log_ratios,
    pair_loss_traits,
    pair_rows,
    paired,
    per_token,
    row_values,
    smoothed_logistic,
)
from rlhf_jax.losses.reductions import row_mean


@pair_loss_traits(uses_soft_labels=True)
def dpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar | Float[Array, "B"] | None = None,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7), with the label smoothing of cDPO.

        -(1 - e) log s(b D) - e log s(-b D)

    Args:
      beta: strength b of the KL constraint, per nat.
      label_smoothing: probability e that a label is flipped (conservative DPO, Mitchell 2023): one number, or
        one per pair; None for one minus `pairs.preference`, and 0 without it.
    Returns:
      (loss, metrics). `gradient_coefficient` is the mean of s(-b D), the weight of a pair's gradient.
    """
    chosen, rejected, mean = log_ratios("dpo_loss", pairs, mask, weights, denominator)
    logits = beta * (chosen - rejected)
    if label_smoothing is None:
        label_smoothing = 0.0 if pairs.preference is None else 1 - jnp.asarray(pairs.preference)
    flipped = row_values("dpo_loss", "label_smoothing", label_smoothing, logits, mask)
    losses = smoothed_logistic(logits, flipped)
    weight = jax.nn.sigmoid(-logits)
    return paired(losses, beta * chosen, beta * rejected, mean, gradient_coefficient=weight)


def robust_dpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Robust DPO: an unbiased estimate of DPO's loss from flipped labels (Chowdhury et al. 2024).

        [-(1 - e) log s(b D) + e log s(-b D)] / (1 - 2e)

    Args:
      beta: strength b of the KL constraint, per nat.
      label_smoothing: probability e that a label is flipped, below 1/2.
    """
    chosen, rejected, mean = log_ratios("robust_dpo_loss", pairs, mask, weights, denominator)
    logits = beta * (chosen - rejected)
    kept, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    losses = (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return paired(losses, beta * chosen, beta * rejected, mean)


def hinge_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Hinge on the implicit reward margin (SLiC, Zhao et al. 2023, normalized by a reference as in RSO).

        relu(1 - b D)

    Args:
      beta: scale b of the margin, per nat; 1/b is the margin asked for.
    """
    chosen, rejected, mean = log_ratios("hinge_loss", pairs, mask, weights, denominator)
    losses = jax.nn.relu(1 - beta * (chosen - rejected))
    return paired(losses, beta * chosen, beta * rejected, mean)


def ipo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Identity preference optimization (Azar et al. 2023, eq. 17), on per-token log-ratios.

        (c / len_c - r / len_r - 1 / (2 b))^2

    The paper's equation has no lengths; its authors confirmed to the TRL project that its results are those
    of the per-token form, which is TRL's too. Lengths of one give the equation as printed.

    Args:
      beta: the paper's tau; 1 / (2 b) is the margin in nats per token that the loss pulls to.
    Returns:
      (loss, metrics), with rewards per token.
    """
    chosen, rejected, mean = log_ratios("ipo_loss", pairs, mask, weights, denominator)
    chosen, rejected = per_token("ipo_loss", pairs, chosen, rejected)
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return paired(losses, beta * chosen, beta * rejected, mean)


def exo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 1e-3,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Efficient exact optimization from preferences (EXO-pref, Ji et al. 2024, eq. 16).

        s(b D) [log s(b D) - log(1 - e)] + s(-b D) [log s(-b D) - log e]

    The reverse KL divergence between the policy's preferences and the smoothed labels.

    Args:
      beta: scale b of the log-ratios.
      label_smoothing: e in (0, 1): the divergence from hard labels (e = 0) is infinite.
    """
    chosen, rejected, mean = log_ratios("exo_loss", pairs, mask, weights, denominator)
    logits = beta * (chosen - rejected)
    flip = jnp.asarray(label_smoothing, logits.dtype)
    won = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-flip))
    lost = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(flip))
    return paired(won + lost, beta * chosen, beta * rejected, mean)


def nca_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Noise contrastive alignment on pairs (NCA, Chen et al. 2024): absolute likelihoods.

        -log s(b c) - 1/2 log s(-b c) - 1/2 log s(-b r)

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios("nca_loss", pairs, mask, weights, denominator)
    chosen, rejected = beta * chosen, beta * rejected
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    losses = -jax.nn.log_sigmoid(chosen) - 0.5 * noise
    return paired(losses, chosen, rejected, mean)


def bco_pair_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Binary classifier optimization on pairs, without reward shift (BCO, Jung et al. 2024).

        -log s(b c) - log s(-b r)

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios("bco_pair_loss", pairs, mask, weights, denominator)
    chosen, rejected = beta * chosen, beta * rejected
    losses = -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)
    return paired(losses, chosen, rejected, mean)


def sppo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Self-play preference optimization with hard labels (SPPO, Wu et al. 2024, eq. 4.7 with P = 1 and 0).

        (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2

    Args:
      beta: b; the paper's eta is 1 / b.
    """
    chosen, rejected, mean = log_ratios("sppo_loss", pairs, mask, weights, denominator)
    losses = (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
    return paired(losses, beta * chosen, beta * rejected, mean)


def _sorted_rows(values: Float[Array, "B"], mask: Bool[Array, "B"]) -> Float[Array, "B"]:
    """Ascending, masked rows last and 0."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    return clean(ordered, jnp.arange(values.shape[0]) < jnp.sum(mask))


def _quantile_loss(
    upper: Float[Array, "B"],
    lower: Float[Array, "B"],
    mask: Bool[Array, "B"],
    denominator: Scalar | None,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Float[Array, ""]:
    """Smoothed logistic loss between the k-th smallest of `upper` and of `lower`, averaged over k."""
    delta = _sorted_rows(upper, mask) - _sorted_rows(lower, mask)
    first_rows = jnp.arange(delta.shape[0]) < jnp.sum(mask)
    return row_mean(first_rows, None, denominator)(smoothed_logistic(beta * delta, label_smoothing))


@pair_loss_traits(uses_batch_sort=True, uses_plain_logps=True)
def aot_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    mask: Bool[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Alignment by optimal transport, paired (AOT, Melnyk et al. 2024): margins dominate the reference's.

        delta_k = sort(log p(y_c) - log p(y_r))_k - sort(log p_ref(y_c) - log p_ref(y_r))_k
        -(1 - e) log s(b delta_k) - e log s(-b delta_k), averaged over k

    The distribution of the policy's margins is pushed above that of the reference's, to first order.
    Sorting couples the rows: micro-batches give another loss than the whole batch, whatever the denominator,
    and there are no weights per pair. Metrics are those of the pairs as given.

    Args:
      beta: scale b of the log-ratios.
      label_smoothing: probability e that the order is the other way round.
    """
    mask, mean, rows = pair_rows("aot_loss", pairs, REFERENCED, mask, None, denominator)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = rows
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    margins, ref_margins = policy_chosen - policy_rejected, ref_chosen - ref_rejected
    loss = _quantile_loss(margins, ref_margins, mask, denominator, beta, label_smoothing)
    _, metrics = paired(jnp.zeros_like(chosen), beta * chosen, beta * rejected, mean)
    return loss, metrics | {"loss": jax.lax.stop_gradient(loss)}


@pair_loss_traits(uses_batch_sort=True)
def aot_unpaired_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    mask: Bool[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Alignment by optimal transport, unpaired (AOT, Melnyk et al. 2024): chosen ratios dominate.

        delta_k = sort(c)_k - sort(r)_k
        -(1 - e) log s(b delta_k) - e log s(-b delta_k), averaged over k

    The distribution of chosen log-ratios is pushed above that of rejected ones, to first order.
    Sorting couples the rows: micro-batches give another loss than the whole batch, whatever the denominator,
    and there are no weights per pair. Metrics are those of the pairs as given.

    Args:
      beta: scale b of the log-ratios.
      label_smoothing: probability e that the order is the other way round.
    """
    mask, mean, rows = pair_rows("aot_unpaired_loss", pairs, REFERENCED, mask, None, denominator)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = rows
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = _quantile_loss(chosen, rejected, mask, denominator, beta, label_smoothing)
    _, metrics = paired(jnp.zeros_like(chosen), beta * chosen, beta * rejected, mean)
    return loss, metrics | {"loss": jax.lax.stop_gradient(loss)}


def apo_zero_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Anchored preference optimization, zero (APO, D'Oosterlinck et al. 2024, eq. 7).

        1 - s(b c) + s(b r)

    Raises the chosen and lowers the rejected likelihood: for chosen responses better than the policy's own.

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios("apo_zero_loss", pairs, mask, weights, denominator)
    chosen, rejected = beta * chosen, beta * rejected
    losses = jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
    return paired(losses, chosen, rejected, mean)


def apo_down_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Anchored preference optimization, down (APO, D'Oosterlinck et al. 2024, eq. 8).

        s(b c) + 1 - s(b D)

    Lowers both likelihoods, the rejected one more: for chosen responses worse than the policy's own.

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios("apo_down_loss", pairs, mask, weights, denominator)
    chosen, rejected = beta * chosen, beta * rejected
    losses = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return paired(losses, chosen, rejected, mean)


def discopop_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    tau: Scalar = 0.05,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Discovered preference optimization: log-ratio modulated loss (DiscoPOP, Lu et al. 2024, eq. 5).

        (1 - m) (-log s(b D)) + m exp(-b D),    m = s(b D / tau)

    For b D -> -inf the exponential grows as m vanishes faster (tau < 1), so m exp(-b D) is computed as
    exp(log m - b D): the product of its factors would be 0 * inf.

    Args:
      beta: scale b of the log-ratios.
      tau: temperature of the mixing, below 1.
    """
    chosen, rejected, mean = log_ratios("discopop_loss", pairs, mask, weights, denominator)
    logits = beta * (chosen - rejected)
    logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-logits / tau)
    exponential = jnp.exp(jax.nn.log_sigmoid(logits / tau) - logits)
    return paired(logistic + exponential, beta * chosen, beta * rejected, mean)


def length_normalized_dpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """DPO on per-token log-ratios (Meng et al. 2024 compare with it; `sigmoid_norm` of TRL).

        -log s(b (c / len_c - r / len_r))

    Args:
      beta: scale b of the log-ratios per token.
    Returns:
      (loss, metrics), with rewards per token.
    """
    chosen, rejected, mean = log_ratios("length_normalized_dpo_loss", pairs, mask, weights, denominator)
    chosen, rejected = per_token("length_normalized_dpo_loss", pairs, chosen, rejected)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    return paired(losses, beta * chosen, beta * rejected, mean)
