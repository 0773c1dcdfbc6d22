"""Exploration: schedules and epsilon-greedy."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar


def linear_decay(step: Scalar, *, start: Scalar, end: Scalar, steps: Scalar) -> Float[Array, ""]:
    """From `start` at step 0 to `end` at step `steps`, and `end` ever after."""
    return start + (end - start) * jnp.clip(step / steps, 0, 1)


def epsilon_greedy(
    action_values: Float[Array, " A"],
    key: PRNGKeyArray,
    *,
    epsilon: Scalar,
    available: Bool[Array, " A"] | None = None,
) -> Int[Array, ""]:
    """A random action with probability epsilon, otherwise one of the best, ties broken at random.

    Args:
      available: actions to choose among; None for all.
    """
    explore_key, action_key, tie_key = jax.random.split(key, 3)
    if available is None:
        anything = jax.random.randint(action_key, (), 0, len(action_values))
    else:
        action_values = jnp.where(available, action_values, -jnp.inf)
        anything = jax.random.categorical(action_key, jnp.where(available, 0.0, -jnp.inf))
    best = action_values == jnp.max(action_values)
    greedy = jax.random.categorical(tie_key, jnp.where(best, 0.0, -jnp.inf))
    return jnp.where(jax.random.uniform(explore_key) < epsilon, anything, greedy)
