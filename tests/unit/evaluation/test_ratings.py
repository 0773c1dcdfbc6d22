"""Elo ratings: closed forms, recovery of what made the scores, and what has no rating."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation.ratings import bradley_terry_ratings


def test_two_players_in_closed_form():
    found = bradley_terry_ratings([[0, 30], [10, 0]], prior=0)
    assert found.elo[0] == 0
    assert found.elo[1] == pytest.approx(-400 * math.log10(3))
    scale = 400 / math.log(10)
    assert found.error[1] == pytest.approx(scale / math.sqrt(40 * 0.75 * 0.25))
    assert found.error[0] == 0


def test_expected_scores_give_back_the_ratings():
    elo = np.array([0.0, 200.0, -150.0, 700.0])
    chances = 1 / (1 + 10 ** ((elo[None] - elo[:, None]) / 400))
    np.fill_diagonal(chances, 0)
    found = bradley_terry_ratings(100 * chances, prior=0)
    np.testing.assert_allclose(found.elo, elo, atol=1e-6)
    moved = bradley_terry_ratings(100 * chances, prior=0, anchor=3)
    np.testing.assert_allclose(moved.elo, elo - 700, atol=1e-6)
    order = [2, 0, 3, 1]
    shuffled = bradley_terry_ratings(100 * chances[np.ix_(order, order)], prior=0, anchor=1)
    np.testing.assert_allclose(shuffled.elo, elo[order], atol=1e-6)


def test_errors_are_those_of_repeated_tournaments():
    rng = np.random.default_rng(0)
    elo = np.array([0.0, 100.0, 250.0])
    chances = 1 / (1 + 10 ** ((elo[None] - elo[:, None]) / 400))
    found = []
    for _ in range(400):
        wins = np.triu(rng.binomial(200, chances), 1)
        found.append(bradley_terry_ratings(wins + np.triu(200 - wins, 1).T, prior=0))
    ratings = np.array([each.elo for each in found])
    np.testing.assert_allclose(ratings.std(axis=0)[1:], found[0].error[1:], rtol=0.15)
    np.testing.assert_allclose(ratings.mean(axis=0), elo, atol=6)


def test_the_prior_keeps_perfect_scores_finite():
    perfect = [[0, 20, 20], [0, 0, 20], [0, 0, 0]]
    with pytest.raises(ValueError, match="no finite ratings"):
        bradley_terry_ratings(perfect, prior=0)
    elo = bradley_terry_ratings(perfect).elo
    assert 0 > elo[1] > elo[2] > -3000
    with pytest.raises(ValueError, match="never met"):
        bradley_terry_ratings([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="oneself"):
        bradley_terry_ratings([[1, 1], [1, 0]])
