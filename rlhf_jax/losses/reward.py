"""Losses that train reward models: pairs, rankings, and steps of a solution."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.preference_common import clean_rows, reduce_pairs


def bradley_terry_loss(
    chosen_reward: Float[Array, "B"],
    rejected_reward: Float[Array, "B"],
    *,
    margin: Scalar | Float[Array, "B"] = 0.0,
    centring: Scalar = 0.0,
    mask: Bool[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Bradley-Terry likelihood of pairs (Ouyang et al. 2022, eq. 1), with margin and centring.

        -log s(R_c - R_r - m) + k (R_c + R_r)^2

    Args:
      chosen_reward: scores R_c of the preferred responses.
      rejected_reward: scores R_r of the others.
      margin: m, by how much the preferred score must lead: one number or one per pair (Touvron et al.
        2023, Llama 2, eq. 2).
      centring: coefficient k that draws scores towards mean 0 (Eisenstein et al. 2023).
      mask: pairs that count (all by default); the others may hold NaN.
      denominator: what the sum over pairs is divided by (their number by default).
    Returns:
      (loss, metrics), with the scores, their margin (R_c - R_r, without m) and the accuracy.
    """
    margin = jnp.broadcast_to(jnp.asarray(margin, chosen_reward.dtype), chosen_reward.shape)
    mask, (chosen, rejected, margin) = clean_rows(mask, chosen_reward, rejected_reward, margin)
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2
    return reduce_pairs(losses, chosen, rejected, mask, denominator)
