"""Environments in which several agents act at once, as arrays with an axis of agents.

    env = make("mpe_simple_spread")
    state = env.reset(key, None)
    state, transition = env.step(key, state, actions, None)       # actions [agents]

They have the interface of `environments.Environment`, so that rollouts, replay, runs and evaluation are those
of one agent: an observation is a `JointObs`, an action an array over agents. All agents begin and end
together; one that drops out before has a single action left.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import nearest_name
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, PRNGKeyArray
from rlhf_jax.rl.envs import jaxmarl, matrix_games
from rlhf_jax.rl.envs.environments import (
    Environment,
    EnvState,
    Transition,
    first_state,
    inner_dtypes,
    next_state,
)
from rlhf_jax.rl.envs.joint import JointObs, RawStep


@pytree_dataclass
class JointTransition(Transition):
    """One step of all agents, or an array of them.

    `reward` is the team's, which evaluation counts; `obs` and `next_obs` are `JointObs`, `action` has an axis
    of agents.

    Attributes:
      rewards: what each agent learns from; shaping included, where the environment shapes.
    """

    rewards: Float[Array, "... N"]

    @property
    def learning_reward(self) -> Float[Array, "... N"]:
        """Reward that is learned from: each agent's own."""
        return self.rewards


class RawEnv(Protocol):
    """An environment as an adapter or a native game gives it."""

    @property
    def num_agents(self) -> int:
        """N."""
        ...

    @property
    def num_actions(self) -> int | None:
        """Actions of the agent that has most; None where they are boxes."""
        ...

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(least, greatest) continuous action in each dimension, alike for all agents; None for numbers."""
        ...

    @property
    def cooperative(self) -> bool:
        """All agents have the same interest."""
        ...

    @property
    def max_steps(self) -> int:
        """Steps that no episode is longer than."""
        ...

    def reset_env(self, key: PRNGKeyArray) -> tuple[JointObs, Any]:
        """(observations, state) at the beginning."""
        ...

    def step_env(self, key: PRNGKeyArray, inner: Any, action: Array) -> RawStep:
        """One step, without a reset."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class JointEnvironment(Environment):
    """An environment of several agents. Make it with `make`, or with `adapt` from a `RawEnv` of one's own.

    `obs_shape` is that of what one agent sees, padded to the widest; `action_shape` has the axis of agents
    first.

    Attributes:
      cooperative: all agents have the same interest: their mean reward may be learned in place of their own.
    """

    cooperative: bool = True

    def blank_obs(self, *leading: int) -> Any:
        """Observations of zeros, to initialize networks with; every action is available."""
        shapes = jax.eval_shape(self.raw.reset_env, jax.random.key(0))[0]
        fill = {jnp.dtype(bool): True}
        return jax.tree.map(lambda x: jnp.full((*leading, *x.shape), fill.get(x.dtype, 0), x.dtype), shapes)

    def reset(self, key: PRNGKeyArray, params: Any) -> EnvState:
        """The beginning of an episode."""
        del params
        obs, inner = self.raw.reset_env(key)
        return first_state(self._repair_inner(inner), obs)

    def auto_reset_step(
        self, key: PRNGKeyArray, state: EnvState, action: Array, params: Any, fresh: EnvState
    ) -> tuple[EnvState, JointTransition]:
        """`step` that goes on from `fresh` where the episode ends."""
        del params
        action = self._check_action(action)
        applied = action if self.discrete else jnp.clip(action, *self._bounds())
        after: RawStep = self.raw.step_env(key, state.inner, applied)
        transition = JointTransition(
            obs=state.obs,
            action=action,
            reward=after.score,
            terminated=after.terminated,
            truncated=after.truncated & ~after.terminated,
            next_obs=after.obs,
            rewards=after.rewards,
        )
        return next_state(state, self._repair_inner(after.inner), transition, fresh), transition


def adapt(name: str, raw: RawEnv) -> JointEnvironment:
    """The environment of a `RawEnv`."""
    key = jax.random.key(0)
    obs, inner = jax.eval_shape(raw.reset_env, key)
    low, high = raw.box or ((), ())
    shape = (raw.num_agents, *((len(low),) if raw.box else ()))
    dtype = jnp.float32 if raw.box else jnp.int32
    after = jax.eval_shape(raw.step_env, key, inner, jax.ShapeDtypeStruct(shape, dtype))
    return JointEnvironment(
        name=name,
        raw=raw,
        obs_shape=obs.own.shape[1:],
        obs_dtype=obs.own.dtype,
        num_states=None,
        num_actions=raw.num_actions,
        action_shape=shape,
        action_low=low * raw.num_agents,
        action_high=high * raw.num_agents,
        max_steps=raw.max_steps,
        _inner_dtypes=inner_dtypes(inner, after.inner),
        num_agents=raw.num_agents,
        cooperative=raw.cooperative,
    )


_MAKERS: Mapping[str, Callable[[], RawEnv]] = {**matrix_games.GAMES, **jaxmarl.ENVIRONMENTS}
NAMES = tuple(_MAKERS)
"""Environments of several agents that `make` knows; those of JaxMARL need the extra `marl`."""


@functools.cache  # the same object twice: what was compiled for it is found again
def make(name: str) -> JointEnvironment:
    """The environment of this name; its parameters are None.

    Raises:
      UserError: there is none, or the extra `marl` is not installed.
    """
    if name not in _MAKERS:
        raise UserError(f"unknown environment {name!r} of several agents{nearest_name(name, NAMES)}")
    return adapt(name, _MAKERS[name]())
