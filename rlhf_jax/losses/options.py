"""Losses of options that are learned (Bacon et al. 2017)."""

from jax import lax

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, cleaned_constant
from rlhf_jax.losses.reductions import Reduction, token_mean


def termination_loss(
    terminations: Float[Array, "B T"],
    option_advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    deliberation_cost: Scalar = 0.0,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Termination gradient (Bacon et al. 2017, Theorem 2), with deliberation cost (A2OC, Harb et al. 2018).

        loss_t = beta_o(s_{t+1}) (A(s_{t+1}, o) + eta),  A(s, o) = Q(s, o) - V(s)

    for the option o that took the step to s_{t+1}: it is to end where others are better by more than eta.

    Args:
      terminations: beta, the chance that the option ends on arrival; it alone carries gradient.
      option_advantages: A, in units of reward.
      mask: steps that count: not those that ended the episode, after which no option goes on.
      deliberation_cost: eta, what it costs to choose an option; in units of reward.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `termination_loss`, `termination` (mean beta), `option_advantage`.
    """
    terminations, option_advantages, mask = check_shapes(
        "termination_loss",
        terminations=(terminations, "B T"),
        option_advantages=(option_advantages, "B T"),
        mask=(mask, "B T"),
    )
    terminations, advantages = cleaned(terminations, mask), cleaned_constant(option_advantages, mask)
    per_step = {
        "termination_loss": terminations * (advantages + deliberation_cost),
        "termination": terminations,
        "option_advantage": advantages,
    }
    loss = reduce(per_step["termination_loss"], mask, denominator=denominator)
    metrics = {name: reduce(x, mask, denominator=denominator) for name, x in per_step.items()}
    return loss, lax.stop_gradient(metrics)
