"""AlphaZero: signs of the search on solved positions, outcomes, the loss, and play that never loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl import games
from rlhf_jax.rl.algorithms import alphazero
from rlhf_jax.rl.games import CONNECT_FOUR, TIC_TAC_TOE, Position

VALUES = games.solve(TIC_TAC_TOE)
LINES = TIC_TAC_TOE.lines().tolist()


def is_over(board):
    return 0 not in board or any(abs(sum(board[cell] for cell in line)) == 3 for line in LINES)


OPEN = [board for board in VALUES if not is_over(board)]


def positions(boards):
    """Positions seen by the first player, who is to move."""
    count = len(boards)
    stones = jnp.asarray(boards, jnp.int8).reshape(count, 3, 3)
    return Position(stones, jnp.ones(count, jnp.int8), jnp.zeros(count, jnp.int8), jnp.zeros(count, bool))


def turned(some):
    """The same positions with the colours changed."""
    return dataclasses.replace(some, board=-some.board, player=-some.player)


def ignorant(_, obs):
    """A network that knows nothing."""
    return jnp.zeros((len(obs), 9)), jnp.zeros(len(obs))


def exact(_, obs):
    """A network with no policy and the exact value."""
    powers = 3 ** np.arange(9)
    table = np.zeros(3**9, np.float32)
    for board, value in VALUES.items():
        table[(np.asarray(board) + 1) @ powers] = value
    mine = (obs[..., 0] - obs[..., 1]).reshape(len(obs), 9).astype(jnp.int32)
    return jnp.zeros((len(obs), 9)), jnp.asarray(table)[(mine + 1) @ powers]


def lines_lost(choose):
    actions = np.asarray(choose(positions(OPEN), jax.random.key(0))).tolist()
    policy = dict(zip(OPEN, actions, strict=True)).__getitem__
    return sum(games.losing_lines(TIC_TAC_TOE, VALUES, policy, first=first) for first in (True, False))


def wins_at_once(board, action):
    after = list(board)
    after[action] = 1
    return any(all(after[cell] == 1 for cell in line) for line in LINES)


@pytest.mark.slow
def test_search_wins_at_once_and_never_moves_illegally():
    """With no knowledge at all, for either colour: the signs and the terminal states are right."""
    boards = [b for b in OPEN if any(wins_at_once(b, a) for a in range(9) if b[a] == 0)]
    some = positions(boards)
    choose = jax.jit(alphazero.make_player(TIC_TAC_TOE, ignorant, None, num_simulations=48))
    for seen in (some, turned(some)):
        actions = np.asarray(choose(seen, jax.random.key(0)))
        assert all(board[action] == 0 for board, action in zip(boards, actions, strict=True))
        wins = [wins_at_once(board, action) for board, action in zip(boards, actions, strict=True)]
        assert np.mean(wins) == 1.0


@pytest.mark.slow
def test_search_with_the_exact_value_keeps_it():
    """The value of the position after my move is my opponent's: every sign wrong would show."""
    choose = jax.jit(alphazero.make_player(TIC_TAC_TOE, exact, None, num_simulations=64))
    actions = np.asarray(choose(positions(OPEN), jax.random.key(0))).tolist()
    policy = dict(zip(OPEN, actions, strict=True))
    best = [policy[board] in games.best_moves(TIC_TAC_TOE, VALUES, board) for board in OPEN]
    assert np.mean(best) > 0.99  # means over what was visited are not maxima


def test_outcomes_against_a_loop():
    rng = np.random.default_rng(0)
    over = rng.random((20, 16)) < 0.15
    reward = np.where(over, rng.integers(0, 2, over.shape), 0).astype(np.float32)
    outcome, ended = map(np.asarray, alphazero.outcomes(jnp.asarray(reward), jnp.asarray(over)))
    for game in range(16):
        for ply in range(20):
            ends = [t for t in range(ply, 20) if over[t, game]]
            assert ended[ply, game] == bool(ends)
            expected = reward[ends[0], game] * (-1) ** (ends[0] - ply) if ends else 0
            assert outcome[ply, game] == expected


def make_batch(count=6, actions=7):
    rng = np.random.default_rng(0)
    legal = rng.random((count, actions)) < 0.6
    legal[:, 0] = True
    policy = np.where(legal, rng.random(legal.shape), 0)
    policy /= policy.sum(axis=1, keepdims=True)
    outcome, ended = rng.integers(-1, 2, count), np.arange(count) % 3 > 0
    arrays = (np.zeros((count, 6, 7, 2)), legal, policy, np.where(ended, outcome, np.nan), ended)
    return alphazero.Batch(*(jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32) for x in arrays))


def test_loss_against_numpy_and_its_gradients():
    batch, rng = make_batch(), np.random.default_rng(1)
    logits, values = rng.normal(size=(6, 7)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    legal, policy, ended = (np.asarray(x) for x in (batch.legal, batch.policy, batch.ended))
    expected = 0.0
    for row in range(6):
        kept = legal[row]
        logp = logits[row][kept] - np.log(np.exp(logits[row][kept]).sum())
        expected -= (policy[row][kept] * logp).sum() / 6
    expected += 0.5 * np.mean((values[ended] - np.asarray(batch.outcome)[ended]) ** 2)

    def loss(logits, values):
        return alphazero.alphazero_loss(logits, values, batch, value_coef=0.5)[0]

    assert float(loss(logits, values)) == pytest.approx(expected, rel=1e-5)
    by_logits, by_values = jax.grad(loss, (0, 1))(jnp.asarray(logits), jnp.asarray(values))
    assert (np.asarray(by_logits)[~legal] == 0).all()
    assert np.isfinite(by_logits).all()
    assert (np.asarray(by_values)[~ended] == 0).all()
    assert (np.asarray(by_values)[ended] != 0).all()


@pytest.mark.slow
def test_an_iteration_plays_whole_games_and_learns():
    config = alphazero.Config(
        iterations=2, num_games=8, plies=6, num_simulations=4, widths=(16,), num_minibatches=2
    )
    # It runs twice: compiled quickly rather than well.
    quick = {"xla_backend_optimization_level": 0, **compiler_options()}
    train = jax.jit(alphazero.make_train(config, CONNECT_FOUR), compiler_options=quick)
    state, history = train(jax.random.key(0), alphazero.Hyper())
    again, _ = train(jax.random.key(0), alphazero.Hyper())
    for one, two in zip(*map(jax.tree.leaves, (state.learner.params, again.learner.params)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert int(state.learner.steps) == config.optimizer_steps
    assert np.isfinite(history["loss"]).all()
    stones = np.asarray(state.positions.board)
    player = np.where((stones != 0).sum(axis=(1, 2)) % 2, -1, 1)
    np.testing.assert_array_equal(state.positions.player, player)
    assert not np.asarray(state.positions.terminated).any()


@pytest.mark.slow
def test_tic_tac_toe_is_never_lost_after_training():
    """Over every reply of the opponent, with search at play."""
    train = jax.jit(alphazero.make_train(alphazero.Config(iterations=120), TIC_TAC_TOE))
    state, _ = train(jax.random.key(0), alphazero.Hyper())
    _, apply = alphazero.make_network(alphazero.Config(), TIC_TAC_TOE)
    for num_simulations, most in ((32, 0), (0, 40)):
        player = alphazero.make_player(
            TIC_TAC_TOE, apply, state.learner.params, num_simulations=num_simulations
        )
        assert lines_lost(jax.jit(player)) <= most
