"""Matches between two players, many games at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import tree_where
from rlhf_jax.core.types import Array, Int, PRNGKeyArray
from rlhf_jax.rl.games.interface import Game, Position

ChooseFn = Callable[[Position, PRNGKeyArray], Int[Array, "B"]]
"""A player: (positions [B], key) -> actions."""


def random_choice(game: Game) -> ChooseFn:
    """The player to whom all legal actions are alike."""

    def choose(positions: Position, key: PRNGKeyArray) -> Int[Array, "B"]:
        return jax.random.categorical(key, jnp.where(jax.vmap(game.legal)(positions), 0.0, -jnp.inf))

    return choose


def random_openings(
    game: Game, key: PRNGKeyArray, plies: Int[Array, "B"], *, most: int | None = None
) -> Position:
    """Positions after some random moves, so that players without randomness play different games.

    Args:
      plies: moves of each game.
      most: the greatest of `plies`, where they are traced.
    """
    positions = jax.vmap(lambda _: game.initial_position())(plies)
    choose = random_choice(game)

    def step(positions: Position, now: tuple[Array, PRNGKeyArray]) -> tuple[Position, None]:
        ply, key = now
        after = jax.vmap(game.play)(positions, choose(positions, key))
        return jax.vmap(tree_where)(ply < plies, after, positions), None

    count = int(jnp.max(plies)) if most is None else most
    return jax.lax.scan(step, positions, (jnp.arange(count), jax.random.split(key, count)))[0]


def play_match(
    game: Game, ours: ChooseFn, theirs: ChooseFn, openings: Position, key: PRNGKeyArray
) -> Int[Array, "2 B"]:
    """Plays every opening twice, each side beginning once.

    Returns:
      1 where we won, 0 for a draw, -1 where they won: row 0 where we moved first in the opening, row 1 else.
    """
    # In the one half of the games we are to move, in the other they are; then the halves change places.
    sides = openings.player  # who moves first after the opening

    def step(halves: tuple[Position, Position], key: PRNGKeyArray):
        our_key, their_key = jax.random.split(key)
        to_us, to_them = halves
        by_us = jax.vmap(game.play)(to_us, ours(to_us, our_key))
        by_them = jax.vmap(game.play)(to_them, theirs(to_them, their_key))
        return (by_them, by_us), None

    # An even number of steps, so that each half ends where it began.
    steps = game.length + game.length % 2
    (first, second), _ = jax.lax.scan(step, (openings, openings), jax.random.split(key, steps))
    return jnp.stack([first.winner * sides, -second.winner * sides]).astype(jnp.int32)
