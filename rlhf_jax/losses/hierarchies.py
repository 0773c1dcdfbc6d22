"""Losses of hierarchies that are learned: options' ends, and a manager's goals."""

import jax.numpy as jnp
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


def cosine_similarity(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Cosine of the angle between x and y; 0 where either is 0, gradient included."""
    square = jnp.sum(jnp.square(x), axis=-1) * jnp.sum(jnp.square(y), axis=-1)
    return jnp.sum(x * y, axis=-1) * lax.rsqrt(jnp.where(square > 0, square, jnp.inf))


def goal_loss(
    directions: Float[Array, "B T D"],
    goals: Float[Array, "B T D"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Transition policy gradient of a manager (FeUdal networks, Vezhnevets et al. 2017, section 3.2).

        loss_t = -A_t cos(s_{t+c} - s_t, g_t)

    It is REINFORCE for the states that goals lead to, were their directions von Mises-Fisher around the goal.

    Args:
      directions: s_{t+c} - s_t, where the latent state went within the goal's horizon; no gradient.
      goals: g_t.
      advantages: A_t, the manager's return minus its value; no gradient.
      mask: steps that count.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `goal_loss`, `goal_cosine`.
    """
    directions, goals, advantages, mask = check_shapes(
        "goal_loss",
        directions=(directions, "B T D"),
        goals=(goals, "B T D"),
        advantages=(advantages, "B T"),
        mask=(mask, "B T"),
    )
    directions, advantages = cleaned_constant(directions, mask), cleaned_constant(advantages, mask)
    cosine = cosine_similarity(directions, cleaned(goals, mask))
    per_step = {"goal_loss": -advantages * cosine, "goal_cosine": cosine}
    loss = reduce(per_step["goal_loss"], mask, denominator=denominator)
    metrics = {name: reduce(x, mask, denominator=denominator) for name, x in per_step.items()}
    return loss, lax.stop_gradient(metrics)
