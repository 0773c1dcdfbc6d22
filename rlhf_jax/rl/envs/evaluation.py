"""Whole episodes of an agent, and evaluation: unshaped, and never on those the agent learned from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops.runs import ActFn, Run, ignore_reward


def play(
    act_fn: ActFn,
    state: Any,
    carry: Any,
    env: Environment,
    env_params: Any,
    key: PRNGKeyArray,
    *,
    episodes: int,
    deterministic: bool,
    observe_reward: Callable[[Any, Array], Any] = ignore_reward,
) -> tuple[Transition, Bool[Array, "T N"]]:
    """`episodes` whole episodes side by side.

    Args:
      carry: what the agent remembers at the start of each.
      deterministic: take the likeliest action rather than a sample.
      observe_reward: what the agent makes of a reward, such as `Run.observe_reward`.

    Returns:
      (transitions [T, N], mask): the steps that took place; what lies behind an episode's end is anything.
    """
    reset_key, key = jax.random.split(key)
    states = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, episodes), env_params)

    def step(scan_state: tuple[Any, Any, Array], key: PRNGKeyArray):
        states, carry, alive = scan_state
        act_key, env_key = jax.random.split(key)
        is_first = states.episode_length == 0
        action, carry = act_fn(state, states.obs, is_first, carry, act_key, deterministic=deterministic)
        keys = jax.random.split(env_key, episodes)
        # Nothing is needed after the end, so an episode may "begin again" anywhere, at no cost.
        states, seen = jax.vmap(env.auto_reset_step, (0, 0, 0, None, 0))(
            keys, states, action, env_params, states
        )
        return (states, observe_reward(carry, seen.reward), alive & ~seen.done), (seen, alive)

    scan_state = (states, carry, jnp.ones(episodes, bool))
    return jax.lax.scan(step, scan_state, jax.random.split(key, env.max_steps))[1]


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
    seen, alive = play(
        run.act,
        state,
        run.initial_carry(episodes),
        env,
        env_params,
        key,
        episodes=episodes,
        deterministic=deterministic,
        observe_reward=run.observe_reward,
    )
    return jnp.sum(jnp.where(alive, seen.reward, 0), axis=0), jnp.sum(alive, axis=0)
