"""k in a row on a grid, as pure functions: tic-tac-toe, connect four, and what lies between them.

    game = TIC_TAC_TOE
    position = game.initial_position()
    position = game.play(position, 4)

One position each; `vmap` gives many. Players are 1, who begins, and -1. A board holds 1, -1, or 0 for an
empty cell; row 0 is at the top.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.trees import tree_where
from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.rl.games.interface import Position


@dataclasses.dataclass(frozen=True)
class LineGame:
    """The rules: who first has `connect` in a row, along a row, a column or a diagonal, wins.

    Attributes:
      rows: of the grid.
      columns: of the grid.
      connect: how many in a row win.
      gravity: an action is a column, whose lowest empty cell is taken; else a cell, row by row.
    """

    rows: int
    columns: int
    connect: int
    gravity: bool

    def __post_init__(self):
        """Refuses rules under which nobody can win."""
        if not 2 <= self.connect <= max(self.rows, self.columns) or min(self.rows, self.columns) < 1:
            raise ValueError(f"nobody can win this game: {self}")

    @property
    def num_actions(self) -> int:
        """Number of actions, legal or not."""
        return self.columns if self.gravity else self.rows * self.columns

    @property
    def length(self) -> int:
        """Moves of the longest game."""
        return self.rows * self.columns

    @property
    def obs_shape(self) -> tuple[int, int, int]:
        """Shape of what `observe` gives."""
        return self.rows, self.columns, 2

    def lines(self) -> np.ndarray:
        """[lines, connect]: the cells of every winning line, numbered row by row."""
        found = []
        for row, column in itertools.product(range(self.rows), range(self.columns)):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                cells = [(row + down * step, column + right * step) for step in range(self.connect)]
                if all(0 <= r < self.rows and 0 <= c < self.columns for r, c in cells):
                    found.append([r * self.columns + c for r, c in cells])
        return np.asarray(found)

    def initial_position(self) -> Position:
        """The empty board."""
        board = jnp.zeros((self.rows, self.columns), jnp.int8)
        return Position(board, jnp.int8(1), jnp.int8(0), jnp.bool_(False))

    def legal(self, position: Position) -> Bool[Array, "A"]:
        """Actions that may be taken; all of them where the game is over, for nothing moves there."""
        empty = position.board == 0
        free = empty[0] if self.gravity else empty.reshape(-1)
        return free | position.terminated

    def play(self, position: Position, action: Int[Array, ""]) -> Position:
        """The position after a legal action; what it is after an illegal one is not defined.

        A game that is over stays as it is.
        """
        if self.gravity:
            row, column = jnp.sum(position.board[:, action] == 0) - 1, action
        else:
            row, column = action // self.columns, action % self.columns
        board = position.board.at[row, column].set(position.player)
        won = jnp.any(jnp.sum(board.reshape(-1)[self.lines()], axis=1) == self.connect * position.player)
        after = Position(
            board=board,
            player=-position.player,
            winner=jnp.where(won, position.player, 0).astype(jnp.int8),
            terminated=won | jnp.all(board != 0),
        )
        return tree_where(position.terminated, position, after)

    def observe(self, position: Position) -> Float[Array, "R C 2"]:
        """Two planes: stones of the player to move, and of the other."""
        mine = position.board * position.player
        return jnp.stack([mine == 1, mine == -1], axis=-1).astype(jnp.float32)


TIC_TAC_TOE = LineGame(rows=3, columns=3, connect=3, gravity=False)
CONNECT_FOUR = LineGame(rows=6, columns=7, connect=4, gravity=True)
SMALL_CONNECT_FOUR = LineGame(rows=5, columns=5, connect=4, gravity=True)
