"""Mazes as decision processes: the one that Dyna is known for, and four rooms joined by hallways.

Every cell is a state, walls included, so that values are a picture once they are reshaped; a wall is never
entered. Actions are left, down, right and up.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Bool, Int
from rlhf_jax.rl.tabular.dynamic_programming import MOVES, DecisionProcess

WALL, HALLWAY, START, GOAL = "#+SG"

DYNA_MAZE = (
    ".......#G",
    "..#....#.",
    "S.#....#.",
    "..#......",
    ".....#...",
    ".........",
)
"""Nine by six cells, fourteen steps from S to G (Sutton & Barto 2018, example 8.1)."""

FOUR_ROOMS = (
    "#############",
    "#S....#.....#",
    "#.....#.....#",
    "#.....+.....#",
    "#.....#.....#",
    "#.....#.....#",
    "##+####.....#",
    "#.....###+###",
    "#.....#.....#",
    "#.....#...G.#",
    "#.....#.....#",
    "#.....+.....#",
    "#############",
)
"""Four rooms, and four hallways of one cell (+) between them (Sutton, Precup & Singh 1999, figure 2)."""


def maze(rows: tuple[str, ...], *, slip: float = 0.0) -> DecisionProcess:
    """Reach G for a reward of 1, which ends the episode; a move into a wall or over the edge stays in place.

    Args:
      rows: the map, of # (wall), . (free), + (hallway, free as well), S (start) and G (goal).
      slip: chance that a move goes in one of the three other directions instead, each alike.

    Raises:
      UserError: rows of different lengths, other letters, or no start.
    """
    letters, width = "".join(rows), len(rows[0])
    known = {WALL, HALLWAY, START, GOAL, "."}
    if set(letters) - known or START not in letters or any(len(row) != width for row in rows):
        raise UserError(f"maze {rows}: give rows of one length, of # . + S and G, with an S.")
    size = len(letters)
    transitions = np.zeros((size, 4, size), np.float32)
    for place in range(size):
        reached = [_reached(rows, place, move) for move in MOVES]
        for action in range(4):
            for direction in range(4):
                chance = 1 - slip if direction == action else slip / 3
                transitions[place, action, reached[direction]] += chance
    letter = np.array(list(letters))
    start = (letter == START).astype(np.float32)
    return DecisionProcess(
        transitions=jnp.asarray(transitions),
        rewards=jnp.broadcast_to(jnp.asarray(letter == GOAL, jnp.float32), transitions.shape),
        start=jnp.asarray(start / start.sum()),
        terminal=jnp.asarray(letter == GOAL),
    )


def with_goal(process: DecisionProcess, goal: int) -> DecisionProcess:
    """The same maze with its goal in another cell."""
    is_goal = jnp.arange(len(process.start)) == goal
    rewards = jnp.broadcast_to(is_goal.astype(process.rewards.dtype), process.rewards.shape)
    return dataclasses.replace(process, rewards=rewards, terminal=is_goal)


def free_cells(rows: tuple[str, ...]) -> Bool[Array, " S"]:
    """Cells that are no wall."""
    return jnp.asarray(np.array(list("".join(rows))) != WALL)


def rooms(rows: tuple[str, ...]) -> Int[np.ndarray, " S"]:
    """Number of the room of each cell, from 0; -1 for walls and hallways, which part rooms."""
    letters = "".join(rows)
    numbers = np.full(len(letters), -1)
    count = 0
    for place, letter in enumerate(letters):
        if letter in (WALL, HALLWAY) or numbers[place] >= 0:
            continue
        open_ = [place]
        while open_:
            cell = open_.pop()
            numbers[cell] = count
            neighbours = {_reached(rows, cell, move) for move in MOVES}
            open_ += [near for near in neighbours if letters[near] != HALLWAY and numbers[near] < 0]
        count += 1
    return numbers


def regions(rows: tuple[str, ...]) -> Int[np.ndarray, " S"]:
    """`rooms`, in which a hallway belongs to the first of the rooms beside it; 0 for walls."""
    numbers = rooms(rows)
    found = np.maximum(numbers, 0)
    for cell, beside in hallways(rows).items():
        found[cell] = min(beside)
    return found


def hallways(rows: tuple[str, ...]) -> dict[int, list[int]]:
    """Each hallway's cell, and the rooms beside it."""
    numbers, letters = rooms(rows), "".join(rows)
    found = {}
    for cell in (place for place, letter in enumerate(letters) if letter == HALLWAY):
        near = {int(numbers[_reached(rows, cell, move)]) for move in MOVES}
        found[cell] = sorted(near - {-1})
    return found


def _reached(rows: tuple[str, ...], place: int, move: tuple[int, int]) -> int:
    width = len(rows[0])
    row, column = place // width + move[0], place % width + move[1]
    inside = 0 <= row < len(rows) and 0 <= column < width
    return row * width + column if inside and rows[row][column] != WALL else place
