"""Taxi (Dietterich 2000, section 3.1): fetch a passenger at one of four places and bring them to another.

A state is the taxi's cell (25), where the passenger is (at R, G, Y or B, or in the taxi) and where they want
to go (4); state 500 is the end. Actions are left, down, right, up, pickup and putdown.
"""

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import Int
from rlhf_jax.rl.tabular.dynamic_programming import MOVES, DecisionProcess
from rlhf_jax.rl.tabular.task_graphs import TaskGraph

WIDTH, IN_TAXI, DELIVERED = 5, 4, 500
PICKUP, PUTDOWN = 4, 5
PLACES = (0, 4, 20, 23)
"""Cells of R, G, Y and B."""
WALLS = ((0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2))
"""Cells (row, column) with a wall at their right."""


def taxi() -> DecisionProcess:
    """Reward -1 for each action, 20 for the delivery, -10 for any other pickup or putdown that is in vain."""
    size = DELIVERED + 1
    transitions, rewards = np.zeros((2, size, 6, size), np.float32)
    cells, passengers, destinations = _parts()
    for state in range(DELIVERED):
        cell, passenger, destination = cells[state], passengers[state], destinations[state]
        for action in range(6):
            after, reward = state, -1.0
            if action < PICKUP:
                after = _state(_moved(cell, action), passenger, destination)
            elif action == PICKUP and passenger != IN_TAXI and cell == PLACES[passenger]:
                after = _state(cell, IN_TAXI, destination)
            elif action == PUTDOWN and passenger == IN_TAXI and cell == PLACES[destination]:
                after, reward = DELIVERED, 20.0
            else:
                reward = -10.0
            transitions[state, action, after], rewards[state, action, after] = 1, reward
    transitions[DELIVERED, :, DELIVERED] = 1
    start = np.append((passengers != IN_TAXI).astype(np.float32), 0)
    return DecisionProcess(
        transitions=jnp.asarray(transitions),
        rewards=jnp.asarray(rewards),
        start=jnp.asarray(start / start.sum()),
        terminal=jnp.arange(size) == DELIVERED,
    )


def taxi_tasks() -> TaskGraph:
    """Root: get, then put; both navigate to places (Dietterich 2000, figure 2), which knows the cell alone.

    What remains to do once the passenger has been got does not depend on where the taxi was before: true
    without discount, so that this state abstraction wants gamma 1.
    """
    cells, passengers, destinations = (np.append(part, 0) for part in _parts())
    over = np.arange(DELIVERED + 1) == DELIVERED
    root, get, put, navigate = 0, 1, 2, range(3, 7)
    actions = 7 + np.arange(6)
    children = np.zeros((7, 13), bool)
    children[root, [get, put]] = True
    children[get, [*navigate, actions[PICKUP]]] = children[put, [*navigate, actions[PUTDOWN]]] = True
    children[navigate, 7 : 7 + PICKUP] = True
    riding = (passengers == IN_TAXI) & ~over
    there = [over | (cells == place) for place in PLACES]
    nothing, everything = np.zeros(len(over), int), np.arange(len(over))
    errand = 5 * destinations + passengers
    abstractions = [errand, 5 * cells + passengers, 5 * cells + destinations, *[cells] * 4]
    abstractions += [nothing] * 4 + [everything] * 2
    return TaskGraph(
        children=children,
        terminations=np.stack([over, riding | over, ~riding, *there]),
        pseudo_rewards=np.zeros((7, len(over)), np.float32),
        abstractions=np.stack(abstractions),
    )


def _parts() -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Cell, passenger and destination of each state but the end."""
    states = np.arange(DELIVERED)
    return states // 20, states // 4 % 5, states % 4


def _state(cell: int, passenger: int, destination: int) -> int:
    return (cell * 5 + passenger) * 4 + destination


def _moved(cell: int, action: int) -> int:
    row, column = divmod(int(cell), WIDTH)
    down, right = MOVES[action]
    wall = (row, column + min(right, 0)) in WALLS and right != 0
    inside = 0 <= row + down < WIDTH and 0 <= column + right < WIDTH
    return cell if wall or not inside else cell + WIDTH * down + right
