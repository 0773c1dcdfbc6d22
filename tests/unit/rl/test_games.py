"""Games: rules against plain Python, the exact solution, matches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rl import games
from rlhf_jax.rl.games import CONNECT_FOUR, SMALL_CONNECT_FOUR, TIC_TAC_TOE, LineGame, Position


def has_line(board, connect):
    rows, columns = board.shape
    for row in range(rows):
        for column in range(columns):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                end = row + down * (connect - 1), column + right * (connect - 1)
                if 0 <= end[0] < rows and 0 <= end[1] < columns:
                    cells = [board[row + down * k, column + right * k] for k in range(connect)]
                    if abs(sum(cells)) == connect:
                        return True
    return False


@pytest.mark.parametrize("game", [TIC_TAC_TOE, SMALL_CONNECT_FOUR, CONNECT_FOUR], ids=str)
def test_random_games_against_plain_rules(game):
    play, legal = jax.jit(jax.vmap(game.play)), jax.jit(jax.vmap(game.legal))
    rng, count = np.random.default_rng(0), 64
    positions = jax.vmap(lambda _: game.initial_position())(jnp.arange(count))
    boards = np.zeros((count, game.rows, game.columns), int)
    over, winner, player = np.zeros(count, bool), np.zeros(count, int), 1
    for _ in range(game.length):
        allowed = np.asarray(legal(positions))
        actions = np.array([rng.choice(np.flatnonzero(row)) for row in allowed])
        for k in np.flatnonzero(~over):
            free = boards[k, 0] == 0 if game.gravity else boards[k].reshape(-1) == 0
            np.testing.assert_array_equal(allowed[k], free)
            action = actions[k]
            if game.gravity:
                cell = np.flatnonzero(boards[k, :, action] == 0)[-1], action
            else:
                cell = divmod(action, game.columns)
            boards[k][cell] = player
            winner[k] = player * has_line(boards[k], game.connect)
            over[k] = winner[k] != 0 or (boards[k] != 0).all()
        positions = play(positions, jnp.asarray(actions))
        player = -player
        np.testing.assert_array_equal(positions.board, boards)
        np.testing.assert_array_equal(positions.winner, winner)
        np.testing.assert_array_equal(positions.terminated, over)
        assert (np.asarray(positions.player)[~over] == player).all()
    assert over.all()
    assert {1, -1} <= set(winner)


def test_observations_are_the_movers():
    position = TIC_TAC_TOE.play(TIC_TAC_TOE.play(TIC_TAC_TOE.initial_position(), 4), 0)
    planes = np.asarray(TIC_TAC_TOE.observe(position))
    assert planes[1, 1].tolist() == [1, 0]
    assert planes[0, 0].tolist() == [0, 1]
    assert planes.sum() == 2


def test_tic_tac_toe_is_solved():
    values = games.solve(TIC_TAC_TOE)
    assert len(values) == 5478
    assert values[(0,) * 9] == 0
    assert games.best_moves(TIC_TAC_TOE, values, (0,) * 9) == set(range(9))
    corner = (-1, 0, 0, 0, 0, 0, 0, 0, 0)
    assert games.best_moves(TIC_TAC_TOE, values, corner) == {4}  # only the centre holds against a corner
    perfect = {board: min(games.best_moves(TIC_TAC_TOE, values, board), default=-1) for board in values}
    for first in (True, False):
        assert games.losing_lines(TIC_TAC_TOE, values, perfect.__getitem__, first=first) == 0
        assert games.losing_lines(TIC_TAC_TOE, values, lambda b: b.index(0), first=first) > 0
    with pytest.raises(ValueError, match="nobody can win"):
        LineGame(3, 3, 4, False)


@pytest.mark.slow
def test_small_games_of_known_value():
    assert games.solve(LineGame(2, 2, 2, False))[(0,) * 4] == 1  # the second stone makes a line
    assert games.solve(LineGame(4, 4, 4, True))[(0,) * 16] == 0  # connect four on 4 x 4 is a draw


def table_player(game, moves):
    """A player that looks its moves up by the board seen from its side, as a number in base 3."""
    powers = 3 ** np.arange(game.length)
    table = np.zeros(3**game.length, np.int32)
    for board, move in moves.items():
        table[(np.asarray(board) + 1) @ powers] = move

    def choose(positions: Position, key):
        del key
        mine = positions.board * positions.player[:, None, None]
        return jnp.asarray(table)[(mine.reshape(len(mine), -1).astype(jnp.int32) + 1) @ powers]

    return choose


def test_matches():
    game, values = TIC_TAC_TOE, games.solve(TIC_TAC_TOE)
    moves = {board: min(games.best_moves(game, values, board), default=0) for board in values}
    perfect, random = table_player(game, moves), games.random_choice(game)
    openings = games.random_openings(game, jax.random.key(0), jnp.zeros(200, int))

    @jax.jit
    def matches(key):
        pairs = (perfect, random), (random, perfect), (perfect, perfect)
        return [games.play_match(game, *pair, openings, key) for pair in pairs]

    results, turned, itself = map(np.asarray, matches(jax.random.key(1)))
    assert results.shape == (2, 200)
    assert (results >= 0).all()
    assert (results[0] == 1).mean() > 0.85
    assert (results[1] == 1).mean() > 0.6
    assert (results[0] == 1).mean() > (results[1] == 1).mean()
    assert (turned <= 0).all()
    assert (itself == 0).all()


def test_openings():
    plies = jnp.array([0, 1, 2, 3] * 8)
    openings = games.random_openings(CONNECT_FOUR, jax.random.key(0), plies, most=3)
    np.testing.assert_array_equal((openings.board != 0).sum(axis=(1, 2)), plies)
    np.testing.assert_array_equal(openings.player, jnp.where(plies % 2, -1, 1))
    assert len({board.tobytes() for board in np.asarray(openings.board)}) > 12


@pytest.mark.parametrize(("name", "ours"), [("tic_tac_toe", TIC_TAC_TOE), ("connect_four", CONNECT_FOUR)])
def test_games_of_pgx_are_played_as_ours(name, ours):
    """The same random moves, to the end and past it."""
    pytest.importorskip("pgx")
    theirs = games.PgxGame(name)
    assert (theirs.num_actions, theirs.length, theirs.obs_shape) == (
        ours.num_actions,
        ours.length,
        ours.obs_shape,
    )

    def step(both, key):
        action = jax.random.categorical(key, jnp.where(ours.legal(both[0]), 0.0, -jnp.inf))
        both = ours.play(both[0], action), theirs.play(both[1], action)
        facts = [(x.player, x.winner, x.terminated) for x in both]
        return both, (*facts, ours.legal(both[0]), theirs.legal(both[1]))

    def play(key):
        return jax.lax.scan(
            step, (ours.initial_position(), theirs.initial_position()), jax.random.split(key, ours.length + 2)
        )[1]

    one, two, expected, legal = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0), 64))
    for name, a, b in zip(("player", "winner", "terminated"), one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(legal, expected)
    assert set(np.unique(one[1])) == {-1, 0, 1}


def test_games_that_cannot_be_played_are_named():
    with pytest.raises(UserError, match="pgx:backgammon: choose one of tic_tac_toe, "):
        games.PgxGame("backgammon")
