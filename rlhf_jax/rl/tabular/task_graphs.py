"""Task graphs (Dietterich 2000): which subtasks and actions a task may call, and when it is over."""

import dataclasses
import functools

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Bool, Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class TaskGraph:
    """N tasks, of which the first is the root, above A actions; M = N + A nodes, tasks first.

    Attributes:
      children: nodes that each task may call; one at least wherever it is not over.
      terminations: states in which each task is over; a task that is over is not called.
      pseudo_rewards: for ending each task in a state, beside what the environment pays; its parents do not
        see it.
      abstractions: number, below S, of what each node needs to know of a state: of a task what its completion
        values depend on, of an action what its reward does.
    """

    children: Bool[np.ndarray, "N M"]
    terminations: Bool[np.ndarray, "N S"]
    pseudo_rewards: Float[np.ndarray, "N S"]
    abstractions: Int[np.ndarray, "M S"]

    @functools.cached_property
    def depth(self) -> int:
        """Tasks on the longest way from the root to an action.

        Raises:
          UserError: a task may come to call itself.
        """
        size = len(self.children)

        def below(task: int, above: tuple[int, ...]) -> int:
            if task in above:
                raise UserError(f"TaskGraph: task {task} calls itself: leave one of its children out")
            called = np.flatnonzero(self.children[task, :size])
            return 1 + max((below(int(child), (*above, task)) for child in called), default=0)

        return below(0, ())


def flat_tasks(num_states: int, num_actions: int) -> TaskGraph:
    """One task that calls every action: no hierarchy."""
    states = np.arange(num_states)
    return TaskGraph(
        children=np.arange(1 + num_actions)[None] > 0,
        terminations=np.zeros((1, num_states), bool),
        pseudo_rewards=np.zeros((1, num_states), np.float32),
        abstractions=np.broadcast_to(states, (1 + num_actions, num_states)),
    )
