"""Ranking and calibration against counting."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evaluation.classification import brier_score, reliability, roc_auc


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(5, size=30).astype(float), rng.random(30) < 0.4
        pairs = itertools.product(scores[labels], scores[~labels])
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
        assert roc_auc(scores, labels) == pytest.approx(np.mean(wins))
        assert roc_auc(np.exp(scores), labels) == roc_auc(scores, labels)  # only the order counts
        assert roc_auc(-scores, labels) == pytest.approx(1 - np.mean(wins))
    assert math.isnan(roc_auc([1.0, 2.0], [True, True]))


def test_reliability_and_brier():
    chances, labels = [0.0, 0.1, 0.95, 1.0, 0.5], [False, True, True, False, True]
    curve = reliability(chances, labels, bins=2)
    np.testing.assert_allclose(curve.predicted, [0.05, 2.45 / 3])
    np.testing.assert_allclose(curve.observed, [0.5, 2 / 3])
    assert curve.counts.tolist() == [2, 3]
    assert curve.error == pytest.approx((2 * 0.45 + 3 * 0.15) / 5)
    assert reliability([0.05], [False]).counts.tolist() == [1]
    assert brier_score(chances, labels) == pytest.approx((0.81 + 0.0025 + 1 + 0.25) / 5)


def test_a_calibrated_forecaster_has_a_small_error():
    rng = np.random.default_rng(0)
    chances = rng.random(20_000)
    labels = rng.random(20_000) < chances
    assert reliability(chances, labels).error < 0.02
    assert reliability(chances**3, labels).error > 0.1
    assert brier_score(chances, labels) < brier_score(chances**3, labels)


def test_bad_input():
    with pytest.raises(ValueError, match="as many"):
        roc_auc([0.5], [True, False])
    with pytest.raises(ValueError, match="probabilities"):
        reliability([1.5], [True])
