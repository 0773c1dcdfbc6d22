"""Gold reward against the distance to the start: the functional forms of Gao et al. 2022, fitted. NumPy only.

    best-of-n:               R(d) = d (alpha - beta d)
    reinforcement learning:  R(d) = d (alpha - beta log d)         d = sqrt(KL to the start)

R is the reward above that of the start. Both are linear in alpha and beta: the fit is linear least squares.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.evaluation.statistics import Interval, mean_interval, stratified_bootstrap_interval


@dataclasses.dataclass(frozen=True)
class Form:
    """R(d) = d (alpha - beta bend(d)).

    Attributes:
      bend_fn: d > 0 -> bend(d).
      peak_fn: (alpha, beta) -> the d at which R is highest, for beta above 0.
    """

    bend_fn: Callable[[np.ndarray], np.ndarray]
    peak_fn: Callable[[float, float], float]

    def __call__(self, distances: ArrayLike, alpha: float, beta: float) -> np.ndarray:
        """R(d); 0 at 0."""
        d = np.asarray(distances, np.float64)
        return d * (alpha - beta * self.bend_fn(np.where(d > 0, d, 1)))


BEST_OF_N = Form(lambda d: d, lambda alpha, beta: max(alpha, 0) / (2 * beta))
"""R(d) = d (alpha - beta d)."""

REINFORCEMENT_LEARNING = Form(np.log, lambda alpha, beta: math.exp(min(alpha / beta - 1, 300)))
"""R(d) = d (alpha - beta log d)."""


def fit(form: Form, distances: ArrayLike, gains: ArrayLike) -> tuple[float, float]:
    """(alpha, beta) of least squared error, all points alike; points at distance 0 say nothing.

    Args:
      distances: d = sqrt(KL), any shape.
      gains: reward above that of the start, the same shape.

    Raises:
      ValueError: fewer than two distances above 0.
    """
    d, gain = (np.asarray(values, np.float64).reshape(-1) for values in (distances, gains))
    kept = d > 0
    if len(np.unique(d[kept])) < 2:
        raise ValueError("a fit of alpha and beta needs two distances above 0")
    d, gain = d[kept], gain[kept]
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * form.bend_fn(d)], axis=1), gain, rcond=None)
    return float(alpha), float(beta)


def peak_kl(form: Form, alpha: float, beta: float) -> float:
    """KL at which R is highest: 0 where it only falls, infinite for beta of 0 or less, which never bends."""
    return form.peak_fn(alpha, beta) ** 2 if beta > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class SeedFit:
    """A form fitted to curves of several seeds.

    Attributes:
      alpha: mean over fits of each seed, t interval.
      beta: the same.
      peak_kl: of the fit to all seeds together, bootstrap interval over seeds; ends may be infinite.
      residual: root mean squared error of the fit to all seeds together.
    """

    alpha: Interval
    beta: Interval
    peak_kl: Interval
    residual: float


def fit_seeds(form: Form, distances: ArrayLike, gains: ArrayLike, *, resamples: int = 1000) -> SeedFit:
    """Coefficients and peak with 95 % intervals over seeds.

    Args:
      distances: [seeds, points].
      gains: [seeds, points].
    """
    d, gain = np.asarray(distances, np.float64), np.asarray(gains, np.float64)
    alphas, betas = np.transpose([fit(form, *curve) for curve in zip(d, gain, strict=True)])

    def pooled_peak(seeds: np.ndarray) -> float:
        rows = seeds.reshape(-1).astype(int)
        peak = peak_kl(form, *fit(form, d[rows], gain[rows]))
        return peak / (1 + peak) if math.isfinite(peak) else 1.0  # quantiles need finite numbers

    # Whole curves are resampled: the points of one seed are not independent of each other.
    numbers = np.arange(len(d))[:, None]
    peak = stratified_bootstrap_interval(numbers, statistic_fn=pooled_peak, resamples=resamples)
    low, middle, high = (x / (1 - x) if x < 1 else math.inf for x in (peak.low, peak.mean, peak.high))
    errors = gain - form(d, *fit(form, d, gain))
    residual = float(np.sqrt(np.mean(errors**2)))
    return SeedFit(mean_interval(alphas), mean_interval(betas), Interval(middle, low, high), residual)
