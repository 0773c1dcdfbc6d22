"""Preference losses on responses sampled during training.

Notation and shared arguments: `rlhf_jax.losses.preference`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.preference_common import clean_rows, paired, row_mean


def xpo_loss(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    chosen_from_ref: Bool[Array, "B"],
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 1e-5,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Exploratory preference optimisation (XPO, Xie et al. 2024, algorithm 1): DPO with optimism.

        -log s(b D) + a log p(y~),    y~ ~ p_ref

    One response of each pair was sampled from the policy, the other, y~, from the reference; its
    log-probability is pushed down, towards what neither data nor reference has shown.

    Args:
      chosen_from_ref: pairs whose chosen response is y~ (in the others the rejected one is).
      beta: strength b of the KL constraint, per nat.
      alpha: weight a of the exploration bonus.
    Returns:
      (loss, metrics), with the mean `exploration_logp` log p(y~).
    """
    mask, (policy_chosen, policy_rejected, ref_chosen, ref_rejected) = clean_rows(
        mask, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    exploration = jnp.where(chosen_from_ref, policy_chosen, policy_rejected)
    mean = row_mean(mask, weights, denominator)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected)) + alpha * exploration
    return paired(losses, beta * chosen, beta * rejected, mean, exploration_logp=exploration)


def nash_md_loss(
    policy_logp: Float[Array, "B"],
    ref_logp: Float[Array, "B"],
    preference: Float[Array, "B"],
    *,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Nash-MD's policy gradient (Munos et al. 2023): win against the policy's mixture with the reference.

        -[P(y beats y') - 1/2 - b z] log p(y),    z = log p(y) - log p_ref(y)

    y is sampled from the policy, y' from the mixture; the bracket has no gradient, so the loss is a
    surrogate: its gradient counts, its value does not. TRL multiplies z and log p token by token before
    summing, which leaves out the effect of a token on the KL of later ones; here both are of the sequence.

    Args:
      policy_logp: log-probability in nats of y, summed over its tokens.
      ref_logp: the reference's.
      preference: probability in [0, 1] that y is preferred to y'.
      beta: strength b of the KL constraint (the paper's tau), per nat.
    Returns:
      (loss, metrics), with the mean `preference` and `kl` z.
    """
    mask, (policy, ref, preference) = clean_rows(mask, policy_logp, ref_logp, preference)
    kl = policy - ref
    score = jax.lax.stop_gradient(preference - 0.5 - beta * kl)
    losses = -score * policy
    mean = row_mean(mask, None, denominator)
    rows = {"loss": losses, "preference": preference, "kl": kl}
    return mean(losses), {name: mean(jax.lax.stop_gradient(row)) for name, row in rows.items()}
