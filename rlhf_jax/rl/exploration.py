"""Exploration: schedules and epsilon-greedy."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Int, PRNGKeyArray, Scalar


def linear_decay(step: Scalar, *, start: Scalar, end: Scalar, steps: Scalar) -> Float[Array, ""]:
    """From `start` at step 0 to `end` at step `steps`, and `end` ever after."""
    return start + (end - start) * jnp.clip(step / steps, 0, 1)


def epsilon_greedy(
    action_values: Float[Array, " A"], key: PRNGKeyArray, *, epsilon: Scalar
) -> Int[Array, ""]:
    """A random action with probability epsilon, otherwise one of the best, ties broken at random."""
    explore_key, action_key, tie_key = jax.random.split(key, 3)
    best = action_values == jnp.max(action_values)
    greedy = jax.random.categorical(tie_key, jnp.where(best, 0.0, -jnp.inf))
    anything = jax.random.randint(action_key, (), 0, len(action_values))
    return jnp.where(jax.random.uniform(explore_key) < epsilon, anything, greedy)
