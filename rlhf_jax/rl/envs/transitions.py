"""Logs of transitions: collected from agents or from chance, kept in one file, read back with checks.

A log is a `Transition` [N] of whole episodes, one after the other; an episode ends where `done` holds. Its
file is an `.npz` with these arrays under their names and, as `description`, what they come from, as JSON.
Observations and actions are in the environment's own units.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Bool, PRNGKeyArray
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.envs.evaluation import play
from rlhf_jax.rl.loops.runs import ActFn, no_carry

FIELDS = ("obs", "action", "reward", "terminated", "truncated", "next_obs")
DESCRIPTION = "description"


def random_act_fn(env: Environment) -> ActFn:
    """Uniform actions: the floor of every comparison."""

    def act(
        state: Any,
        obs: Array,
        is_first: Bool[Array, " B"],
        carry: Any,
        key: PRNGKeyArray,
        *,
        deterministic: bool,
    ) -> tuple[Array, Any]:
        del state, is_first, deterministic
        count = obs.shape[0]
        if env.num_actions is not None:
            return jax.random.randint(key, (count,), 0, env.num_actions), carry
        low, high = (jnp.asarray(x).reshape(env.action_shape) for x in (env.action_low, env.action_high))
        return jax.random.uniform(key, (count, *env.action_shape), minval=low, maxval=high), carry

    return act


def collect(
    act_fn: ActFn,
    state: Any,
    env: Environment,
    env_params: Any,
    key: PRNGKeyArray,
    *,
    episodes: int,
    initial_carry_fn: Callable[[int], Any] = no_carry,
    deterministic: bool = False,
) -> Transition:
    """`episodes` whole episodes as a log, in NumPy arrays.

    Args:
      act_fn: how the agent acts, such as `Run.act`, or `random_act_fn`.
      state: of the agent.
      initial_carry_fn: what it remembers at the start of so many episodes, such as `Run.initial_carry`.
      deterministic: take the likeliest action rather than a sample.
    """

    def run(state: Any, key: PRNGKeyArray) -> tuple[Transition, Array]:
        return play(
            act_fn,
            state,
            initial_carry_fn(episodes),
            env,
            env_params,
            key,
            episodes=episodes,
            deterministic=deterministic,
        )

    seen, alive = jax.device_get(jax.jit(run)(state, key))
    # Episode by episode, each in order of time.
    mask = alive.T.reshape(-1)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[mask], seen)


def concatenate(logs: list[Transition]) -> Transition:
    """Several logs as one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *logs)


def episode_returns(log: Transition) -> np.ndarray:
    """Undiscounted return of each episode of the log, [E]."""
    ends = np.flatnonzero(np.asarray(log.done))
    return np.diff(np.cumsum(np.asarray(log.reward, np.float64))[ends], prepend=0.0)


def save(path: Path, log: Transition, description: dict[str, Any]) -> None:
    """Writes a log; `description` must have the name of the environment as `env`.

    Raises:
      UserError: the file cannot be written.
    """
    arrays: dict[str, Any] = {name: getattr(log, name) for name in FIELDS}
    arrays[DESCRIPTION] = np.array(json.dumps(description))
    files.write_arrays(path, arrays)


def load(path: Path, env: Environment | None = None) -> tuple[Transition, dict[str, Any]]:
    """(log, description) of a file that `save` wrote.

    Args:
      env: the environment it must be of; None to take what comes.

    Raises:
      UserError: it is no such file, is of another environment, or holds arrays that do not fit.
    """
    fields = f"{', '.join(FIELDS)} and {DESCRIPTION}"
    remedy = f"no log of transitions can be read: give an .npz with {fields}, as --collect writes it"
    arrays: dict[str, Any] = files.read_arrays(path, keys=(*FIELDS, DESCRIPTION), remedy=remedy)
    try:
        description = dict(json.loads(arrays[DESCRIPTION].item()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its description is damaged ({error}): {remedy}") from error
    log = Transition(**{name: arrays[name] for name in FIELDS})
    if env is not None:
        check(log, env, of=description.get("env"), path=path)
    return log, description


def check(log: Transition, env: Environment, *, of: str | None, path: Path) -> None:
    """Checks that a log fits an environment.

    Args:
      of: name of the environment that it says it is of.
      path: where it was read.

    Raises:
      UserError: it does not; the message says what is wrong.
    """
    if of != env.name:
        raise UserError(f"{path} is a log of {of}, not of {env.name}: collect one there")
    count = len(log.reward)
    shapes = {"obs": env.obs_shape, "action": env.action_shape, "next_obs": env.obs_shape}
    for name in FIELDS:
        expected, found = (count, *shapes.get(name, ())), np.shape(getattr(log, name))
        if expected != found:
            raise UserError(f"{path}: {name} has shape {found}, not {expected}: collect the log again")
    for name in ("obs", "action", "reward", "next_obs"):
        if not np.all(np.isfinite(getattr(log, name))):
            raise UserError(f"{path}: {name} holds numbers that are not finite: collect the log again")
    action = np.asarray(log.action)
    if env.num_actions is not None and not np.all((action >= 0) & (action < env.num_actions)):
        raise UserError(f"{path}: actions are not all in 0 ... {env.num_actions - 1}: collect the log again")
    if not count or not np.asarray(log.done)[-1]:
        raise UserError(f"{path}: its last episode has no end: give whole episodes")
