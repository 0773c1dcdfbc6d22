"""Two-player games as pure functions, their exact solution, and matches between players."""

from rlhf_jax.rl.games.external import PgxGame
from rlhf_jax.rl.games.interface import Game, Position
from rlhf_jax.rl.games.lines import CONNECT_FOUR, SMALL_CONNECT_FOUR, TIC_TAC_TOE, LineGame
from rlhf_jax.rl.games.matches import ChooseFn, play_match, random_choice, random_openings
from rlhf_jax.rl.games.solver import best_moves, is_over, losing_lines, solve

__all__ = [
    "CONNECT_FOUR",
    "SMALL_CONNECT_FOUR",
    "TIC_TAC_TOE",
    "ChooseFn",
    "Game",
    "LineGame",
    "PgxGame",
    "Position",
    "best_moves",
    "is_over",
    "losing_lines",
    "play_match",
    "random_choice",
    "random_openings",
    "solve",
]
