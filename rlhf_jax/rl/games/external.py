"""Games of pgx (Koyamada et al. 2023) as games of ours; it is an extra: `pip install 'rlhf_jax[games]'`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import tree_where
from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.rl.games.interface import Position

LENGTHS = {
    "tic_tac_toe": 9,
    "connect_four": 42,
    "othello": 120,
    "hex": 122,
    "go_9x9": 162,
    "animal_shogi": 256,
    "gardner_chess": 256,
    "chess": 512,
}
"""Games in which players move in turn, see everything and throw no dice, and moves of the longest."""


@dataclasses.dataclass(frozen=True)
class PgxGame:
    """A game by its name in pgx, one of `LENGTHS`; `Position.board` is the state of pgx.

    Raises:
      UserError: there is no such game here, or pgx is not installed.
    """

    name: str

    def __post_init__(self):
        """Refuses what cannot be played."""
        if self.name not in LENGTHS:
            raise UserError(f"pgx:{self.name}: choose one of {', '.join(LENGTHS)}")
        _environment(self.name)

    @property
    def num_actions(self) -> int:
        """Number of actions, legal or not."""
        return _environment(self.name).num_actions

    @property
    def length(self) -> int:
        """Moves of the longest game, passes included."""
        return LENGTHS[self.name]

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of what `observe` gives."""
        return tuple(_environment(self.name).observation_shape)

    def initial_position(self) -> Position:
        """The first position; the key decides only which of pgx's two players is called the first."""
        state = _environment(self.name).init(jax.random.key(0))
        return Position(state, jnp.int8(1), jnp.int8(0), jnp.bool_(False))

    def legal(self, position: Position) -> Bool[Array, "A"]:
        """Actions that may be taken; all of them where the game is over, for nothing moves there."""
        return position.board.legal_action_mask | position.terminated

    def play(self, position: Position, action: Int[Array, ""]) -> Position:
        """The position after a legal action; a game that is over stays as it is."""
        before = position.board
        state = _environment(self.name).step(before, action)
        won = jnp.sign(state.rewards[before.current_player]).astype(jnp.int8)  # for who has just moved
        after = Position(state, -position.player, won * position.player, state.terminated | state.truncated)
        return tree_where(position.terminated, position, after)

    def observe(self, position: Position) -> Float[Array, "*S"]:
        """Observation of the player to move, as pgx encodes it."""
        return position.board.observation.astype(jnp.float32)


@functools.cache
def _environment(name: str) -> Any:
    try:
        import pgx  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("games of pgx need it: pip install 'rlhf_jax[games]'") from None
    return pgx.make(name)
