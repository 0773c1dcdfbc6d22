"""Environments with goals that an agent is told: bit flipping, and what hindsight needs to know of such.

A goal environment follows gymnax's interface, and has beside it

    achieved_goal(obs) -> the goal that is reached where one is
    replace_goal(obs, goal) -> the observation as it would be with another goal
    reached(achieved, goal) -> True where that goal is reached

Its reward is 0 where the goal is reached, which ends the episode, and -1 elsewhere: an episode failed
where its return is minus its length.
"""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray
from rlhf_jax.rl.envs.environments import Environment, adapt

PREFIX = "BitFlipping-"


@runtime_checkable
class Goals(Protocol):
    """Goal functions of an environment, as hindsight needs them; any leading axes."""

    def achieved_goal(self, obs: Float[Array, "... D"]) -> Float[Array, "... G"]:
        """The goal that is reached where one is."""
        ...

    def replace_goal(self, obs: Float[Array, "... D"], goal: Float[Array, "... G"]) -> Float[Array, "... D"]:
        """The observation as it would be with this goal."""
        ...

    def reached(self, achieved: Float[Array, "... G"], goal: Float[Array, "... G"]) -> Bool[Array, "..."]:
        """True where that goal is reached."""
        ...


@dataclasses.dataclass(frozen=True)
class Space:
    """Numbers 0 ... n - 1."""

    n: int

    def sample(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """One of them."""
        return jax.random.randint(key, (), 0, self.n)


@pytree_dataclass
class Bits:
    """State of bit flipping."""

    bits: Float[Array, " N"]
    goal: Float[Array, " N"]
    time: Int[Array, ""]


@pytree_dataclass
class BitParams:
    """Parameters of bit flipping.

    Attributes:
      max_steps_in_episode: flips in an episode.
    """

    max_steps_in_episode: int


@dataclasses.dataclass(frozen=True)
class BitFlipping:
    """Bit flipping (Andrychowicz et al. 2017, section 3.1): N bits, each action flips one; reach the goal's.

    An observation is the bits and then the goal's.

    Attributes:
      count: N.
    """

    count: int

    def action_space(self, params: BitParams) -> Space:
        """The bits."""
        del params
        return Space(self.count)

    def observation_space(self, params: BitParams) -> None:
        """No numbers of states."""
        del params

    def reset_env(self, key: PRNGKeyArray, params: BitParams) -> tuple[Float[Array, " D"], Bits]:
        """Random bits, and another pattern as goal."""
        del params
        bits_key, goal_key = jax.random.split(key)
        bits = jax.random.bernoulli(bits_key, shape=(self.count,)).astype(jnp.float32)
        # At least one differs: number 0 would be the pattern itself.
        number = jax.random.randint(goal_key, (), 1, 2**self.count)
        differs = (number >> jnp.arange(self.count)) & 1
        state = Bits(bits, jnp.abs(bits - differs), jnp.int32(0))
        return self._obs(state), state

    def step_env(
        self, key: PRNGKeyArray, state: Bits, action: Int[Array, ""], params: BitParams
    ) -> tuple[Float[Array, " D"], Bits, Float[Array, ""], Bool[Array, ""], dict[str, Any]]:
        """Flips a bit."""
        del key, params
        flipped = jnp.arange(self.count) == action
        state = Bits(jnp.abs(state.bits - flipped), state.goal, state.time + 1)
        done = self.reached(state.bits, state.goal)
        return self._obs(state), state, done.astype(jnp.float32) - 1, done, {}

    def is_truncated(self, state: Bits, params: BitParams) -> Bool[Array, ""]:
        """True where the flips are used up."""
        return state.time >= params.max_steps_in_episode

    def achieved_goal(self, obs: Float[Array, "... D"]) -> Float[Array, "... G"]:
        """The bits."""
        return obs[..., : self.count]

    def replace_goal(self, obs: Float[Array, "... D"], goal: Float[Array, "... G"]) -> Float[Array, "... D"]:
        """The same bits beside another goal."""
        return jnp.concatenate([obs[..., : self.count], goal], axis=-1)

    def reached(self, achieved: Float[Array, "... G"], goal: Float[Array, "... G"]) -> Bool[Array, "..."]:
        """True where all bits are the goal's."""
        return jnp.all(achieved == goal, axis=-1)

    def _obs(self, state: Bits) -> Float[Array, " D"]:
        return jnp.concatenate([state.bits, state.goal])


def is_known(name: str) -> bool:
    """True for names of goal environments, such as BitFlipping-8."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).isdecimal()


@functools.cache  # the same object twice: what was compiled for it is found again
def make(name: str) -> tuple[Environment, BitParams]:
    """The goal environment of this name and its parameters; as many flips as bits.

    Raises:
      UserError: there are no bits, or more than 30.
    """
    count = int(name.removeprefix(PREFIX))
    if not 1 <= count <= 30:
        raise UserError(f"{name}: give 1 to 30 bits, such as {PREFIX}8")
    params = BitParams(count)
    return adapt(name, BitFlipping(count), params), params
