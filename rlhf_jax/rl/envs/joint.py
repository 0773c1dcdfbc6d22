"""Observations of several agents, and the outcome of a step of all of them."""

from typing import Any

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float


@pytree_dataclass
class JointObs:
    """Observations of N agents, and what is known of the world while they train.

    Attributes:
      own: what each sees, flat, padded to the widest with zeros.
      state: of the world; all of what they see, one after the other, where the environment has no other.
      available: actions that each may take; None where actions are continuous.
    """

    own: Float[Array, "... N D"]
    state: Float[Array, "... S"]
    available: Bool[Array, "... N A"] | None


@pytree_dataclass
class RawStep:
    """The outcome of a step in an environment of several agents.

    Attributes:
      inner: the environment's own state.
      rewards: what each agent learns from.
      score: the team's reward, which evaluation counts.
      terminated: the episode has ended.
      truncated: it was cut by its time limit.
    """

    obs: JointObs
    inner: Any
    rewards: Float[Array, " N"]
    score: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
