"""Losses of the margin between the two log-ratios of a pair.

Notation and shared arguments: `rlhf_jax.losses.preference`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.losses.preference_common import clean_rows, log_ratios, paired, per_token, smoothed_logistic


def dpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar | Float[Array, "B"] = 0.0,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), with the label smoothing of cDPO.

        -(1 - e) log s(b D) - e log s(-b D)

    Args:
      beta: strength b of the KL constraint, per nat.
      label_smoothing: probability e that a label is flipped (conservative DPO, Mitchell 2023): one number, or
        one per pair, as one minus the preference of a judge is.
    Returns:
      (loss, metrics). `gradient_coefficient` is the mean of s(-b D), the weight of a pair's gradient.
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
    logits = beta * (chosen - rejected)
    flipped = jnp.broadcast_to(jnp.asarray(label_smoothing), logits.shape)
    losses = smoothed_logistic(logits, clean_rows(mask, flipped)[1][0])
    weight = jax.nn.sigmoid(-logits)
    return paired(losses, beta * chosen, beta * rejected, mean, gradient_coefficient=weight)


def robust_dpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
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
    chosen, rejected, mean = log_ratios(
        policy_chosen_logp,
        policy_rejected_logp,
        ref_chosen_logp,
        ref_rejected_logp,
        mask,
        weights,
        denominator,
    )
    logits = beta * (chosen - rejected)
    kept, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    losses = (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return paired(losses, beta * chosen, beta * rejected, mean)


def hinge_loss(
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
    """Hinge on the implicit reward margin (SLiC, Zhao et al. 2023, normalised by a reference as in RSO).

        relu(1 - b D)

    Args:
      beta: scale b of the margin, per nat; 1/b is the margin asked for.
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
    losses = jax.nn.relu(1 - beta * (chosen - rejected))
    return paired(losses, beta * chosen, beta * rejected, mean)


def ipo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    chosen_length: Int[Array, "B"],
    rejected_length: Int[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Identity preference optimisation (Azar et al. 2023, eq. 17), on per-token log-ratios.

        (c / len_c - r / len_r - 1 / (2 b))^2

    The paper's equation has no lengths; its authors confirmed to the TRL project that its results are those
    of the per-token form. Lengths of one give the equation as printed.

    Args:
      chosen_length: number of response tokens summed in the chosen log-probabilities.
      rejected_length: the same for the rejected ones.
      beta: the paper's tau; 1 / (2 b) is the margin in nats per token that the loss pulls to.
    Returns:
      (loss, metrics), with rewards per token.
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
    chosen, rejected = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return paired(losses, beta * chosen, beta * rejected, mean)


def exo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 1e-3,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Efficient exact optimisation from preferences (EXO-pref, Ji et al. 2024, eq. 16).

        s(b D) [log s(b D) - log(1 - e)] + s(-b D) [log s(-b D) - log e]

    The reverse KL divergence between the policy's preferences and the smoothed labels.

    Args:
      beta: scale b of the log-ratios.
      label_smoothing: e in (0, 1): the divergence from hard labels (e = 0) is infinite.
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
    logits = beta * (chosen - rejected)
    flip = jnp.asarray(label_smoothing, logits.dtype)
    won = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-flip))
    lost = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(flip))
    return paired(won + lost, beta * chosen, beta * rejected, mean)


def discopop_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    tau: Scalar = 0.05,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Discovered preference optimisation: log-ratio modulated loss (DiscoPOP, Lu et al. 2024, eq. 5).

        (1 - m) (-log s(b D)) + m exp(-b D),    m = s(b D / tau)

    For b D -> -inf the exponential grows as m vanishes faster (tau < 1), so m exp(-b D) is computed as
    exp(log m - b D): the product of its factors would be 0 * inf.

    Args:
      beta: scale b of the log-ratios.
      tau: temperature of the mixing, below 1.
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
    logits = beta * (chosen - rejected)
    logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-logits / tau)
    exponential = jnp.exp(jax.nn.log_sigmoid(logits / tau) - logits)
    return paired(logistic + exponential, beta * chosen, beta * rejected, mean)


def length_normalised_dpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    chosen_length: Int[Array, "B"],
    rejected_length: Int[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """DPO on per-token log-ratios (Meng et al. 2024 compare with it; `sigmoid_norm` of TRL).

        -log s(b (c / len_c - r / len_r))

    Args:
      chosen_length: number of response tokens summed in the chosen log-probabilities.
      rejected_length: the same for the rejected ones.
      beta: scale b of the log-ratios per token.
    Returns:
      (loss, metrics), with rewards per token.
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
    chosen, rejected = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    return paired(losses, beta * chosen, beta * rejected, mean)
