"""Losses on pairs of responses against a reference policy.

Notation of the docstrings: c and r are the policy-minus-reference log-ratios of the chosen and the
rejected response, D = c - r, s the logistic function, b beta. The arguments that all functions share:

  policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp: log-probabilities in
    nats, summed over the response's tokens. The reference ones are constants of the caller: pass them
    through `stop_gradient` if they depend on what is differentiated.
  mask: pairs that count (all by default); the others may hold NaN.
  denominator: what the sum over pairs is divided by (their number by default); give the number of the
    whole batch when this is one micro-batch or shard of it.

All return `(loss, metrics)`: `loss`, the implicit rewards `chosen_reward` = b c and `rejected_reward` =
b r, their `margin` and `accuracy` (a tie counts as wrong), as means over the same pairs. All compute in
float32 at least, and stay finite in value and gradient at log-ratios of +-1e4.
"""

import jax

from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.preference_common import clean_rows, reduce_pairs

log_sigmoid = jax.nn.log_sigmoid


def dpo_loss(
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
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), with the label smoothing of cDPO.

        -(1 - e) log s(b D) - e log s(-b D)

    Args:
      beta: strength b of the KL constraint, per nat.
      label_smoothing: probability e that a label is flipped (conservative DPO, Mitchell 2023).
    Returns:
      (loss, metrics). `gradient_coefficient` is the mean of s(-b D), the weight of each pair's gradient.
    """
    mask, (policy_chosen, policy_rejected, ref_chosen, ref_rejected) = clean_rows(
        mask, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp
    )
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    logits = chosen - rejected
    losses = -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
    return reduce_pairs(
        losses, chosen, rejected, mask, denominator, gradient_coefficient=jax.nn.sigmoid(-logits)
    )
