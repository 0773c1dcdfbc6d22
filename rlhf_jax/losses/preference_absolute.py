"""Losses that move the two log-ratios of a pair separately, or compare whole batches of them.

Notation and shared arguments: `rlhf_jax.losses.preference`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.preference_common import clean_rows, log_ratios, paired, row_mean, smoothed_logistic


def nca_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
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
    chosen, rejected, mean = log_ratios(
        policy_chosen_logp,
        policy_rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        mask,
        weights,
        denominator,
    )
    chosen, rejected = beta * chosen, beta * rejected
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    losses = -jax.nn.log_sigmoid(chosen) - 0.5 * noise
    return paired(losses, chosen, rejected, mean)


def bco_pair_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Binary classifier optimisation on pairs, without reward shift (BCO, Jung et al. 2024).

        -log s(b c) - log s(-b r)

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios(
        policy_chosen_logp,
        policy_rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        mask,
        weights,
        denominator,
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)
    return paired(losses, chosen, rejected, mean)


def sppo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Self-play preference optimisation with hard labels (SPPO, Wu et al. 2024, eq. 4.7 with P = 1 and 0).

        (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2

    Args:
      beta: b; the paper's eta is 1 / b.
    """
    chosen, rejected, mean = log_ratios(
        policy_chosen_logp,
        policy_rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        mask,
        weights,
        denominator,
    )
    losses = (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
    return paired(losses, beta * chosen, beta * rejected, mean)


def apo_zero_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Anchored preference optimisation, zero (APO, D'Oosterlinck et al. 2024, eq. 7).

        1 - s(b c) + s(b r)

    Raises the chosen and lowers the rejected likelihood: for chosen responses better than the policy's own.

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios(
        policy_chosen_logp,
        policy_rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        mask,
        weights,
        denominator,
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
    return paired(losses, chosen, rejected, mean)


def apo_down_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Anchored preference optimisation, down (APO, D'Oosterlinck et al. 2024, eq. 8).

        s(b c) + 1 - s(b D)

    Lowers both likelihoods, the rejected one more: for chosen responses worse than the policy's own.

    Args:
      beta: scale b of the log-ratios.
    """
    chosen, rejected, mean = log_ratios(
        policy_chosen_logp,
        policy_rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        mask,
        weights,
        denominator,
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return paired(losses, chosen, rejected, mean)


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


def aot_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
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
    mask, (policy_chosen, policy_rejected, ref_chosen, ref_rejected) = clean_rows(
        mask, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    margins, ref_margins = policy_chosen - policy_rejected, ref_chosen - ref_rejected
    loss = _quantile_loss(margins, ref_margins, mask, denominator, beta, label_smoothing)
    mean = row_mean(mask, None, denominator)
    _, metrics = paired(jnp.zeros_like(chosen), beta * chosen, beta * rejected, mean)
    return loss, metrics | {"loss": jax.lax.stop_gradient(loss)}


def aot_unpaired_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
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
    mask, (policy_chosen, policy_rejected, ref_chosen, ref_rejected) = clean_rows(
        mask, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = _quantile_loss(chosen, rejected, mask, denominator, beta, label_smoothing)
    mean = row_mean(mask, None, denominator)
    _, metrics = paired(jnp.zeros_like(chosen), beta * chosen, beta * rejected, mean)
    return loss, metrics | {"loss": jax.lax.stop_gradient(loss)}
