"""A grid world from pixels and an instruction: a vision-language-action task with known truth.

    image        an agent (a black disc) and things of `tasks.shapes` on a grid of three by three cells
    instruction  go to red square.
    action       n, s, w or e: a step that brings the agent nearer

An action at the edge leads nowhere; an episode ends on the thing that was named.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core.types import UInt8
from rlhf_jax.tasks import shapes
from rlhf_jax.tasks.arithmetic import Split
from rlhf_jax.tasks.shapes import CELL, Scene, Thing

SIDE = 3
MOVES = {"n": (-1, 0), "s": (1, 0), "w": (0, -1), "e": (0, 1)}
ActFn = Callable[[list[dict[str, Any]]], Sequence[str]]
"""Rows with `prompt` and `images` -> an action each."""


@dataclasses.dataclass(frozen=True)
class World:
    """A state.

    Attributes:
      scene: the things; none stands where the agent is, but on the last step.
      agent: its cell, from 0 to 8.
      target: the cell of what the instruction names.
    """

    scene: Scene
    agent: int
    target: int

    @property
    def instruction(self) -> str:
        """Instruction to the agent."""
        return f"go to {' '.join(self.scene.things[self.target] or ())}."

    @property
    def is_done(self) -> bool:
        """True where the agent is on the thing that was named."""
        return self.agent == self.target

    def step(self, action: str) -> "World":
        """The state after an action; text that is none leaves it as it is."""
        row, column = divmod(self.agent, SIDE)
        down, right = MOVES.get(action, (0, 0))
        row, column = (min(max(place, 0), SIDE - 1) for place in (row + down, column + right))
        return dataclasses.replace(self, agent=row * SIDE + column)

    def distance(self) -> int:
        """Steps to the target."""
        here, there = divmod(self.agent, SIDE), divmod(self.target, SIDE)
        return abs(here[0] - there[0]) + abs(here[1] - there[1])

    def best_actions(self) -> list[str]:
        """Actions that bring the agent nearer."""
        return [action for action in MOVES if self.step(action).distance() < self.distance()]


def draw(world: World, rng: np.random.Generator) -> UInt8[np.ndarray, "24 24 3"]:
    """Image of the whole grid, the agent included."""
    image = shapes.draw(world.scene, rng)
    row, column = divmod(world.agent, SIDE)
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    cell = image[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)]
    cell[y**2 + x**2 < 8] = 20
    return image


def make_world(split: Split, rng: np.random.Generator, *, things: int = 2) -> World:
    """A first state of a split, with so many different things."""
    pool: list[Thing] = list(itertools.product(shapes.COLOURS, shapes.KINDS))
    while True:
        cells = rng.choice(SIDE * SIDE, things + 1, replace=False).tolist()
        held: list[Thing | None] = [None for _ in range(SIDE * SIDE)]
        for cell, number in zip(cells[1:], rng.choice(len(pool), things, replace=False), strict=True):
            held[cell] = pool[number]
        world = World(Scene(tuple(held)), cells[0], cells[1])
        if world.scene.is_held_out == (split == "heldout"):
            return world


def observation(world: World, rng: np.random.Generator) -> dict[str, Any]:
    """A state as a row: `prompt`, `images`, and the `actions` that bring the agent nearer."""
    return {
        "prompt": world.instruction,
        "images": [draw(world, rng)],
        "actions": world.best_actions(),
    }


def rows(
    split: Split, count: int, seed: int, *, slip_rate: float = 0.0, things: int = 2
) -> list[dict[str, Any]]:
    """States with an action to imitate as `completion`, which leads away in a share of them."""
    rng = np.random.default_rng([seed, *b"grid world", *split.encode()])
    found = []
    for _ in range(count):
        row = observation(make_world(split, rng, things=things), rng)
        others = [action for action in MOVES if action not in row["actions"]]
        choices = others if rng.random() < slip_rate else row["actions"]
        found.append(row | {"completion": choices[rng.integers(len(choices))]})
    return found


def success_rate(
    act: ActFn, count: int, seed: int, *, split: Split = "heldout", max_steps: int = 6, things: int = 2
) -> float:
    """Share of episodes that end on the thing that was named, within so many actions.

    Args:
      act: asked once a step, for all episodes at a time.
    """
    rng = np.random.default_rng([seed, *b"episodes", *split.encode()])
    worlds = [make_world(split, rng, things=things) for _ in range(count)]
    for _ in range(max_steps):
        actions = act([observation(world, rng) for world in worlds])
        worlds = [
            world if world.is_done else world.step(action)
            for world, action in zip(worlds, actions, strict=True)
        ]
    return float(np.mean([world.is_done for world in worlds]))


def nearer(
    prompts: Sequence[str], completions: Sequence[str], *, actions: Sequence[Sequence[str]], **_: Any
) -> list[float]:
    """1 for an action that brings the agent nearer, else 0; a reward function."""
    del prompts
    return [float(said in best) for said, best in zip(completions, actions, strict=True)]
