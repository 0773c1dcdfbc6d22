"""Pictures of a sweep: learning curves and performance profiles, a line a setting."""

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import PathLike
from rlhf_jax.evaluation.statistics import interquartile_mean, stratified_bootstrap_interval
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.sweep.results import Results
from rlhf_jax.sweep.summaries import performance_profile

_RESAMPLES = 200


def plot_curves(results: Results, metric: str, path: PathLike, *, points: int = 60) -> None:
    """IQM over seeds of a metric along the updates, with 95 % bootstrap intervals shaded.

    Args:
      path: of the picture; its suffix decides the format.
      points: of each curve; updates in between are averaged.

    Raises:
      UserError: the metric has no value for each update.
    """
    values = results.metrics.get(metric)
    if values is None or values.ndim != 3:
        along = [name for name, array in results.metrics.items() if array.ndim == 3]
        raise UserError(f"{metric!r} has no value for each update: choose among {', '.join(along)}")
    edges = np.array_split(np.arange(values.shape[2]), min(points, values.shape[2]))
    updates = np.array([part.mean() + 1 for part in edges])
    with picture(path, 1, 1, height=3.2) as (axes,):
        lines = {}
        for setting, runs in enumerate(values):
            averaged = np.stack([runs[:, part].mean(axis=1) for part in edges], axis=1)
            middle, low, high = curve_with_band(averaged)
            (line,) = axes.plot(updates, middle)
            axes.fill_between(updates, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            lines[results.label(setting)] = line
        axes.set(xlabel="update", ylabel=metric)
        name_ends(axes, lines)


def curve_with_band(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IQM over seeds at each point of a curve, and its 95 % bootstrap interval.

    Args:
      runs: [S, P]; a NaN is a seed without value there, and a point without any is NaN.

    Returns:
      (IQM, low, high), [P] each.
    """

    def point(values: np.ndarray) -> tuple[float, float, float]:
        values = values[~np.isnan(values)]
        if not len(values):
            return np.nan, np.nan, np.nan
        interval = stratified_bootstrap_interval(
            values[:, None], statistic_fn=interquartile_mean, resamples=_RESAMPLES
        )
        return interval.mean, interval.low, interval.high

    middle, low, high = np.array([point(values) for values in runs.T]).T
    return middle, low, high


def plot_profiles(results: Results, metric: str, path: PathLike) -> None:
    """Share of each setting's seeds that score above a threshold, over all thresholds."""
    scores = results.scores(metric)
    thresholds = np.linspace(scores.min(), scores.max(), 200)
    with picture(path, 1, 1, height=3.2) as (axes,):
        for setting, row in enumerate(scores):
            axes.step(thresholds, performance_profile(row, thresholds), label=results.label(setting))
        axes.set(xlabel=metric, ylabel="share of seeds above")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
