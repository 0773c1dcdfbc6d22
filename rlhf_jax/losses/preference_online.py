"""Online preference losses, on responses sampled during training: XPO, Nash-MD.

Notation and shared arguments: `rlhf_jax.losses.pair_logps`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, mask_or_all
from rlhf_jax.losses.pair_logps import REFERENCED, PairLogps, pair_loss_traits, pair_rows, paired
from rlhf_jax.losses.reductions import row_mean


@pair_loss_traits(needs_chosen_from_ref=True, uses_plain_logps=True)
def xpo_loss(
    pairs: PairLogps,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 1e-5,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Exploratory preference optimization (XPO, Xie et al. 2024, algorithm 1): DPO with optimism.

        -log s(b D) + a log p(y~),    y~ ~ p_ref

    One response of each pair was sampled from the policy, the other, y~, from the reference; its
    log-probability is pushed down, towards what neither data nor reference has shown. `pairs.chosen_from_ref`
    says where y~ is the chosen one (in the other pairs the rejected one is).

    Args:
      beta: strength b of the KL constraint, per nat.
      alpha: weight a of the exploration bonus.
    Returns:
      (loss, metrics), with the mean `exploration_logp` log p(y~).
    """
    fields = (*REFERENCED, "chosen_from_ref")
    _, mean, rows = pair_rows("xpo_loss", pairs, fields, mask, weights, denominator)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, _ = rows
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    exploration = jnp.where(jnp.asarray(pairs.chosen_from_ref), policy_chosen, policy_rejected)
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
    policy, ref, preference, mask = check_shapes(
        "nash_md_loss",
        policy_logp=(policy_logp, "B"),
        ref_logp=(ref_logp, "B"),
        preference=(preference, "B"),
        mask=(mask, "B"),
    )
    mask = mask_or_all(mask, policy)
    policy, ref, preference = (cleaned(row, mask) for row in (policy, ref, preference))
    kl = policy - ref
    score = jax.lax.stop_gradient(preference - 0.5 - beta * kl)
    losses = -score * policy
    mean = row_mean(mask, None, denominator)
    rows = {"loss": losses, "preference": preference, "kl": kl}
    return mean(losses), {name: mean(jax.lax.stop_gradient(row)) for name, row in rows.items()}
