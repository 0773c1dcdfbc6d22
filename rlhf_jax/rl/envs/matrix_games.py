"""Matrix games of two agents with one interest, whose solution is known by enumeration."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import Array, PRNGKeyArray
from rlhf_jax.rl.envs.joint import JointObs, RawStep


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixGame:
    """Both agents get payoffs[first's action, second's action], and see nothing.

    Attributes:
      payoffs: square.
      length: steps of an episode.
      ends: the last step is an end; False: a time limit, behind which the game would go on.
    """

    payoffs: tuple[tuple[float, ...], ...]
    length: int = 1
    ends: bool = True

    num_agents = 2
    box = None
    cooperative = True

    @property
    def num_actions(self) -> int:
        """Actions of each agent."""
        return len(self.payoffs)

    @property
    def max_steps(self) -> int:
        """Steps of an episode."""
        return self.length

    def optimum(self) -> tuple[tuple[int, int], float]:
        """(joint action, payoff) of the best of all joint actions, by enumeration."""
        table = np.asarray(self.payoffs)
        best = np.unravel_index(np.argmax(table), table.shape)
        return (int(best[0]), int(best[1])), float(table[best])

    def reset_env(self, key: PRNGKeyArray) -> tuple[JointObs, Array]:
        """(observations, step 0)."""
        del key
        return self._observe(), jnp.int32(0)

    def step_env(self, key: PRNGKeyArray, inner: Array, action: Array) -> RawStep:
        """One step."""
        del key
        payoff = jnp.asarray(self.payoffs, jnp.float32)[action[0], action[1]]
        over = inner + 1 >= self.length
        return RawStep(
            obs=self._observe(),
            inner=inner + 1,
            rewards=jnp.stack([payoff, payoff]),
            score=payoff,
            terminated=over & self.ends,
            truncated=over & (not self.ends),
        )

    def _observe(self) -> JointObs:
        return JointObs(jnp.ones((2, 1)), jnp.ones(1), jnp.ones((2, self.num_actions), bool))


CLIMBING = ((11.0, -30.0, 0.0), (-30.0, 7.0, 6.0), (0.0, 0.0, 5.0))
"""The climbing game (Claus & Boutilier 1998): whoever errs alone at the best joint action pays for it."""

COORDINATION = ((10.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 1.0))
"""Agents are paid for doing the same, most of all for the first action."""

GAMES: dict[str, Callable[[], MatrixGame]] = {
    "climbing_game": lambda: MatrixGame(CLIMBING),
    "coordination_game": lambda: MatrixGame(COORDINATION),
    "repeated_coordination_game": lambda: MatrixGame(COORDINATION, length=10, ends=False),
}
"""Matrix games by the names that `multi_agent.make` knows them by."""
