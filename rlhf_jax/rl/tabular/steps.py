"""Sampled transitions of a decision process, and runs episode by episode, for learners from samples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass, tree_add
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray
from rlhf_jax.rl.tabular.dynamic_programming import DecisionProcess

StepFn = Callable[[Any, Any], tuple[Any, Metrics]]
"""(state, hyper) -> (state, sums): one transition; the sums count the `episodes` that ended with it."""


@pytree_dataclass
class Step:
    """One transition.

    Attributes:
      state: in which it began.
      action: taken there.
      reward: for it.
      next_state: in which it ended.
      terminated: it ended the episode.
      done: it ended the episode, or the episode was cut there.
      onwards: state in which the next one begins: `next_state`, or the start of another episode.
    """

    state: Int[Array, ""]
    action: Int[Array, ""]
    reward: Float[Array, ""]
    next_state: Int[Array, ""]
    terminated: Bool[Array, ""]
    done: Bool[Array, ""]
    onwards: Int[Array, ""]


TakeFn = Callable[[tuple[PRNGKeyArray, PRNGKeyArray], Array, Array, Array], Step]
"""((key of the transition, key of a start), state, action, steps of the episode so far) -> what happened."""


def make_take(process: DecisionProcess, *, max_episode_steps: int) -> TakeFn:
    """Transition sampler of `process`; an episode is cut, not terminated, after so many steps."""
    log_transitions, log_start = jnp.log(process.transitions), jnp.log(process.start)

    def take(keys: tuple[PRNGKeyArray, PRNGKeyArray], state: Array, action: Array, before: Array) -> Step:
        reached = jax.random.categorical(keys[0], log_transitions[state, action])
        terminated = process.terminal[reached]
        done = terminated | (before + 1 >= max_episode_steps)
        start = jax.random.categorical(keys[1], log_start)
        reward = process.rewards[state, action, reached]
        return Step(state, action, reward, reached, terminated, done, jnp.where(done, start, reached))

    return take


def draw_start(process: DecisionProcess, key: PRNGKeyArray) -> Int[Array, ""]:
    """The first state of an episode."""
    return jax.random.categorical(key, jnp.log(process.start))


def no_sums(step: StepFn, state: Any, hyper: Any) -> Metrics:
    """The sums of `step` over no transition."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, state, hyper)[1])


def whole_episodes(step: StepFn, state: Any, hyper: Any, *, episodes: int) -> tuple[Any, Metrics]:
    """(state, sums over the transitions of each episode) after so many episodes."""

    def running(carry: tuple[Any, Metrics]) -> Bool[Array, ""]:
        return carry[1]["episodes"] == 0

    def one(carry: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
        state, sums = step(carry[0], hyper)
        return state, tree_add(carry[1], sums)

    def episode(state: Any, _: None) -> tuple[Any, Metrics]:
        return jax.lax.while_loop(running, one, (state, no_sums(step, state, hyper)))

    return jax.lax.scan(episode, state, length=episodes)
