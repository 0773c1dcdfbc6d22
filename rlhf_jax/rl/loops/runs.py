"""A whole run as two pure functions: a beginning and a step. `make_train` scans them; scripts take chunks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from rlhf_jax.core.types import Array, Bool, Metrics, PRNGKeyArray

Train = Callable[[PRNGKeyArray, Any], tuple[Any, Metrics]]


@runtime_checkable
class ActFn(Protocol):
    """Acting function of a trained agent in [B] environments."""

    def __call__(
        self,
        state: Any,
        obs: Array,
        is_first: Bool[Array, " B"],
        carry: Any,
        key: PRNGKeyArray,
        *,
        deterministic: bool,
    ) -> tuple[Array, Any]:
        """Actions, and what the agent remembers next."""
        ...


def no_carry(count: int) -> tuple[()]:
    """The memory of agents without one."""
    del count
    return ()


def ignore_reward(carry: Any, reward: Array) -> Any:
    """The memory of agents that do not look at rewards when they act."""
    del reward
    return carry


@dataclasses.dataclass(frozen=True)
class Run:
    """An algorithm on an environment.

    Attributes:
      init: (key, hyper) -> state: all that a resume needs, environments included.
      step: (state, hyper) -> (state, metrics): one update, with the experience it takes. Metrics are scalars.
      act: how the agent of a state acts.
      updates: steps of a whole run.
      steps_per_update: environment steps that one update takes.
      initial_carry: what the agent remembers at the start of `count` episodes.
      observe_reward: (what it remembers, rewards [B]) -> what it remembers once they came, for agents that
        look at rewards when they act.
    """

    init: Callable[[PRNGKeyArray, Any], Any]
    step: Callable[[Any, Any], tuple[Any, Metrics]]
    act: ActFn
    updates: int
    steps_per_update: int
    initial_carry: Callable[[int], Any] = no_carry
    observe_reward: Callable[[Any, Array], Any] = ignore_reward


def run_updates(run: Run, state: Any, hyper: Any, *, updates: int) -> tuple[Any, Metrics]:
    """`updates` steps on from `state`; a run in chunks ends in the same state, bit for bit.

    Returns:
      (state, history): the metrics of each update, [updates] each.
    """
    return jax.lax.scan(lambda state, _: run.step(state, hyper), state, length=updates)


def make_train_fn(run: Run) -> Train:
    """`train(key, hyper) -> (state, history)`."""

    def train(key: PRNGKeyArray, hyper: Any) -> tuple[Any, Metrics]:
        return run_updates(run, run.init(key, hyper), hyper, updates=run.updates)

    return train
