"""A* (Hart, Nilsson & Raphael 1968) over numbered states, as one jitted loop.

States are whole numbers 0 ... S - 1, so that what is known of them stands in arrays. The state to expand next
is found by a minimum over all S: simple, exact, and fast up to some 10^6 states. Map it over problems with
`vmap`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int

SuccessorFn = Callable[[Int[Array, ""]], tuple[Int[Array, "A"], Float[Array, "A"], Bool[Array, "A"]]]
"""state -> (next states, costs of the moves, which of the moves there are)."""
HeuristicFn = Callable[[Int[Array, "S"]], Float[Array, "S"]]
"""states -> estimates of the cost to the goal."""


@pytree_dataclass
class Route:
    """Shortest path that A* found, as a table of parents.

    Attributes:
      cost: of the cheapest route; infinite where there is none.
      parents: [S] the state before each one reached; -1 elsewhere, and at the start.
      expanded: how many states were expanded.
    """

    cost: Float[Array, ""]
    parents: Int[Array, "S"]
    expanded: Int[Array, ""]


def a_star(
    successors: SuccessorFn,
    heuristic: HeuristicFn,
    start: Int[Array, ""] | int,
    goal: Int[Array, ""] | int,
    *,
    num_states: int,
) -> Route:
    """The cheapest route from `start` to `goal`.

        f(s) = g(s) + h(s): expand the least f, until the goal is that state

    Optimal where h is admissible, which is to say never above the true cost to go; a state is opened again
    when a cheaper way to it turns up, so h need not be consistent. Of equal f, the state of lower number.

    Args:
      successors: moves have costs of at least 0.
      heuristic: 0 everywhere makes it Dijkstra's algorithm.
    """
    estimate = heuristic(jnp.arange(num_states))

    def cheapest(cost: Float[Array, "S"], is_open: Bool[Array, "S"]) -> Int[Array, ""]:
        return jnp.argmin(jnp.where(is_open, cost + estimate, jnp.inf))

    def unfinished(carry: tuple[Array, ...]) -> Bool[Array, ""]:
        cost, is_open, _, _ = carry
        return jnp.any(is_open) & (cheapest(cost, is_open) != goal)

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        cost, is_open, parents, expanded = carry
        state = cheapest(cost, is_open)
        is_open = is_open.at[state].set(False)
        states, prices, is_there = successors(state)
        # Two moves to one state: a minimum, not the last that is written.
        reached = jnp.where(is_there, cost[state] + prices, jnp.inf)
        improved = cost.at[states].min(reached)
        better = is_there & (reached < cost[states]) & (reached <= improved[states])
        targets = jnp.where(better, states, num_states)
        return (
            improved,
            is_open.at[targets].set(True, mode="drop"),
            parents.at[targets].set(state, mode="drop"),
            expanded + 1,
        )

    known = jnp.full(num_states, jnp.inf).at[start].set(0)
    is_open = jnp.zeros(num_states, bool).at[start].set(True)
    nobody = jnp.full(num_states, -1, jnp.int32)
    cost, _, parents, expanded = jax.lax.while_loop(unfinished, step, (known, is_open, nobody, jnp.int32(0)))
    return Route(cost[goal], parents, expanded)


def route_states(route: Route, start: int, goal: int) -> list[int]:
    """The states of the route from `start` to `goal`, both included; empty where there is none."""
    if not bool(jnp.isfinite(route.cost)):
        return []
    parents, states = route.parents.tolist(), [goal]
    while states[-1] != start:
        states.append(parents[states[-1]])
    return states[::-1]
