"""Critical batch size: steps and examples that batches of several sizes take to one loss. NumPy only."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class CriticalBatch:
    """Steps S and examples E = B S to a loss (McCandlish et al. 2018):  (S / S_min - 1) (E / E_min - 1) = 1.

    Attributes:
      min_steps: S_min, with batches without bound.
      min_examples: E_min, with the smallest batches; in the unit of the batch size.
    """

    min_steps: float
    min_examples: float

    @property
    def batch_size(self) -> float:
        """Critical batch size E_min / S_min: with it, twice the least steps and twice the least examples."""
        return self.min_examples / self.min_steps

    def __call__(self, batch_size: ArrayLike) -> np.ndarray:
        """S(B) = S_min (1 + B_crit / B)."""
        return self.min_steps * (1 + self.batch_size / np.asarray(batch_size, np.float64))


def fit_critical_batch(batch_sizes: ArrayLike, steps: ArrayLike) -> CriticalBatch:
    """Least steps and least examples from runs of several batch sizes to one loss.

    The hyperbola is S_min / S + E_min / E = 1, which is linear in both: least squares. A number that comes
    out at 0 or below is NaN: the runs are all on one side of the critical batch size.

    Args:
      batch_sizes: of the runs [R].
      steps: until each reached the loss [R].

    Raises:
      ValueError: fewer than two batch sizes.
    """
    b, s = (np.asarray(values, np.float64) for values in (batch_sizes, steps))
    if b.shape != s.shape or b.ndim != 1 or len(np.unique(b)) < 2:
        raise ValueError("least steps and least examples need runs of two batch sizes")
    found = np.linalg.lstsq(np.stack([1 / s, 1 / (b * s)], axis=1), np.ones(len(s)), rcond=None)[0]
    least = [float(value) if value > 0 else math.nan for value in found]
    return CriticalBatch(*least)


def first_reached(places: Sequence[float], losses: Sequence[float], target: float) -> float:
    """First place at which a curve of losses is at `target`, on straight lines between its points; or NaN.

    Args:
      places: steps, or tokens, rising.
      losses: there.
    """
    below = np.flatnonzero(np.asarray(losses) <= target)
    if not below.size:
        return math.nan
    last = int(below[0])
    if last == 0:
        return float(places[0])
    before, after = losses[last - 1], losses[last]
    share = (before - target) / (before - after)
    return float(places[last - 1] + share * (places[last] - places[last - 1]))
