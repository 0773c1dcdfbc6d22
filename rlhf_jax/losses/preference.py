"""Losses on preferences between responses: one place to import them from, and what they share.

Notation of the docstrings: c and r are the policy-minus-reference log-ratios of the chosen and the
rejected response, D = c - r, s the logistic function, b beta. Shared arguments:

  policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp: log-probabilities in
    nats, summed over the response's tokens. The reference ones are constants to the caller: pass them
    through `stop_gradient` if they depend on what is differentiated.
  mask: pairs that count (all by default); the others may hold NaN.
  weights: factor of each pair's loss and metrics (1 by default), such as `wpo_weight`.
  denominator: what the sum over pairs is divided by (their number by default); give the number of the
    whole batch when this is one micro-batch or shard of it.

All return `(loss, metrics)`. The metrics of losses on pairs are `loss`, the implicit rewards
`chosen_reward` and `rejected_reward` (b c and b r, or per token where the loss compares them so), their
`margin` and `accuracy` (a tie counts as wrong), all reduced as the loss is. All compute in float32 at
least, and stay finite in value and gradient at log-ratios of +-1e4.
"""

from rlhf_jax.losses.preference_absolute import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_loss,
    sppo_loss,
)
from rlhf_jax.losses.preference_margin import (
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    length_normalised_dpo_loss,
    robust_dpo_loss,
)
from rlhf_jax.losses.preference_modifiers import (
    alpha_divergence_score,
    forward_kl_score,
    js_score,
    length_desensitised_logp,
    weighted_sum,
    wpo_weight,
)
from rlhf_jax.losses.preference_online import nash_md_loss, xpo_loss
from rlhf_jax.losses.preference_reference_free import alpha_po_loss, cpo_loss, orpo_loss, simpo_loss
from rlhf_jax.losses.preference_unpaired import bco_loss, kto_kl, kto_loss

__all__ = [
    "alpha_divergence_score",
    "alpha_po_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_pair_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "forward_kl_score",
    "hinge_loss",
    "ipo_loss",
    "js_score",
    "kto_kl",
    "kto_loss",
    "length_desensitised_logp",
    "length_normalised_dpo_loss",
    "nash_md_loss",
    "nca_loss",
    "orpo_loss",
    "robust_dpo_loss",
    "simpo_loss",
    "sppo_loss",
    "weighted_sum",
    "wpo_weight",
    "xpo_loss",
]
