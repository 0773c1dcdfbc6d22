"""The DPO family as `loss_fn` of `preference.Config`: each loss with its part of the pairs.

A loss's own options are set with `functools.partial`: `partial(simpo, gamma=0.5)`.
"""

from collections.abc import Callable
from typing import Any

from rlhf_jax.algorithms.preference import PairLogps, PairLossFn, dpo
from rlhf_jax.core.types import Scalar
from rlhf_jax.losses import preference as losses

__all__ = ["against_reference", "dpo", "length_aware", "reference_free"]


def against_reference(loss_fn: Callable[..., Any]) -> PairLossFn:
    """For losses of log-ratios: DPO, robust, hinge, EXO, NCA, BCO on pairs, SPPO, AOT, APO, DiscoPOP."""

    def of_pairs(pairs: PairLogps, /, **options: Any) -> Any:
        policy = pairs.policy_chosen, pairs.policy_rejected
        return loss_fn(*policy, pairs.ref_chosen, pairs.ref_rejected, **options)

    return of_pairs


def length_aware(loss_fn: Callable[..., Any]) -> PairLossFn:
    """For losses of log-ratios a token: IPO, length-normalised DPO."""

    def of_pairs(pairs: PairLogps, /, **options: Any) -> Any:
        policy, ref = (pairs.policy_chosen, pairs.policy_rejected), (pairs.ref_chosen, pairs.ref_rejected)
        return loss_fn(*policy, *ref, pairs.chosen_length, pairs.rejected_length, **options)

    return of_pairs


def reference_free(loss_fn: Callable[..., Any]) -> PairLossFn:
    """For losses of the policy's log-probs and the lengths: ORPO, SimPO, AlphaPO."""

    def of_pairs(pairs: PairLogps, /, **options: Any) -> Any:
        policy = pairs.policy_chosen, pairs.policy_rejected
        return loss_fn(*policy, pairs.chosen_length, pairs.rejected_length, **options)

    return of_pairs


def cpo(pairs: PairLogps, /, **options: Any) -> Any:
    """`losses.preference.cpo_loss`, which knows neither a reference nor lengths."""
    return losses.cpo_loss(pairs.policy_chosen, pairs.policy_rejected, **options)


def xpo(pairs: PairLogps, /, *, alpha: Scalar = 1e-5, **options: Any) -> Any:
    """`losses.preference.xpo_loss`, for pairs of which one response was sampled from the reference."""
    if pairs.chosen_from_ref is None:
        raise ValueError("XPO needs to know which response the reference wrote: set Batch.chosen_from_ref")
    policy, ref = (pairs.policy_chosen, pairs.policy_rejected), (pairs.ref_chosen, pairs.ref_rejected)
    return losses.xpo_loss(*policy, *ref, pairs.chosen_from_ref, alpha=alpha, **options)


robust = against_reference(losses.robust_dpo_loss)
hinge = against_reference(losses.hinge_loss)
exo = against_reference(losses.exo_loss)
nca = against_reference(losses.nca_loss)
bco_pair = against_reference(losses.bco_pair_loss)
sppo = against_reference(losses.sppo_loss)
aot = against_reference(losses.aot_loss)
aot_unpaired = against_reference(losses.aot_unpaired_loss)
apo_zero = against_reference(losses.apo_zero_loss)
apo_down = against_reference(losses.apo_down_loss)
discopop = against_reference(losses.discopop_loss)
ipo = length_aware(losses.ipo_loss)
length_normalised = length_aware(losses.length_normalised_dpo_loss)
orpo = reference_free(losses.orpo_loss)
simpo = reference_free(losses.simpo_loss)
alpha_po = reference_free(losses.alpha_po_loss)
