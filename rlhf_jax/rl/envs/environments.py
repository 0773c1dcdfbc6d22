"""One adapter over gymnax: transitions with the true last observation, cheap resets, honest statistics.

    env, params = make("CartPole-v1")
    state = env.reset(key, params)
    state, transition = env.step(key, state, action, params)      # resets by itself

Everything is for one environment: `vmap` it. `transition.next_obs` is what the action led to, also where
the episode ended; `state.obs` is what the policy sees next, which then is the first of a new episode.
"""

import dataclasses
import difflib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import optional
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray


@pytree_dataclass
class Transition:
    """One step, or an array of them.

    Attributes:
      obs: what the policy saw: an array, or a tree of them where several agents act.
      action: what it did.
      reward: what it got.
      terminated: the episode ended here; nothing comes after, so nothing is bootstrapped.
      truncated: the episode was cut here by its time limit, and did not end; bootstrap from `next_obs`.
      next_obs: what followed; the true last observation where the episode ended or was cut.
    """

    obs: Any
    action: Array
    reward: Float[Array, "..."]
    terminated: Bool[Array, "..."]
    truncated: Bool[Array, "..."]
    next_obs: Any

    @property
    def learning_reward(self) -> Float[Array, "..."]:
        """Reward that is learned from: `reward`, unless each of several agents has its own."""
        return self.reward

    @property
    def done(self) -> Bool[Array, "..."]:
        """End of an episode, terminated or truncated: another begins after this step."""
        return self.terminated | self.truncated

    def discounts(self, gamma: Any) -> Float[Array, "..."]:
        """`gamma`, 0 where the episode terminated (and not where it was truncated)."""
        return jnp.where(self.terminated, 0.0, gamma)


@pytree_dataclass
class EpisodeStatistics:
    """Sums over the episodes that finished; they add up over steps, environments and updates.

    Attributes:
      episodes: how many.
      return_sum: of their undiscounted returns.
      length_sum: of their lengths, in steps.
    """

    episodes: Int[Array, "..."]
    return_sum: Float[Array, "..."]
    length_sum: Int[Array, "..."]


@pytree_dataclass
class EnvState:
    """State of an environment and statistics of its episodes.

    Attributes:
      inner: gymnax's own state.
      obs: what the policy sees next.
      episode_return: rewards of the current episode so far.
      episode_length: steps of the current episode so far; 0 tells a recurrent policy to forget.
      finished: sums over the episodes finished since the last `take_statistics`.
    """

    inner: Any
    obs: Array
    episode_return: Float[Array, "..."]
    episode_length: Int[Array, "..."]
    finished: EpisodeStatistics


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """A gymnax environment with repaired dtypes and shapes. Make it with `make`.

    Attributes:
      name: as given to `make`.
      raw: the gymnax environment.
      obs_shape: of one observation; never empty, except for a number of a state (`num_states`).
      obs_dtype: bool (MinAtar), int32 (the number of a state) or float32.
      num_states: observations are numbers 0 ... num_states - 1; None where they are vectors or images.
      num_actions: actions are numbers 0 ... num_actions - 1; None where they are continuous.
      action_shape: `()` or the shape of a continuous action.
      action_low: least continuous action, in each dimension; `step` clips to it.
      action_high: greatest.
      max_steps: steps after which an episode is truncated, by default.
      num_agents: agents that act at the same time.
    """

    name: str
    raw: Any
    obs_shape: tuple[int, ...]
    obs_dtype: Any
    num_states: int | None
    num_actions: int | None
    action_shape: tuple[int, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_steps: int
    _inner_dtypes: Any
    num_agents: int = 1

    @property
    def discrete(self) -> bool:
        """True where the action space is discrete: actions are numbers."""
        return self.num_actions is not None

    def blank_obs(self, *leading: int) -> Any:
        """Observations of zeros, to initialize networks with."""
        return jnp.zeros((*leading, *self.obs_shape), self.obs_dtype)

    def reset(self, key: PRNGKeyArray, params: Any) -> EnvState:
        """The beginning of an episode."""
        obs, inner = self.raw.reset_env(key, params)
        return first_state(self._repair_inner(inner), self._repair_obs(obs))

    def step(
        self, key: PRNGKeyArray, state: EnvState, action: Array, params: Any
    ) -> tuple[EnvState, Transition]:
        """One step; where the episode ends, the state returned is the beginning of the next one."""
        step_key, reset_key = jax.random.split(key)
        return self.auto_reset_step(step_key, state, action, params, self.reset(reset_key, params))

    def auto_reset_step(
        self, key: PRNGKeyArray, state: EnvState, action: Array, params: Any, fresh: EnvState
    ) -> tuple[EnvState, Transition]:
        """`step` that goes on from `fresh` where the episode ends.

        Resets drawn beforehand, all in one call, keep their random numbers out of the loop over time.
        """
        action = self._check_action(action)
        applied = action if self.discrete else jnp.clip(action, *self._bounds())
        obs, inner, reward, terminated, _ = self.raw.step_env(key, state.inner, applied, params)
        next_obs, reward = self._repair_obs(obs), jnp.asarray(reward, jnp.float32).reshape(())
        terminated = jnp.asarray(terminated, bool).reshape(())
        # Some environments set both flags at their last step; what has ended was not cut.
        truncated = jnp.asarray(self.raw.is_truncated(inner, params), bool).reshape(()) & ~terminated
        transition = Transition(state.obs, action, reward, terminated, truncated, next_obs)
        return next_state(state, self._repair_inner(inner), transition, fresh), transition

    def _bounds(self) -> tuple[Array, Array]:
        shape = self.action_shape
        return jnp.asarray(self.action_low).reshape(shape), jnp.asarray(self.action_high).reshape(shape)

    def _check_action(self, action: Array) -> Array:
        action = jnp.asarray(action)
        kind = jnp.integer if self.discrete else jnp.floating
        if action.shape != self.action_shape or not jnp.issubdtype(action.dtype, kind):
            raise UserError(
                f"{self.name} takes {'integer' if self.discrete else 'float'} actions of shape "
                f"{self.action_shape}, not {action.dtype} of shape {action.shape}: use the matching head"
            )
        if self.num_actions is not None:
            valid = (action >= 0) & (action < self.num_actions)
            checkify.debug_check(jnp.all(valid), self.name + ": there is no action {action}", action=action)
            return action.astype(jnp.int32)
        checkify.debug_check(jnp.all(jnp.isfinite(action)), self.name + ": an action is not finite")
        return action.astype(jnp.float32)

    def _repair_obs(self, obs: Array) -> Array:
        return jnp.asarray(obs).astype(self.obs_dtype).reshape(self.obs_shape)

    def _repair_inner(self, inner: Any) -> Any:
        # Python numbers become arrays, and both branches of a reset get the same dtypes.
        return jax.tree.map(_as_dtype, inner, self._inner_dtypes)


def first_state(inner: Any, obs: Any) -> EnvState:
    """The beginning of a first episode."""
    nothing, none = jnp.float32(0), jnp.int32(0)
    return EnvState(inner, obs, nothing, none, EpisodeStatistics(none, nothing, none))


def next_state(state: EnvState, inner: Any, transition: Transition, fresh: EnvState) -> EnvState:
    """The state after `transition`: `inner`, or `fresh` where the episode is done."""
    done = transition.done
    episode_return, length = state.episode_return + transition.reward, state.episode_length + 1
    finished = EpisodeStatistics(
        state.finished.episodes + done,
        state.finished.return_sum + jnp.where(done, episode_return, 0),
        state.finished.length_sum + jnp.where(done, length, 0),
    )
    going_on = EnvState(inner, transition.next_obs, episode_return, length, finished)
    fresh = dataclasses.replace(fresh, finished=finished)
    return jax.tree.map(lambda new, old: jax.lax.select(done, new, old), fresh, going_on)


def inner_dtypes(before: Any, after: Any) -> Any:
    """Dtypes that a state has before a step and after it alike; Python numbers become arrays."""
    return jax.tree.map(lambda a, b: jnp.promote_types(a.dtype, b.dtype), before, after)


def _as_dtype(leaf: Any, dtype: Any) -> Array:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return leaf
    return jnp.asarray(leaf, dtype)


def take_statistics(states: EnvState) -> tuple[EnvState, EpisodeStatistics]:
    """The sums over all environments of `states`, and the states with their sums set to 0."""
    total = jax.tree.map(jnp.sum, states.finished)
    return dataclasses.replace(states, finished=jax.tree.map(jnp.zeros_like, states.finished)), total


def episode_metrics(statistics: EpisodeStatistics) -> Metrics:
    """`episodes` and the two sums under names that say so: divide after adding up, not before."""
    return {
        "episodes": statistics.episodes,
        "episode_return_sum": statistics.return_sum,
        "episode_length_sum": statistics.length_sum,
    }


def checked(function: Any) -> Any:
    """The debug mode: `function`, jitted, which raises where an environment gets an invalid action.

    Raises:
      UserError: an action is out of range or not finite; the message names the environment.
    """
    run = jax.jit(checkify.checkify(function, errors=checkify.user_checks))

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        error, result = run(*args, **kwargs)
        message = error.get()
        if message is not None:
            raise UserError(message.split(" (`check`")[0])
        return result

    return wrapped


@functools.cache  # the same object twice: what was compiled for it is found again
def make(name: str) -> tuple[Environment, Any]:
    """The environment of this name and its default parameters.

    Raises:
      UserError: there is none, or gymnax cannot build it; the message names the nearest.
    """
    gymnax = optional("gymnax", extra="rl")

    known = list(gymnax.registered_envs)
    if name not in known:
        by_lower_case = {other.lower(): other for other in known}
        near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.0)
        raise UserError(f"unknown environment {name!r}: the nearest name is {by_lower_case[near[0]]!r}")
    try:
        raw, params = gymnax.make(name)
    except Exception as error:
        raise UserError(f"environment {name!r} cannot be built ({error}): choose another") from error
    return adapt(name, raw, params), params


def adapt(name: str, raw: Any, params: Any) -> Environment:
    """The adapter for an environment that follows gymnax's interface.

    Raises:
      UserError: its observations are not one array, or its actions neither numbers nor one box.
    """
    key = jax.random.key(0)
    actions, space = raw.action_space(params), raw.observation_space(params)
    if not hasattr(actions, "n") and not hasattr(actions, "low"):
        raise UserError(f"environment {name!r} has composite actions: only one number or one box will do")
    sample = jax.eval_shape(actions.sample, key)
    obs, inner = jax.eval_shape(raw.reset_env, key, params)
    if not hasattr(obs, "shape"):
        raise UserError(f"environment {name!r} has composite observations: wrap it to return one array")
    after = jax.eval_shape(raw.step_env, key, inner, sample, params)[1]
    num_actions = getattr(actions, "n", None)
    size = math.prod(sample.shape)

    def bounds(limit: Any) -> tuple[float, ...]:
        return tuple(jnp.broadcast_to(jnp.asarray(limit, jnp.float32), sample.shape).reshape(size).tolist())

    return Environment(
        name=name,
        raw=raw,
        obs_shape=obs.shape if obs.shape or hasattr(space, "n") else (1,),
        obs_dtype=_obs_dtype(name, space),
        num_states=getattr(space, "n", None),
        num_actions=num_actions,
        action_shape=sample.shape,
        action_low=() if num_actions else bounds(actions.low),
        action_high=() if num_actions else bounds(actions.high),
        max_steps=int(params.max_steps_in_episode),
        _inner_dtypes=inner_dtypes(inner, after),
    )


def _obs_dtype(name: str, space: Any) -> Any:
    if hasattr(space, "n"):
        return jnp.int32
    # MinAtar's planes hold zeros and ones: as bool they take a quarter of the memory.
    return jnp.bool_ if name.endswith("-MinAtar") else jnp.float32
