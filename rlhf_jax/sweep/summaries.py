"""Numbers of a sweep with their uncertainty: mean, IQM with interval, comparisons, performance profiles."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.evaluation.statistics import (
    Interval,
    iqm_interval,
    probability_of_improvement,
    stratified_bootstrap_interval,
)
from rlhf_jax.sweep.results import Results


@dataclasses.dataclass(frozen=True)
class Summary:
    """One setting's scores over its seeds.

    Attributes:
      setting: its index.
      label: what sets it apart.
      mean: over seeds.
      iqm: interquartile mean with its 95 % bootstrap interval.
      seeds: how many.
    """

    setting: int
    label: str
    mean: float
    iqm: Interval
    seeds: int


def summarize(results: Results, metric: str) -> list[Summary]:
    """Each setting's mean and IQM of a metric, in the order of the settings."""
    scores = results.scores(metric)
    return [
        Summary(
            setting=setting,
            label=results.label(setting),
            mean=float(np.mean(row)),
            iqm=iqm_interval(row),
            seeds=len(row),
        )
        for setting, row in enumerate(scores)
    ]


def compare(results: Results, metric: str, setting: int, other: int) -> Interval:
    """Probability that a run of `setting` scores higher than one of `other`, with its 95 % interval."""
    scores = results.scores(metric)
    return stratified_bootstrap_interval(
        scores[setting][:, None], scores[other][:, None], statistic_fn=probability_of_improvement
    )


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Share of runs that score above each threshold (Agarwal et al. 2021, section 4.2), over all tasks.

    Args:
      scores: [runs, tasks], or any shape whose entries weigh alike.
      thresholds: [K].

    Returns:
      [K] shares, from 1 down to 0.
    """
    flat = np.asarray(scores, np.float64).reshape(-1)
    return np.mean(flat[None, :] > np.asarray(thresholds, np.float64)[:, None], axis=1)
