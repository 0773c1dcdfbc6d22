"""The exact value of every position of a small game. Plain Python, apart from the JAX rules."""

from collections.abc import Callable, Mapping

from rlhf_jax.rl.games.lines import LineGame

Board = tuple[int, ...]
"""Cells row by row, from the mover's side: 1 own, -1 the other's, 0 empty."""


def solve(game: LineGame) -> dict[Board, int]:
    """Minimax values (Zermelo 1913) of all positions that can arise, for the player to move: 1, 0 or -1.

    Positions that are over are among them. Meant for games of some 10^5 positions: tic-tac-toe has 5,478.
    """
    lines = game.lines().tolist()
    values: dict[Board, int] = {}

    def value(board: Board) -> int:
        if board not in values:
            if _has_line(lines, board):
                values[board] = -1  # the other one has just won
            elif 0 not in board:
                values[board] = 0
            else:
                values[board] = max(-value(after) for after in _moves(game, board).values())
        return values[board]

    value((0,) * game.length)
    return values


def best_moves(game: LineGame, values: Mapping[Board, int], board: Board) -> set[int]:
    """The actions that keep the exact value of a position; none where the game is over."""
    if is_over(game, board):
        return set()
    return {action for action, after in _moves(game, board).items() if -values[after] == values[board]}


def losing_lines(
    game: LineGame, values: Mapping[Board, int], choose: Callable[[Board], int], *, first: bool
) -> int:
    """Number of lines of play that a deterministic player loses, over every reply of the opponent.

    Args:
      choose: the player: a board from its own side -> an action.
      first: whether the player begins.
    """
    if values[(0,) * game.length] != 0:
        raise ValueError(f"{game} is not a draw, so that one side must lose")
    lost = 0
    waiting = [((0,) * game.length, first)]
    while waiting:
        board, is_mine = waiting.pop()
        moves = _moves(game, board)
        if is_over(game, board):
            lost += is_mine and _has_lost(game, board)
        elif is_mine:
            waiting.append((moves[choose(board)], False))
        else:
            waiting += [(after, True) for after in moves.values()]
    return lost


def is_over(game: LineGame, board: Board) -> bool:
    """True where the game is over: the last move won, or the board is full."""
    return 0 not in board or _has_lost(game, board)


def _moves(game: LineGame, board: Board) -> dict[int, Board]:
    """Action -> the position after it, seen by the other player."""
    found = {}
    for action in range(game.num_actions):
        cells = range(action, game.length, game.columns) if game.gravity else [action]
        empty = [cell for cell in cells if board[cell] == 0]
        if empty:
            found[action] = tuple(-1 if cell == empty[-1] else -stone for cell, stone in enumerate(board))
    return found


def _has_lost(game: LineGame, board: Board) -> bool:
    return _has_line(game.lines().tolist(), board)


def _has_line(lines: list[list[int]], board: Board) -> bool:
    """True where the other player has a line."""
    return any(all(board[cell] == -1 for cell in line) for line in lines)
