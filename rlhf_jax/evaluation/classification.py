"""Classification metrics of answers, scores and probabilities. NumPy only.

Answers become counts (`confusion`) that `precision`, `recall`, `f1` and `accuracy` are ratios of; scores
rank (`roc_auc`, `average_precision`); probabilities are calibrated or not. Intervals and comparisons come
from `statistics.bootstrap_interval` and `statistics.paired_bootstrap`. Of several classes, hold each
against the rest.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Predictions in bins of equal width over [0, 1]; empty bins are left out.

    Attributes:
      predicted: mean probability of each bin.
      observed: share of its labels that are true.
      counts: predictions in it.
    """

    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al. 2015): mean |predicted - observed| over predictions."""
        return float(np.sum(self.counts * np.abs(self.predicted - self.observed)) / np.sum(self.counts))


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a true one scores above a false one, ties counting half.

    NaN where there are only true ones or only false ones.

    Args:
      scores: the higher, the surer of true; any scale.
      labels: bool.
    """
    values, truth = _pair(scores, labels)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; equal scores share the mean rank
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def precision_recall_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) of calling true what scores at least each of the scores there are, highest first.

    Recall is NaN where nothing is true.
    """
    values, truth = _pair(scores, labels)
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.diff(values[order], append=-np.inf))  # equal scores are called alike
    found = np.cumsum(truth[order])[last]
    positives = truth.sum()
    recall = found / positives if positives else np.full(len(found), np.nan)
    return found / (last + 1), recall


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the curve of precision against recall, as a sum of steps.

        sum_n (R_n - R_{n-1}) P_n

    No line is drawn between points, which would be too kind (Davis & Goadrich 2006). NaN where nothing
    is true.

    Args: as `roc_auc`.
    """
    precisions, recalls = precision_recall_curve(scores, labels)
    return float(np.sum(np.diff(recalls, prepend=0) * precisions))


# Answers -------------------------------------------------------------------------------------------


def confusion(answers: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """[N, 4] of 0 and 1: is each answer a true positive, false positive, false negative, true negative.

    Args:
      answers: bool, [N].
      labels: bool, [N].
    """
    _, truth = _pair(answers, labels)
    said = np.asarray(answers, bool)
    return np.stack([said & truth, said & ~truth, ~said & truth, ~said & ~truth], axis=1).astype(np.int64)


def precision(counts: ArrayLike) -> float:
    """Share of those called true that are; NaN where none are called so. `counts` are rows of `confusion`."""
    right, wrong, _, _ = np.sum(counts, axis=0)
    return _share(right, right + wrong)


def recall(counts: ArrayLike) -> float:
    """Share of the true ones that are called so; NaN where there is none."""
    right, _, missed, _ = np.sum(counts, axis=0)
    return _share(right, right + missed)


def f1(counts: ArrayLike) -> float:
    """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN); NaN where that is 0 / 0."""
    right, wrong, missed, _ = np.sum(counts, axis=0)
    return _share(2 * right, 2 * right + wrong + missed)


def accuracy(counts: ArrayLike) -> float:
    """Share of answers that are right."""
    right, wrong, missed, left = np.sum(counts, axis=0)
    return _share(right + left, right + wrong + missed + left)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


# Probabilities -------------------------------------------------------------------------------------


def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of probabilities (Brier 1950): 0 is perfect, always saying 1/2 gives 1/4."""
    values, truth = _pair(probabilities, labels)
    return float(np.mean((values - truth) ** 2))


def reliability(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 10) -> Reliability:
    """Reliability diagram: predicted probabilities beside observed frequencies."""
    values, truth = _pair(probabilities, labels)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"probabilities lie in [0, 1], not in [{values.min()}, {values.max()}]")
    place = np.minimum((values * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    kept = counts > 0
    sums = (np.bincount(place, weights, minlength=bins)[kept] for weights in (values, truth))
    predicted, observed = (total / counts[kept] for total in sums)
    return Reliability(predicted, observed, counts[kept])


def _pair(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, truth = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if values.shape != truth.shape or values.ndim != 1 or not values.size:
        raise ValueError(
            f"expected as many scores as labels in one dimension, not {values.shape} and {truth.shape}"
        )
    return values, truth
