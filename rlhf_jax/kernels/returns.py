"""Returns and advantages along time. Every array is [B, T]; `time_major` serves [T, B].

Masked steps are skipped, not zeroed: t+1 means the next unmasked step, so padding and tool outputs
inside a trajectory are invisible, and may hold anything. `discounts` holds gamma_t, 0 where the
episode terminates at t (not where it is truncated); `bootstrap_value` is the value of the state after
the last unmasked step. Results have no gradient, are 0 where masked, and are at least float32: a
recurrence over thousands of steps in bfloat16 is noise.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean, last_unmasked_index
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar
from rlhf_jax.kernels.prepare import cleaned_constant, constant
from rlhf_jax.kernels.recurrence import following_unmasked, next_unmasked

DISCOUNTS_HINT = "give one discount for each step, 0 where an episode ends"


def _prepare(
    name: str,
    mask: Bool[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    **arrays: Float[Array, "B T"],
) -> tuple[Bool[Array, "B T"], Float[Array, " B"], list[Float[Array, "B T"]]]:
    """The mask, the bootstrap value and the cleaned arrays, all constants of one dtype.

    Raises:
      UserError: an array has another shape than [B, T], or the bootstrap value than [B].
    """
    hints = {"discounts": (DISCOUNTS_HINT,)}
    checks: dict[str, Any] = {key: (value, "B T", *hints.get(key, ())) for key, value in arrays.items()}
    *checked, mask, bootstrap_value = check_shapes(
        name, **checks, mask=(mask, "B T"), bootstrap_value=(bootstrap_value, "B")
    )
    prepared = [cleaned_constant(x, mask) for x in checked]
    return mask, constant(bootstrap_value).astype(prepared[0].dtype), prepared


def discounted_returns(
    rewards: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Discounted returns (Sutton & Barto 2018, eq. 3.9): G_t = r_t + gamma_t G_{t+1}.

    Args:
      rewards: r_t, received for the action at t.
      discounts: gamma_t; 0 where the episode terminates at t.
      bootstrap_value: return after the last unmasked step; 0 for a finished episode.
      mask: steps that count.

    Returns:
      Returns, 0 where masked; no gradient.
    """
    mask, bootstrap_value, (rewards, discounts) = _prepare(
        "discounted_returns", mask, bootstrap_value, rewards=rewards, discounts=discounts
    )
    return rewards + discounts * following_unmasked(discounts, rewards, bootstrap_value, mask)


def _lambda_returns(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    lambda_: Scalar | Float[Array, "B 1"],
) -> Float[Array, "B T"]:
    """On prepared arrays: G_t = r_t + gamma_t x_{t+1} with x_t = (1 - lambda) V(s_t) + lambda G_t."""
    offsets = (1 - lambda_) * values + lambda_ * rewards
    mixture = following_unmasked(lambda_ * discounts, offsets, bootstrap_value, mask)
    return rewards + discounts * mixture


def lambda_returns(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    lambda_: Scalar = 0.95,
) -> Float[Array, "B T"]:
    """TD(lambda) returns (Sutton & Barto 2018, section 12.1), in the recursive form.

        G_t = r_t + gamma_t [(1 - lambda) V(s_{t+1}) + lambda G_{t+1}]

    Args:
      rewards: r_t, received for the action at t.
      values: V(s_t).
      discounts: gamma_t; 0 where the episode terminates at t.
      bootstrap_value: V of the state after the last unmasked step.
      mask: steps that count.
      lambda_: 0 is the one-step target, 1 the discounted return.

    Returns:
      Returns, 0 where masked; no gradient.
    """
    mask, bootstrap_value, (rewards, values, discounts) = _prepare(
        "lambda_returns", mask, bootstrap_value, rewards=rewards, values=values, discounts=discounts
    )
    return _lambda_returns(rewards, values, discounts, bootstrap_value, mask, lambda_)


def n_step_returns(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    n: int,
) -> Float[Array, "B T"]:
    """n-step returns (Sutton & Barto 2018, eq. 7.1), as n one-step backups.

        G^(0)_t = V(s_t),  G^(k)_t = r_t + gamma_t G^(k-1)_{t+1}

    Where fewer than n steps are left, all of them and the bootstrap value are used.

    Args:
      rewards: r_t, received for the action at t.
      values: V(s_t).
      discounts: gamma_t; 0 where the episode terminates at t.
      bootstrap_value: V of the state after the last unmasked step.
      mask: steps that count.
      n: number of rewards, >= 1.

    Returns:
      Returns, 0 where masked; no gradient.
    """
    mask, bootstrap_value, (rewards, values, discounts) = _prepare(
        "n_step_returns", mask, bootstrap_value, rewards=rewards, values=values, discounts=discounts
    )

    def backup(_: Int[Array, ""], returns: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return rewards + discounts * next_unmasked(returns, bootstrap_value, mask)

    return lax.fori_loop(0, n, backup, values)


def upgo_returns(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Upgoing policy-update returns (Vinyals et al. 2019, AlphaStar, Methods).

        G_t = r_t + gamma_t (G_{t+1} if r_{t+1} + gamma_{t+1} V(s_{t+2}) >= V(s_{t+1}) else V(s_{t+1}))

    The return follows the trajectory while it does better than expected and falls back on the value
    where it does worse. Subtract V(s_t) for the advantage.

    Args:
      rewards: r_t, received for the action at t.
      values: V(s_t).
      discounts: gamma_t; 0 where the episode terminates at t.
      bootstrap_value: V of the state after the last unmasked step.
      mask: steps that count.

    Returns:
      Returns, 0 where masked; no gradient.
    """
    mask, bootstrap_value, (rewards, values, discounts) = _prepare(
        "upgo_returns", mask, bootstrap_value, rewards=rewards, values=values, discounts=discounts
    )
    following = next_unmasked(values, bootstrap_value, mask)
    went_up = rewards + discounts * following >= values
    coefficients, offsets = jnp.where(went_up, discounts, 0), jnp.where(went_up, rewards, values)
    return rewards + discounts * following_unmasked(coefficients, offsets, bootstrap_value, mask)


def generalized_advantage_estimation(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    discounts: Float[Array, "B T"],
    bootstrap_value: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    gae_lambda: Scalar | Float[Array, "B 1"] = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """GAE(lambda) advantages and lambda-returns (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma_t V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma_t lambda A_{t+1}

    Computed as the lambda-return minus the value, which takes one pass and is the same.

    Masked steps are skipped, not zeroed: t+1 is the next unmasked step, so padding and
    tool outputs inside a trajectory are invisible.

    Args:
      rewards: r_t, received for the action at t.
      values: V(s_t).
      discounts: gamma_t; 0 where the episode terminates at t (not where it is truncated).
      bootstrap_value: V of the state after the last unmasked step.
      mask: steps that count.
      gae_lambda: lambda; 0 is the one-step TD error, 1 is Monte Carlo minus the value. One number, or one
        for each row (`length_adaptive_lambda`).

    Returns:
      (advantages, returns), not whitened, 0 where masked, no gradient.
    """
    mask, bootstrap_value, (rewards, values, discounts) = _prepare(
        "generalized_advantage_estimation",
        mask,
        bootstrap_value,
        rewards=rewards,
        values=values,
        discounts=discounts,
    )
    returns = _lambda_returns(rewards, values, discounts, bootstrap_value, mask, gae_lambda)
    return returns - values, returns


def length_adaptive_lambda(mask: Bool[Array, "B T"], *, alpha: Scalar = 0.05) -> Float[Array, "B 1"]:
    """Lambda of length-adaptive GAE (VAPO, Yue et al. 2025, arXiv 2504.05118).

        lambda = 1 - 1 / (alpha l)

    The weights lambda^k of the TD errors then sum to alpha l, a constant share of the length l of the answer.
    Answers of fewer than 1 / alpha tokens get 0, the one-step TD error.

    Args:
      mask: tokens of each answer, l of them.
      alpha: the larger, the less bias and the more variance.
    """
    lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.maximum(1 - 1 / (alpha * lengths), 0.0)


def token_rewards(
    rewards: Float[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "B T"]:
    """Rewards of the tokens: the row's reward at its last unmasked token, minus a KL penalty at each.

        r_t = -kl_coef KL_t + [t is last] R        (Ouyang et al. 2022, eq. 2, a token at a time)

    Args:
      rewards: R, one for each completion; may hold anything in rows without an unmasked token.
      kl: KL of each token to the reference, usually `k1(logp, ref_logp)`.
      mask: tokens that count.
      kl_coef: beta.

    Returns:
      Rewards [B, T], 0 where masked; no gradient.
    """
    rewards, kl, mask = check_shapes(
        "token_rewards", rewards=(rewards, "B"), kl=(kl, "B T"), mask=(mask, "B T")
    )
    last = jnp.arange(mask.shape[1]) == last_unmasked_index(mask)[:, None]
    return clean(jnp.where(last, constant(rewards)[:, None], 0) - kl_coef * constant(kl), mask)
