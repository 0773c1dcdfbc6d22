"""Evaluation on episodes of its own: whole, unshaped, and never those the agent learned from."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Int, PRNGKeyArray
from rlhf_jax.rl.environments import Environment
from rlhf_jax.rl.runs import Run


def evaluate(
    run: Run,
    state: Any,
    env: Environment,
    env_params: Any,
    key: PRNGKeyArray,
    *,
    episodes: int,
    deterministic: bool,
) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    """Undiscounted returns and lengths of `episodes` whole episodes.

    Args:
      deterministic: take the likeliest action rather than a sample.

    Returns:
      (returns, lengths); every episode counts once, however long it took.
    """
    reset_key, key = jax.random.split(key)
    states = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, episodes), env_params)

    def step(carry: tuple[Any, Any, Array, Array, Array], key: PRNGKeyArray):
        states, memory, alive, returns, lengths = carry
        act_key, env_key = jax.random.split(key)
        starts = states.episode_length == 0
        action, memory = run.act(state, states.obs, starts, memory, act_key, deterministic=deterministic)
        keys = jax.random.split(env_key, episodes)
        # Nothing is needed after the end, so an episode may "begin again" anywhere, at no cost.
        states, seen = jax.vmap(env.step_or_become, (0, 0, 0, None, 0))(
            keys, states, action, env_params, states
        )
        returns, lengths = returns + jnp.where(alive, seen.reward, 0), lengths + alive
        return (states, memory, alive & ~seen.done, returns, lengths), None

    carry = (states, run.begin(episodes), jnp.ones(episodes, bool), jnp.zeros(episodes))
    carry = (*carry, jnp.zeros(episodes, jnp.int32))
    (*_, returns, lengths), _ = jax.lax.scan(step, carry, jax.random.split(key, env.max_steps))
    return returns, lengths
