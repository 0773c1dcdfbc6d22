"""Coefficients of the GRPO family that follow what is measured: entropy bonus and KL.

They are part of the state, so that a resumed run goes on with them.
"""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.algorithms.grpo_config import Control, Hyper, State
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Float, Metrics, Scalar
from rlhf_jax.kernels.controllers import adaptive_entropy_update, adaptive_kl_update, entropy_bonus_coef


def init_control(hyper: Hyper) -> Control | None:
    """The coefficients at step 0; None where `hyper` has no target for any."""
    if hyper.target_entropy is None and hyper.kl_target is None:
        return None
    return Control(jnp.asarray(hyper.entropy_coef, jnp.float32), jnp.ones((), jnp.float32))


def control(
    state: State,
    hyper: Hyper,
    *,
    entropy: Float[Array, ""],
    kl: Float[Array, ""] | None,
    num_answers: Scalar,
) -> tuple[State, Hyper, Metrics]:
    """Coefficients of the update to come, and as they are after it.

    The entropy bonus weighs what the state holds while the entropy is at most its target, and nothing above
    it (Skywork-OR1, `kernels.adaptive_entropy_update`). The weights of the KL, in the loss and in the reward,
    move together by the controller of Ziegler et al. 2019, which PPO has too (`kernels.adaptive_kl_update`).

    Args:
      state: with `control`, where `hyper` has a target.
      entropy: of the policy on the answers, in nats a token.
      kl: to the reference, in nats an answer; None without one.
      num_answers: answers that were measured.

    Returns:
      (state, hyper, metrics); metrics are the coefficients in use.

    Raises:
      UserError: the state holds no coefficients.
    """
    if hyper.target_entropy is None and hyper.kl_target is None:
        return state, hyper, {}
    if state.control is None:
        raise UserError("target_entropy and kl_target move coefficients of the state: give init hyper=")
    held, hyper, metrics = _hold_entropy(state.control, hyper, entropy)
    held, hyper, of_kl = _hold_kl(held, hyper, kl, num_answers)
    return dataclasses.replace(state, control=held), hyper, metrics | of_kl


def _hold_entropy(held: Control, hyper: Hyper, entropy: Float[Array, ""]) -> tuple[Control, Hyper, Metrics]:
    if hyper.target_entropy is None:
        return held, hyper, {}
    target = hyper.target_entropy
    in_use = entropy_bonus_coef(held.entropy_coef, entropy, target=target)
    moved = adaptive_entropy_update(
        held.entropy_coef, entropy, target=target, step_size=hyper.entropy_coef_step
    )
    hyper = dataclasses.replace(hyper, entropy_coef=in_use)
    return dataclasses.replace(held, entropy_coef=moved), hyper, {"entropy_coef": in_use}


def _hold_kl(
    held: Control, hyper: Hyper, kl: Float[Array, ""] | None, num_answers: Scalar
) -> tuple[Control, Hyper, Metrics]:
    if hyper.kl_target is None:
        return held, hyper, {}
    if kl is None:
        raise UserError("kl_target holds the KL to a reference: give the train step a reference_fn")
    scale = held.kl_scale
    names = ("kl_coef", "reward_kl_coef", "advantage_kl_coef")
    used = {name: coef * scale for name in names if (coef := getattr(hyper, name)) is not None}
    moved = adaptive_kl_update(
        scale, kl, target=hyper.kl_target, horizon=hyper.kl_horizon, num_steps=num_answers
    )
    total = jnp.asarray(sum(used.values()))
    return dataclasses.replace(held, kl_scale=moved), dataclasses.replace(hyper, **used), {"kl_coef": total}
