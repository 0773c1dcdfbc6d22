"""How good probabilities of yes or no are: ranking, calibration, both at once. NumPy only."""

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


def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of probabilities (Brier 1950): 0 is perfect, always saying 1/2 gives 1/4."""
    values, truth = _pair(probabilities, labels)
    return float(np.mean((values - truth) ** 2))


def reliability(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 10) -> Reliability:
    """What probabilities say beside how often they were right."""
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
