"""Counts, ranking and calibration against counting, and against scikit-learn (frozen)."""

import itertools
import json
import math
import pathlib

import numpy as np
import pytest

from rlhf_jax.evaluation import classification
from rlhf_jax.evaluation.classification import (
    average_precision,
    brier_score,
    confusion,
    precision_recall_curve,
    reliability,
    roc_auc,
)
from rlhf_jax.evaluation.statistics import bootstrap_interval

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[2] / "golden" / "evaluation_peers.json").read_text(encoding="utf-8")
)["labels"]


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


def test_numbers_are_those_of_sklearn():
    scores, truth = GOLDEN["scores"], GOLDEN["truth"]
    assert roc_auc(scores, truth) == pytest.approx(GOLDEN["roc_auc"])
    assert average_precision(scores, truth) == pytest.approx(GOLDEN["average_precision"])
    precisions, recalls = precision_recall_curve(scores, truth)
    np.testing.assert_allclose(precisions, GOLDEN["curve_precision"])
    np.testing.assert_allclose(recalls, GOLDEN["curve_recall"])
    chances = 1 / (1 + np.exp(-np.array(scores)))
    assert brier_score(chances, truth) == pytest.approx(GOLDEN["brier_score"])
    counts = confusion(GOLDEN["answers"], truth)
    for name in ("precision", "recall", "f1", "accuracy"):
        assert getattr(classification, name)(counts) == pytest.approx(GOLDEN[name]), name


def test_counts_at_the_edges():
    none = confusion([False, False], [False, False])
    assert classification.accuracy(none) == 1
    assert all(math.isnan(fn(none)) for fn in (classification.precision, classification.recall))
    assert math.isnan(classification.f1(none))
    assert math.isnan(average_precision([0.1, 0.2], [False, False]))
    assert average_precision([0.5] * 4, [True, False, False, False]) == 0.25  # ties are called alike


def test_intervals_leave_out_resamples_of_one_class():
    scores, labels = [0.1, 0.9, 0.5], [False, True, False]
    interval = bootstrap_interval(scores, labels, statistic_fn=roc_auc, resamples=200)
    assert interval.mean == 1.0
    assert (interval.low, interval.high) == (1.0, 1.0)
    hopeless = bootstrap_interval(scores, [True] * 3, statistic_fn=roc_auc, resamples=20)
    assert math.isnan(hopeless.mean)
    assert math.isnan(hopeless.low)


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
