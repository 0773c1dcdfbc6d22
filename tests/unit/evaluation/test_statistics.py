"""Intervals against scipy, closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    interquartile_mean,
    mean_interval,
    paired_bootstrap,
    probability_of_improvement,
    stratified_bootstrap_interval,
    student_t_quantile,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 15, 29, 100, 1001])
@pytest.mark.parametrize("probability", [0.001, 0.3, 0.6, 0.9, 0.975, 0.9995])
def test_student_quantiles(degrees, probability):
    expected = stats.t.ppf(probability, degrees)
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


def test_student_median_and_bad_arguments():
    assert student_t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)
    for probability, degrees in [(0.5, 0), (0, 3), (1, 3)]:
        with pytest.raises(ValueError, match="no Student quantile"):
            student_t_quantile(probability, degrees)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=100, deadline=None)
def test_mean_intervals(samples, confidence):
    interval = mean_interval(samples, confidence=confidence)
    half = (
        stats.t.ppf((1 + confidence) / 2, len(samples) - 1)
        * np.std(samples, ddof=1)
        / math.sqrt(len(samples))
    )
    assert interval.mean == pytest.approx(np.mean(samples), abs=1e-9)
    assert interval.high - interval.mean == pytest.approx(half, rel=1e-6, abs=1e-9)
    assert interval.mean - interval.low == pytest.approx(half, rel=1e-6, abs=1e-9)


def test_one_seed_has_no_interval():
    interval = mean_interval([0.25])
    assert interval.mean == 0.25
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    for samples in ([], 3.0, [[1.0]]):
        with pytest.raises(ValueError, match="at least one sample"):
            mean_interval(samples)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (517, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_intervals(successes, trials, confidence):
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    interval = wilson_interval(successes, trials, confidence=confidence)
    assert interval.mean == successes / trials
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (0, 0), (-1, 3), (4, 3)])
def test_no_proportion(successes, trials):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(successes, trials)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_interquartile_means(scores):
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25), abs=1e-9)


def test_interquartile_mean_by_hand():
    assert interquartile_mean([[1.0, 100.0], [2.0, 3.0], [4.0, -50.0], [5.0, 6.0]]) == (2 + 3 + 4 + 5) / 4
    assert interquartile_mean([1.0, 2.0, 9.0]) == 4.0  # too few to leave any out


def test_probability_of_improvement_against_counting():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (5, 3)), rng.integers(0, 4, (7, 3))
    wins = [
        (x[i, task] > y[j, task]) + 0.5 * (x[i, task] == y[j, task])
        for i, j, task in itertools.product(range(5), range(7), range(3))
    ]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(wins))
    by_task = [stats.mannwhitneyu(x[:, t], y[:, t]).statistic / 35 for t in range(3)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(by_task))
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x + 10, y) == 1.0
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement(x, y[:, :2])


def test_bootstrap_of_a_mean_agrees_with_scipy():
    scores = np.random.default_rng(1).normal(size=(40, 1))
    ours = stratified_bootstrap_interval(scores, statistic_fn=np.mean, resamples=4000)
    theirs = stats.bootstrap(
        (scores[:, 0],), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.mean == pytest.approx(np.mean(scores))
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


def test_bootstrap_resamples_within_tasks():
    """Tasks far apart do not widen the interval: runs are never mixed across them."""
    scores = np.asarray([[0.0, 1000.0]] * 6) + np.random.default_rng(0).normal(size=(6, 2))
    interval = stratified_bootstrap_interval(scores, statistic_fn=np.mean)
    assert interval.high - interval.low < 3
    constant = stratified_bootstrap_interval(np.full((4, 3), 2.5))
    assert (constant.mean, constant.low, constant.high) == (2.5, 2.5, 2.5)


def test_bootstrap_of_two_arms_and_its_seed():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, (8, 4)), rng.normal(0, 1, (10, 4))
    intervals = [
        stratified_bootstrap_interval(x, y, statistic_fn=probability_of_improvement, resamples=500, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert intervals[0] == intervals[1] != intervals[2]
    assert 0 < intervals[0].low < intervals[0].mean < intervals[0].high < 1
    for scores in ([1.0, 2.0], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="runs, tasks"):
            stratified_bootstrap_interval(scores)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [abs((i := mean_interval(row)).mean) <= i.high - i.mean for row in rng.normal(size=(2000, 5))]
    assert 0.93 < np.mean(covered) < 0.97
    wilson = [wilson_interval(int(k), 30) for k in rng.binomial(30, 0.4, 2000)]
    assert 0.93 < np.mean([i.low <= 0.4 <= i.high for i in wilson]) < 0.98


def test_formats():
    interval = Interval(0.621, 0.58, 0.662)
    assert f"{interval:.1%}" == "62.1% [58.0%, 66.2%]"
    assert f"{interval:.2f}" == "0.62 [0.58, 0.66]"
    assert str(interval) == "0.621 [0.58, 0.662]"
    assert f"{mean_interval([0.5]):.0%}" == "50%"


def test_bootstrap_of_a_mean_is_the_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    interval = bootstrap_interval(values, statistic_fn=np.mean)
    error = values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)
    assert interval == bootstrap_interval(values, statistic_fn=np.mean)
    assert interval != bootstrap_interval(values, statistic_fn=np.mean, seed=1)


def test_bootstrap_draws_columns_together_and_groups_apart():
    values, groups = np.arange(30.0), np.repeat([0, 1, 2], [5, 10, 15])

    def statistic(column, twice, names):
        assert (twice == 2 * column).all()
        assert np.bincount(names).tolist() == [5, 10, 15]
        assert all(set(column[names == name]) <= set(values[groups == name]) for name in range(3))
        return np.mean(column)

    columns = values, 2 * values, groups
    within = bootstrap_interval(*columns, statistic_fn=statistic, groups=groups, resamples=200)
    free = bootstrap_interval(values, statistic_fn=np.mean, resamples=200)
    assert within.high - within.low < free.high - free.low  # what differs between groups is no chance


def test_paired_bootstrap_sees_what_intervals_of_each_do_not():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 3, size=100)
    first, second = (hard + shift + rng.normal(0, 0.2, size=100) for shift in (0, 0.1))
    found = paired_bootstrap([first], [second], statistic_fn=np.mean, resamples=1000)
    assert found.difference.mean == pytest.approx(np.mean(second - first))
    assert 0 < found.difference.low < found.difference.high < 0.25
    assert found.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)
    alone = bootstrap_interval(first, statistic_fn=np.mean, resamples=200)
    assert alone.low < np.mean(second) < alone.high
    same = paired_bootstrap([first], [first], statistic_fn=np.mean, resamples=50)
    assert same.p_value == 1
    for columns in ([], [[1.0, 2.0], [1.0]], [[]]):
        with pytest.raises(ValueError, match="columns of one length"):
            bootstrap_interval(*columns, statistic_fn=np.mean)
    with pytest.raises(ValueError, match="same examples"):
        paired_bootstrap([first], [first[1:]], statistic_fn=np.mean)
    with pytest.raises(ValueError, match="a group for each"):
        bootstrap_interval(first, statistic_fn=np.mean, groups=[1])
