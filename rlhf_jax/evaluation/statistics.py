"""Confidence intervals over seeds, over examples and over runs and tasks. NumPy only.

Scores of several runs on several tasks stand in arrays [runs, tasks]; what is known of examples stands in
columns, arrays whose first axis counts examples.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number and the interval around it; `low` and `high` are NaN where none can be given.

    `f"{interval:.1%}"` gives `62.1% [58.0%, 66.2%]`, any format of a float will do, and the number alone
    where there is no interval.
    """

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Each of the three numbers in the format of a float."""
        shown = format(self.mean, spec)
        if math.isnan(self.low) or math.isnan(self.high):
            return shown
        return f"{shown} [{format(self.low, spec)}, {format(self.high, spec)}]"

    def __str__(self) -> str:
        return format(self, ".4g")


def mean_interval(samples: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean of independent samples, one a seed, with Student's t interval.

        mean +- t_{(1 + confidence) / 2, n - 1} s / sqrt(n)

    One sample has a mean but no interval.
    """
    values = _vector(samples)
    mean, degrees = float(np.mean(values)), len(values) - 1
    if degrees == 0:
        return Interval(mean, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = student_t_quantile((1 + confidence) / 2, degrees) * error
    return Interval(mean, mean - half, mean + half)


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927): right at 0 and at 1, and with few trials.

    `mean` is the plain proportion, which is not the middle of the interval.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    proportion, shrink = successes / trials, 1 + z**2 / trials
    centre = (proportion + z**2 / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(proportion * (1 - proportion) / trials + z**2 / (4 * trials**2))
    # Rounding must not push an end past the proportion it surrounds at 0 and 1.
    return Interval(
        proportion, min(max(centre - half, 0), proportion), max(min(centre + half, 1), proportion)
    )


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all scores (IQM, Agarwal et al. 2021), over runs and tasks together.

    A quarter of the scores, rounded down, is left out at either end.
    """
    values = np.sort(np.asarray(scores, np.float64), axis=None)
    cut = len(values) // 4
    return float(np.mean(values[cut : len(values) - cut]))


def probability_of_improvement(scores_x: ArrayLike, scores_y: ArrayLike) -> float:
    """Probability that a run of X beats a run of Y, ties as half, mean over tasks (Agarwal et al. 2021).

    Args:
      scores_x: [runs, tasks]; the numbers of runs may differ.
      scores_y: [runs, tasks], the same tasks in the same order.
    """
    x, y = np.asarray(scores_x, np.float64), np.asarray(scores_y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected [runs, tasks] of the same tasks, not {x.shape} and {y.shape}")
    pairs = x[:, None], y[None]
    return float(np.mean(np.greater(*pairs) + 0.5 * np.equal(*pairs)))


def stratified_bootstrap_interval(
    *scores: ArrayLike,
    statistic_fn: Callable[..., float] = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic, runs resampled within each task (Agarwal et al. 2021).

    Args:
      scores: one or more arrays [runs, tasks]; `statistic_fn` takes as many.
      statistic_fn: `interquartile_mean`, `probability_of_improvement`, `np.mean`, ...
      resamples: how many times to draw; the time grows with it.
      seed: the same seed gives the same interval.
    """
    arrays = [np.asarray(score, np.float64) for score in scores]
    if not arrays or any(array.ndim != 2 or array.size == 0 for array in arrays):
        raise ValueError(f"expected [runs, tasks], not {[array.shape for array in arrays]}")
    rng = np.random.default_rng(seed)

    def resampled(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, rng.integers(len(array), size=array.shape), axis=0)

    draws = [float(statistic_fn(*map(resampled, arrays))) for _ in range(resamples)]
    return _percentile_interval(float(statistic_fn(*arrays)), np.array(draws), confidence)


def iqm_interval(samples: ArrayLike) -> Interval:
    """Interquartile mean over runs of one task with its 95 % stratified bootstrap interval."""
    return stratified_bootstrap_interval(np.asarray(samples)[:, None], statistic_fn=interquartile_mean)


def bootstrap_interval(
    *columns: ArrayLike,
    statistic_fn: Callable[..., float],
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of examples, which are drawn anew (Efron 1979), all columns alike.

    Resamples on which the statistic is not defined (NaN: no example of a class, say) are left out.

    Args:
      columns: one or more arrays of one length, which are what `statistic_fn` takes.
      statistic_fn: computes the metric of any examples: `text.bleu`, `classification.roc_auc`, `np.mean`, ...
      groups: [N], such as the subject of a question: examples are drawn within their group, so that each
        keeps its size.
      resamples: how many times to draw; the time grows with it.
      seed: the same seed gives the same interval.
    """
    (interval,) = bootstrap_intervals(
        *columns,
        statistic_fn=lambda *some: [statistic_fn(*some)],
        groups=groups,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    return interval


def bootstrap_intervals(
    *columns: ArrayLike,
    statistic_fn: Callable[..., ArrayLike],
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """`bootstrap_interval` of several statistics at once, such as the parameters of a fit: an interval each.

    Args:
      columns: one or more arrays of one length, which are what `statistic_fn` takes.
      statistic_fn: computes the numbers of any examples, always as many.
      groups: as of `bootstrap_interval`.
      confidence: as of `bootstrap_interval`.
      resamples: as of `bootstrap_interval`.
      seed: as of `bootstrap_interval`.
    """
    arrays = _columns(columns)
    draws = [
        np.asarray(statistic_fn(*(array[rows] for array in arrays)), np.float64)
        for rows in _resampled_rows(len(arrays[0]), groups, resamples, seed)
    ]
    values = np.asarray(statistic_fn(*arrays), np.float64)
    return [
        _percentile_interval(float(value), drawn, confidence)
        for value, drawn in zip(values, np.stack(draws, axis=1), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two systems on the same examples.

    Attributes:
      difference: of the second's metric to the first's; above 0 the second is better where more is better.
      p_value: how often a difference as far from 0 would be seen if there were none, two-sided.
    """

    difference: Interval
    p_value: float


def paired_bootstrap(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    statistic_fn: Callable[..., float],
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Does one system beat another: both are judged on the same resamples of examples (Koehn 2004).

    What makes an example hard for both cancels, so that less separates systems than intervals of each of
    them suggest. The p-value moves the differences of resamples to be 0 on average (Riezler & Maxwell 2005)
    and counts the observed one among them.

    Args:
      first: columns of one system, as `bootstrap_interval` takes them.
      second: columns of the other, the same examples in the same order.
      statistic_fn: as of `bootstrap_interval`.
      groups: as of `bootstrap_interval`.
      confidence: as of `bootstrap_interval`.
      resamples: as of `bootstrap_interval`.
      seed: as of `bootstrap_interval`.
    """
    ours, theirs = _columns(first), _columns(second)
    if len(ours[0]) != len(theirs[0]):
        raise ValueError(f"expected the same examples, not {len(ours[0])} and {len(theirs[0])}")

    def difference(rows: np.ndarray) -> float:
        return float(statistic_fn(*(x[rows] for x in theirs)) - statistic_fn(*(x[rows] for x in ours)))

    draws = np.array(
        [difference(rows) for rows in _resampled_rows(len(ours[0]), groups, resamples, seed)], np.float64
    )
    seen, defined = difference(np.arange(len(ours[0]))), draws[~np.isnan(draws)]
    as_far = np.sum(np.abs(defined - np.mean(defined)) >= abs(seen)) if defined.size else 0
    return Comparison(_percentile_interval(seen, draws, confidence), float((as_far + 1) / (defined.size + 1)))


def _columns(columns: Sequence[ArrayLike]) -> list[np.ndarray]:
    arrays = [np.asarray(column) for column in columns]
    shapes = [array.shape for array in arrays]
    if not arrays or any(not shape or shape[0] != len(arrays[0]) or not shape[0] for shape in shapes):
        raise ValueError(f"expected columns of one length above 0, not {shapes}")
    return arrays


def _resampled_rows(count: int, groups: ArrayLike | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Places of `count` examples drawn with replacement, within groups where there are any."""
    rng = np.random.default_rng(seed)
    names = np.zeros(count, np.int64) if groups is None else np.asarray(groups)
    if names.shape != (count,):
        raise ValueError(f"expected a group for each of {count} examples, not {names.shape}")
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    for _ in range(resamples):
        yield np.concatenate([places[rng.integers(len(places), size=len(places))] for places in members])


def _percentile_interval(value: float, draws: np.ndarray, confidence: float) -> Interval:
    defined = draws[~np.isnan(draws)]
    if not defined.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t below which a Student variable of `degrees` degrees of freedom falls with this probability.

    Bisection on the closed form of P(|T| <= t) for whole degrees (Abramowitz & Stegun, 26.7.3-4).
    """
    if degrees < 1 or not 0 < probability < 1:
        raise ValueError(
            f"no Student quantile for probability {probability} and {degrees} degrees of freedom"
        )
    central = abs(2 * probability - 1)
    high = 1.0
    while _student_t_central(high, degrees) < central:
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_central(middle, degrees) < central else (low, middle)
    return math.copysign(high, probability - 0.5)


def _student_t_central(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    # Terms cos^k (k-1)!!/k!! from k = 0 or 1 up, by their recurrence.
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _vector(samples: ArrayLike) -> np.ndarray:
    values = np.asarray(samples, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"expected at least one sample in one dimension, not shape {values.shape}")
    return values
