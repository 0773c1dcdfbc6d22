"""Decision processes as environments, for any agent that gymnax's environments are for: Taxi, four rooms.

Observations are the numbers of states, which networks see one-hot.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray
from rlhf_jax.rl.envs import mazes
from rlhf_jax.rl.envs.environments import Environment, adapt
from rlhf_jax.rl.envs.goals import Space
from rlhf_jax.rl.envs.taxi import taxi, taxi_tasks
from rlhf_jax.rl.tabular.dynamic_programming import DecisionProcess
from rlhf_jax.rl.tabular.task_graphs import TaskGraph, flat_tasks

NAMES = ("Taxi", "HallwayRooms")


@pytree_dataclass
class ProcessState:
    """State of a process and steps so far."""

    number: Int[Array, ""]
    time: Int[Array, ""]


@pytree_dataclass
class ProcessParams:
    """Parameters of a process as an environment.

    Attributes:
      max_steps_in_episode: after which an episode is cut.
    """

    max_steps_in_episode: int


@dataclasses.dataclass(frozen=True, eq=False)
class ProcessEnvironment:
    """A decision process behind gymnax's interface.

    Attributes:
      process: what happens.
      tasks: a hierarchy for it, of one task where none is known.
    """

    process: DecisionProcess
    tasks: TaskGraph

    @functools.cached_property
    def _successors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States that may follow [S, A, K], the likeliest first, their cumulative chances, and rewards."""
        chances = np.asarray(self.process.transitions, np.float64)
        most = int(np.max(np.sum(chances > 0, axis=-1)))
        states = np.argsort(-chances, axis=-1, kind="stable")[..., :most]
        summed = np.cumsum(np.take_along_axis(chances, states, axis=-1), axis=-1)
        rewards = np.take_along_axis(np.asarray(self.process.rewards), states, axis=-1)
        return states.astype(np.int32), (summed / summed[..., -1:]).astype(np.float32), rewards

    def action_space(self, params: ProcessParams) -> Space:
        """The actions."""
        del params
        return Space(self.process.rewards.shape[1])

    def observation_space(self, params: ProcessParams) -> Space:
        """The numbers of the states."""
        del params
        return Space(self.process.rewards.shape[0])

    def reset_env(self, key: PRNGKeyArray, params: ProcessParams) -> tuple[Int[Array, ""], ProcessState]:
        """A first state."""
        del params
        summed = jnp.cumsum(self.process.start)
        number = jnp.searchsorted(summed / summed[-1], jax.random.uniform(key), side="right")
        return number, ProcessState(number, jnp.int32(0))

    def step_env(
        self, key: PRNGKeyArray, state: ProcessState, action: Int[Array, ""], params: ProcessParams
    ) -> tuple[Int[Array, ""], ProcessState, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        """One transition."""
        del params
        states, summed, rewards = (jnp.asarray(x)[state.number, action] for x in self._successors)
        chosen = jnp.sum(jax.random.uniform(key) >= summed)
        after = ProcessState(states[chosen], state.time + 1)
        return after.number, after, rewards[chosen], self.process.terminal[after.number], {}

    def is_truncated(self, state: ProcessState, params: ProcessParams) -> Bool[Array, ""]:
        """True where the steps are used up."""
        return state.time >= params.max_steps_in_episode


@functools.cache  # the same object twice: what was compiled for it is found again
def make(name: str) -> tuple[Environment, ProcessParams]:
    """Taxi, or the four rooms with hallways of Sutton, Precup & Singh (1999), where a third of moves fail.

    In the rooms every step costs 1 but the one that reaches the goal: returns say how long the way was.
    """
    if name == "Taxi":
        raw, params = ProcessEnvironment(taxi(), taxi_tasks()), ProcessParams(200)
    else:
        process = mazes.maze(mazes.FOUR_ROOMS, slip=1 / 3)
        process = dataclasses.replace(process, rewards=process.rewards - 1)
        raw, params = ProcessEnvironment(process, flat_tasks(*process.rewards.shape[:2])), ProcessParams(500)
    return adapt(name, raw, params), params
