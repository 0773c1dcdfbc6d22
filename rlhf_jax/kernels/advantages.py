"""Advantages of whole completions from the rewards of their group: no value function.

Rewards are [N, G]: N prompts with G completions each. `mask` marks the completions that count (all,
when it is None); the others may hold anything and get advantage 0. A group with fewer than two
completions that count has nothing to compare with and gets 0.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.types import Array, Bool, Float, Scalar

ScaleFn: TypeAlias = Callable[[Float[Array, "N G"], Bool[Array, "N G"]], Float[Array, "N 1"]]


def _prepare(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None
) -> tuple[Float[Array, "N G"], Bool[Array, "N G"]]:
    """Cleaned rewards without gradient, in at least float32, and a mask."""
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    wide = lax.stop_gradient(rewards).astype(jnp.promote_types(rewards.dtype, jnp.float32))
    return clean(wide, mask), mask


def _group_mean(values: Float[Array, "N G"], mask: Bool[Array, "N G"]) -> Float[Array, "N 1"]:
    return masked_mean(values, mask, axis=-1)[..., None]


def group_std(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"], *, epsilon: Scalar = 1e-4
) -> Float[Array, "N 1"]:
    """Scale of GRPO: each group's own standard deviation (Bessel-corrected), plus `epsilon`."""
    squares = clean(jnp.square(rewards - _group_mean(rewards, mask)), mask)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    return jnp.sqrt(jnp.sum(squares, axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)) + epsilon


def batch_std(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"], *, epsilon: Scalar = 1e-4
) -> Float[Array, "N 1"]:
    """One scale for the batch: the standard deviation of all rewards (Bessel-corrected), plus `epsilon`."""
    flat_rewards, flat_mask = rewards.reshape(1, -1), mask.reshape(1, -1)
    return jnp.broadcast_to(group_std(flat_rewards, flat_mask, epsilon=epsilon), (rewards.shape[0], 1))


def unit_scale(rewards: Float[Array, "N G"], mask: Bool[Array, "N G"]) -> Float[Array, "N 1"]:
    """No scaling (Dr. GRPO, Liu et al. 2025): hard and easy prompts weigh as their rewards do."""
    del mask
    return jnp.ones((rewards.shape[0], 1), rewards.dtype)


def group_relative_advantages(
    rewards: Float[Array, "N G"],
    mask: Bool[Array, "N G"] | None = None,
    *,
    scale_fn: ScaleFn = group_std,
) -> Float[Array, "N G"]:
    """Group-relative advantages of GRPO (Shao et al. 2024, section 4.1.2).

        A_i = (r_i - mean_j r_j) / scale

    Args:
      rewards: one reward for each completion.
      mask: completions that count.
      scale_fn: `group_std` (GRPO), `batch_std` (group mean, batch scale) or `unit_scale` (Dr. GRPO);
        any function of (rewards, mask) that returns the divisor of each group.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare(rewards, mask)
    return clean((rewards - _group_mean(rewards, mask)) / scale_fn(rewards, mask), mask)


def leave_one_out_advantages(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None = None
) -> Float[Array, "N G"]:
    """RLOO: the baseline is the mean reward of the *other* completions (Ahmadian et al. 2024, section 2.3).

        A_i = r_i - sum_{j != i} r_j / (G - 1) = (r_i - mean_j r_j) G / (G - 1)

    Args:
      rewards: one reward for each completion.
      mask: completions that count.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare(rewards, mask)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    return clean((rewards - _group_mean(rewards, mask)) * count / jnp.maximum(count - 1, 1), mask)
