"""Environments of JaxMARL (Rutherford et al. 2023) with an axis of agents; it is an extra: `rlhf_jax[marl]`.

Dicts over agents become arrays. An episode that its time limit cut is told from one that ended, which JaxMARL
does not do: there both are done.
"""

import contextlib
import dataclasses
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.importing import optional
from rlhf_jax.core.types import Array, Bool, Float, PRNGKeyArray
from rlhf_jax.rl.envs.joint import JointObs, RawStep


@dataclasses.dataclass(frozen=True, eq=False)
class JaxMARL:
    """An environment of JaxMARL as a `multi_agent.RawEnv`.

    Attributes:
      raw: JaxMARL's own.
      max_steps: at most in an episode; those of MPE have one step more than their limit.
      cooperative: all agents have the same interest.
      masks: it says which actions are available.
      scored: agents whose mean reward is the team's; none for all.
      ended_fn: inner state -> whether a side has won, which is an end whatever the time.
    """

    raw: Any
    max_steps: int
    cooperative: bool = True
    masks: bool = False
    scored: tuple[str, ...] = ()
    ended_fn: Callable[[Any], Bool[Array, ""]] = lambda inner: jnp.bool_(False)

    @property
    def num_agents(self) -> int:
        """Agents that learn."""
        return len(self.raw.agents)

    @property
    def num_actions(self) -> int | None:
        """Actions of the agent that has most; None where they are boxes."""
        if self.box is not None:
            return None
        return max(self.raw.action_space(agent).n for agent in self.raw.agents)

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(least, greatest) continuous action; None where actions are numbers."""
        space = self.raw.action_space(self.raw.agents[0])
        if hasattr(space, "n"):
            return None
        bounds = (
            np.broadcast_to(np.asarray(bound), space.shape).tolist() for bound in (space.low, space.high)
        )
        low, high = map(tuple, bounds)
        return low, high

    def reset_env(self, key: PRNGKeyArray) -> tuple[JointObs, Any]:
        """(observations, state) at the beginning."""
        obs, inner = self.raw.reset(key)
        return self._observe(obs, inner), inner

    def step_env(self, key: PRNGKeyArray, inner: Any, action: Array) -> RawStep:
        """One step, without JaxMARL's own reset."""
        actions = dict(zip(self.raw.agents, action, strict=True))
        obs, inner, rewards, dones, info = self.raw.step_env(key, inner, actions)
        done, ended = dones["__all__"], self.ended_fn(inner)
        shaped = self._stack(info["shaped_reward"]) if "shaped_reward" in info else 0.0
        scored = [rewards[agent] for agent in self.scored or self.raw.agents]
        return RawStep(
            obs=self._observe(obs, inner),
            inner=inner,
            rewards=self._stack(rewards) + shaped,
            score=jnp.mean(jnp.stack(scored)).astype(jnp.float32),
            terminated=done & ended,
            truncated=done & ~ended,
        )

    def _stack(self, of_agents: dict[str, Array]) -> Float[Array, " N"]:
        return jnp.stack([of_agents[agent] for agent in self.raw.agents]).astype(jnp.float32)

    def _observe(self, obs: dict[str, Array], inner: Any) -> JointObs:
        flat = [obs[agent].reshape(-1).astype(jnp.float32) for agent in self.raw.agents]
        width = max(x.size for x in flat)
        own = jnp.stack([jnp.pad(x, (0, width - x.size)) for x in flat])
        state = obs["world_state"].astype(jnp.float32) if "world_state" in obs else jnp.concatenate(flat)
        return JointObs(own, state, self._available(inner))

    def _available(self, inner: Any) -> Bool[Array, "N A"] | None:
        most = self.num_actions
        if most is None:
            return None
        if self.masks:
            masks = self.raw.get_avail_actions(inner)
        else:
            masks = {agent: jnp.ones(self.raw.action_space(agent).n) for agent in self.raw.agents}
        rows = [masks[agent].astype(bool) for agent in self.raw.agents]
        return jnp.stack([jnp.pad(row, (0, most - row.size)) for row in rows])


def _library() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of submodules that its wheel never has
        return optional("jaxmarl", extra="marl")


def _mpe(name: str, *, cooperative: bool, scored: tuple[str, ...] = (), **settings: Any) -> JaxMARL:
    raw = _library().make(name, **settings)
    # JaxMARL looks at the step before it counts it.
    return JaxMARL(raw, raw.max_steps + 1, cooperative, scored=scored)


def _smax(scenario: str) -> JaxMARL:
    jaxmarl = _library()
    maps = optional("jaxmarl.environments.smax", extra="marl")
    raw = jaxmarl.make("HeuristicEnemySMAX", scenario=maps.map_name_to_scenario(scenario))

    def ended(inner: Any) -> Bool[Array, ""]:
        alive = inner.state.unit_alive
        return ~jnp.any(alive[: raw.num_allies]) | ~jnp.any(alive[raw.num_allies :])

    return JaxMARL(raw, raw.max_steps, masks=True, ended_fn=ended)


def _overcooked(layout: str) -> JaxMARL:
    jaxmarl = _library()
    layouts = optional("jaxmarl.environments.overcooked", extra="marl").overcooked_layouts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it recommends its second version
        raw = jaxmarl.make("overcooked", layout=layouts[layout])
    return JaxMARL(raw, raw.max_steps)


_ADVERSARIES = ("adversary_0", "adversary_1", "adversary_2")

ENVIRONMENTS: dict[str, Callable[[], JaxMARL]] = {
    "mpe_simple_spread": functools.partial(_mpe, "MPE_simple_spread_v3", cooperative=True),
    "mpe_simple_spread_continuous": functools.partial(
        _mpe, "MPE_simple_spread_v3", cooperative=True, action_type="Continuous"
    ),
    "mpe_simple_tag": functools.partial(_mpe, "MPE_simple_tag_v3", cooperative=False, scored=_ADVERSARIES),
    "smax_3m": functools.partial(_smax, "3m"),
    "smax_2s3z": functools.partial(_smax, "2s3z"),
    "overcooked_cramped_room": functools.partial(_overcooked, "cramped_room"),
    "overcooked_coord_ring": functools.partial(_overcooked, "coord_ring"),
}
"""Environments by the names that `multi_agent.make` knows them by.

In simple tag the score is that of the adversaries, who hunt. In Overcooked agents learn from the shaped
reward, at its full weight all the time, and the score is what was served.
"""
