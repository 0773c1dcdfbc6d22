"""Returns from trajectories of another policy: V-trace and Retrace.

Conventions are those of `returns`: [B, T], masked steps skipped, results without gradient. `log_rhos`
holds log pi(a_t) - log mu(a_t), with pi the policy to be evaluated and mu the one that acted.
"""

import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Scalar
from rlhf_jax.kernels.prepare import cleaned_constant, constant
from rlhf_jax.kernels.recurrence import following_unmasked, next_unmasked
from rlhf_jax.kernels.returns import DISCOUNTS_HINT


@pytree_dataclass
class VTrace:
    """V-trace targets and advantages; no gradient, 0 where masked.

    Attributes:
      targets: vs_t, to be regressed on by the value function.
      advantages: of the policy gradient, already weighted by the clipped ratio.
    """

    targets: Float[Array, "B T"]
    advantages: Float[Array, "B T"]


def _clipped_ratio(log_rhos: Float[Array, "B T"], bound: Scalar) -> Float[Array, "B T"]:
    """min(bound, exp(log_rho)) without overflow."""
    return jnp.exp(jnp.minimum(log_rhos, jnp.log(bound)))


def vtrace(
    log_rhos: Float[Array, "B T"],
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    lambda_: Scalar = 1.0,
    clip_rho: Scalar = 1.0,
    clip_c: Scalar = 1.0,
    clip_pg_rho: Scalar = 1.0,
) -> VTrace:
    """V-trace targets and advantages (Espeholt et al. 2018, eq. 1 and section 4.2).

        rho_t   = min(clip_rho, pi/mu),  c_t = lambda min(clip_c, pi/mu)
        delta_t = rho_t (r_t + gamma_t V(s_{t+1}) - V(s_t))
        vs_t    = V(s_t) + delta_t + gamma_t c_t (vs_{t+1} - V(s_{t+1}))
        A_t     = min(clip_pg_rho, pi/mu) (r_t + gamma_t [lambda vs_{t+1} + (1 - lambda) V(s_{t+1})] - V(s_t))

    On policy the targets are TD(lambda) returns and the advantages GAE(lambda). The paper's advantage has
    vs_{t+1} alone, which differs for lambda < 1 only; after the last step both are the bootstrap value.

    Args:
      log_rhos: log pi(a_t) - log mu(a_t), in nats.
      rewards: r_t, received for the action at t.
      values: V(s_t).
      discounts: gamma_t; 0 where the episode terminates at t.
      bootstrap_value: V of the state after the last unmasked step.
      mask: steps that count.
      lambda_: trades bias for variance as in TD(lambda).
      clip_rho: rho bar, which sets the policy whose value is estimated.
      clip_c: c bar, which sets how fast it is reached.
      clip_pg_rho: bound of the advantages' ratio.
    """
    log_rhos, rewards, values, discounts, mask, bootstrap_value = check_shapes(
        "vtrace",
        log_rhos=(log_rhos, "B T"),
        rewards=(rewards, "B T"),
        values=(values, "B T"),
        discounts=(discounts, "B T", DISCOUNTS_HINT),
        mask=(mask, "B T"),
        bootstrap_value=(bootstrap_value, "B"),
    )
    log_rhos, rewards, values, discounts = (
        cleaned_constant(x, mask) for x in (log_rhos, rewards, values, discounts)
    )
    last = constant(bootstrap_value).astype(values.dtype)
    following = next_unmasked(values, last, mask)
    deltas = _clipped_ratio(log_rhos, clip_rho) * (rewards + discounts * following - values)
    traces = discounts * lambda_ * _clipped_ratio(log_rhos, clip_c)
    # vs - V at the next step
    correction = following_unmasked(traces, deltas, jnp.zeros_like(last), mask)
    targets = values + deltas + traces * correction
    bootstraps = following + lambda_ * correction
    advantages = _clipped_ratio(log_rhos, clip_pg_rho) * (rewards + discounts * bootstraps - values)
    return VTrace(targets=clean(targets, mask), advantages=clean(advantages, mask))


def retrace(
    log_rhos: Float[Array, "B T"],
    rewards: Float[Array, "B T"],
    q_values: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    lambda_: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """Retrace(lambda) targets of action values (Munos et al. 2016, eq. 3, c_t = lambda min(1, pi/mu)).

        Q^ret_t = r_t + gamma_t (V(s_{t+1}) + c_{t+1} [Q^ret_{t+1} - Q(s_{t+1}, a_{t+1})])

    Args:
      log_rhos: log pi(a_t) - log mu(a_t), in nats.
      rewards: r_t, received for the action at t.
      q_values: Q(s_t, a_t) of the action taken.
      values: E_{a ~ pi} Q(s_t, a).
      discounts: gamma_t; 0 where the episode terminates at t.
      bootstrap_value: E_{a ~ pi} Q(s, a) of the state after the last unmasked step.
      mask: steps that count.
      lambda_: 0 is the one-step (expected SARSA) target.

    Returns:
      Targets for `q_values`, 0 where masked; no gradient.
    """
    log_rhos, rewards, q_values, values, discounts, mask, bootstrap_value = check_shapes(
        "retrace",
        log_rhos=(log_rhos, "B T"),
        rewards=(rewards, "B T"),
        q_values=(q_values, "B T"),
        values=(values, "B T"),
        discounts=(discounts, "B T", DISCOUNTS_HINT),
        mask=(mask, "B T"),
        bootstrap_value=(bootstrap_value, "B"),
    )
    log_rhos, rewards, q_values, values, discounts = (
        cleaned_constant(x, mask) for x in (log_rhos, rewards, q_values, values, discounts)
    )
    last = constant(bootstrap_value).astype(values.dtype)
    traces = lambda_ * _clipped_ratio(log_rhos, 1.0)
    # Q^ret_t = r_t + gamma_t x_{t+1} with x_t = V(s_t) + c_t (Q^ret_t - Q_t)
    offsets = values + traces * (rewards - q_values)
    return rewards + discounts * following_unmasked(traces * discounts, offsets, last, mask)
