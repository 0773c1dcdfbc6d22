"""Page of benchmark results: scores by subject with intervals, a table, a picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.evaluation.statistics import (
    Comparison,
    Interval,
    bootstrap_interval,
    paired_bootstrap,
    wilson_interval,
)
from rlhf_jax.metrics.pages import SUMMARY
from rlhf_jax.metrics.pictures import picture
from rlhf_jax.metrics.progress import final_table

RESULTS = "results.jsonl"
MACRO = "mean over subjects"
ALL = "all items"


def verdicts(lines: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Scores of items [items] for each way to score, from 0 to 1 where right is 1."""
    if "chosen" not in lines[0]:
        return {"right": np.array([line["reward"] for line in lines], np.float64)}
    return {
        name: np.array([line["chosen"][name] == line["answer"] for line in lines], np.float64)
        for name in lines[0]["chosen"]
    }


def macro_average(worth: np.ndarray, subjects: np.ndarray) -> float:
    """Mean over subjects of the mean over their items."""
    _, places = np.unique(subjects, return_inverse=True)
    return float(np.mean(np.bincount(places, worth) / np.bincount(places)))


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Interval]]:
    """Accuracy for each way to score, of every subject, over all items, and over subjects.

    Wilson intervals, or bootstraps where a verifier gives more than right and wrong; for the mean over
    subjects a bootstrap that draws items within each.
    """
    subjects = np.array([line["subject"] for line in lines])
    names = [str(name) for name in np.unique(subjects)]
    found = {}
    for name, worth in verdicts(lines).items():
        found[name] = {ALL: _share(worth)}
        if len(names) > 1:
            apart = {subject: _share(worth[subjects == subject]) for subject in names}
            macro = bootstrap_interval(worth, subjects, statistic_fn=macro_average, groups=subjects)
            found[name] = {**apart, **found[name], MACRO: macro}
    return found


def _share(worth: np.ndarray) -> Interval:
    if np.isin(worth, (0, 1)).all():
        return wilson_interval(int(worth.sum()), len(worth))
    return bootstrap_interval(worth, statistic_fn=np.mean)


def chance(lines: Sequence[dict[str, Any]]) -> float | None:
    """Share that guessing gets right; None where there is nothing to choose from."""
    if "choices" not in lines[0]:
        return None
    return float(np.mean([1 / len(line["choices"]) for line in lines]))


def compare(lines: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Comparison]:
    """Paired difference in accuracy from another model on the same items, for each way to score.

    Raises:
      UserError: they are not the same items.
    """
    ours, theirs = ({(line["index"], line["where"]): line for line in side} for side in (lines, other))
    kinds = {frozenset(verdicts(side)) for side in (lines, other) if side}
    if ours.keys() != theirs.keys() or len(kinds) > 1:
        raise UserError(
            f"--against: {len(theirs)} items are there, and not the same as the {len(ours)} here: "
            "give a folder of the same benchmark"
        )
    first, second = (verdicts([side[key] for key in sorted(side)]) for side in (theirs, ours))
    return {
        name: paired_bootstrap([first[name]], [worth], statistic_fn=np.mean) for name, worth in second.items()
    }


def write(
    folder: Path, lines: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]] | None, *, quiet: bool
) -> None:
    """Writes summary.json and results.svg, and prints the table.

    Args:
      other: results of another model to compare with.
    """
    found, guess = summarise(lines), chance(lines)
    shares = {n: {s: dataclasses.asdict(share) for s, share in by.items()} for n, by in found.items()}
    counts = {"items": len(lines), "chance": guess}
    if "reward" in lines[0]:
        counts |= {
            "unscorable": sum(line["unscorable"] for line in lines),
            "finished": sum(line["finished"] for line in lines),
        }
    differences = {} if other is None else compare(lines, other)
    compared = {name: dataclasses.asdict(difference) for name, difference in differences.items()}
    files.write_json(folder / SUMMARY, {**counts, "scores": shares, "against": compared})
    plot(folder / "results.svg", found, guess)
    if quiet:
        return
    subjects = [line["subject"] for line in lines]
    items = {subject: subjects.count(subject) for subject in next(iter(found.values()))}
    rows = [
        [subject, items[subject] or len(lines), *(f"{by[subject]:.1%}" for by in found.values())]
        for subject in items
    ]
    guessing = "" if guess is None else f"; guessing: {guess:.1%}"
    final_table(f"Right, with 95 % intervals{guessing}", ["subject", "items", *found], rows)
    for name, each in differences.items():
        gap = each.difference
        ends = f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
        print(f"{name}: {100 * gap.mean:+.1f} {ends} points to the other model, p = {each.p_value:.3f}")
    print(f"Items: {folder / RESULTS}; figure: {folder / 'results.svg'}")


def plot(path: Path, found: dict[str, dict[str, Interval]], guess: float | None) -> None:
    """Every subject's share with its interval, a colour for each way to score."""
    subjects = list(next(iter(found.values())))
    with picture(path, 1, 1, height=1.4 + 0.32 * len(subjects)) as (axes,):
        for number, (name, by) in enumerate(found.items()):
            means = np.array([interval.mean for interval in by.values()])
            ends = np.abs(np.array([[i.low, i.high] for i in by.values()]).T - means)
            places = np.arange(len(subjects)) + 0.2 * (number - (len(found) - 1) / 2)
            axes.errorbar(means, places, xerr=ends, fmt="o", capsize=2, markersize=4, label=name)
        if guess is not None:
            axes.axvline(guess, color="grey", linestyle=":", label="guessing")
        axes.set(xlim=(0, 1), xlabel="right", yticks=range(len(subjects)), yticklabels=subjects)
        axes.set_ylim(len(subjects) - 0.5, -0.5)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def show_harness(results: dict[str, dict[str, Any]]) -> None:
    """Prints what the harness found: each metric with its standard error."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, rule = name.partition(",")
            if isinstance(value, int | float) and rule and not metric.endswith("_stderr"):
                rows.append([task, metric, rule, float(value), metrics.get(f"{metric}_stderr,{rule}")])
    final_table("lm-evaluation-harness", ["task", "metric", "filter", "value", "standard error"], rows)
