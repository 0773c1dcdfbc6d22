"""Game interface for players, matches and AlphaZero: pure functions of one position; `vmap` gives many."""

from typing import Any, Protocol, runtime_checkable

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int


@pytree_dataclass
class Position:
    """A position, or an array of them [*B], and whether the game is over.

    Attributes:
      board: where everything stands, as the game has it.
      player: who moves next, 1 or -1.
      winner: 1, -1, or 0 where nobody has won.
      terminated: the game is over.
    """

    board: Any
    player: Int[Array, "*B"]
    winner: Int[Array, "*B"]
    terminated: Bool[Array, "*B"]


@runtime_checkable
class Game(Protocol):
    """A game of two players, 1, who begins, and -1, who move in turn, with full information and no chance."""

    @property
    def num_actions(self) -> int:
        """Number of actions, legal or not."""
        ...

    @property
    def length(self) -> int:
        """Moves of the longest game."""
        ...

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of what `observe` gives."""
        ...

    def initial_position(self) -> Position:
        """The first position."""
        ...

    def legal(self, position: Position) -> Bool[Array, "A"]:
        """Actions that may be taken; all of them where the game is over, for nothing moves there."""
        ...

    def play(self, position: Position, action: Int[Array, ""]) -> Position:
        """The position after a legal action; a game that is over stays as it is."""
        ...

    def observe(self, position: Position) -> Float[Array, "*S"]:
        """Observation of the player to move."""
        ...
