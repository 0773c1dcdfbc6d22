"""Comparison of runs: one page with their results, curves over each other, and settings that differ."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.curves import Curves, chart_view, find_curves, panels_of, read_curves
from rlhf_jax.metrics.headline import display, format_score
from rlhf_jax.metrics.plots import Curve, are_shares, mean_curve
from rlhf_jax.metrics.progress import format_number
from rlhf_jax.metrics.rendering import render
from rlhf_jax.metrics.run_facts import flatten, read_json

MOST_RUNS = 8
"""So many have a colour of their own."""
_SHARES = ("exact_match", "score", "accuracy")
_ABSENT = "(absent)"
_OF_THE_FOLDER = ("run.out", "run.resume")
_COLUMNS = {
    "held-out score": ("eval/exact_match", "exact_match", "eval/score"),
    "held-out accuracy": ("eval/pair_accuracy", "eval/accuracy"),
    "held-out loss": ("eval/loss",),
    "reward": ("reward",),
    "loss": ("loss",),
    "KL, nats": ("kl",),
    "length, tokens": ("length",),
    "entropy, nats": ("entropy",),
    "tokens a second": ("time/tokens_per_second",),
}


def write_comparison(folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Writes a page on several runs, as `write_report` does on one.

    Args:
      folders: run folders, at least two; of a run of several stages the last one counts.
      path: of the page.

    Raises:
      UserError: a folder is none of a run, there are too many, or the page cannot be written.
    """
    places = [files.as_path(folder) for folder in folders]
    if not 2 <= len(places) <= MOST_RUNS:
        raise UserError(f"{len(places)} run folders cannot be compared: give 2 to {MOST_RUNS}")
    names = _names(places)
    stages = [_last_stage(place) for place in places]
    columns = [
        title for title, metrics in _COLUMNS.items() if any(_last(found, metrics) for _, found in stages)
    ]
    settings = [_settings(place) for place in places]
    keys = list(dict.fromkeys(key for held in settings for key in held))
    rows = [(key, [held.get(key, _ABSENT) for held in settings]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    view = {
        "title": " against ".join(names),
        "columns": columns,
        "runs": [
            {
                "name": name,
                "stage": display(stage),
                "colour": _colour(place),
                "numbers": [_last(found, _COLUMNS[title]) or "-" for title in columns],
            }
            for place, (name, (stage, found)) in enumerate(zip(names, stages, strict=True))
        ],
        "panels": _panels(names, [found for _, found in stages]),
        "differences": [row for row in differing if _ABSENT not in row[1]],
        "one_sided": [row for row in differing if _ABSENT in row[1]],
        "same": [(key, values[0]) for key, values in rows if len(set(values)) == 1],
    }
    target = files.as_path(path)
    with files.disk_errors(target):
        files.write_whole(target, render("comparison.html.jinja", view))
    return target


def _names(places: Sequence[Path]) -> list[str]:
    """Names of the folders, with those of as many parents as tell them apart."""
    whole = [files.resolved(place).parts for place in places]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run folder is given twice: give different ones")


def _colour(place: int) -> str:
    return f"var(--c{(place + 2) % MOST_RUNS})"  # the first is grey, for where a run began


def _last_stage(folder: Path) -> tuple[str, Curves]:
    if not files.is_folder(folder):
        raise UserError(f"{folder}: no such run folder; give the folder that the run was told with --out")
    found = read_curves(folder)
    if not found:
        raise UserError(f"{folder}: has no metrics.jsonl; give the folder that the run was told with --out")
    return list(found.items())[-1]


def _last(metrics: Curves, names: Sequence[str]) -> str | None:
    name = next((name for name in names if name in metrics), None)
    if name is None:
        return None
    curves = metrics[name]
    shown = format_score if name.endswith(_SHARES) and are_shares(curves) else format_number
    return shown(float(np.mean([curve.values[-1] for curve in curves])))


def _one_name(name: str) -> str:
    """What stages hold in groups of different names, `data` and `prompts.data`, is one setting."""
    group, _, last = name.partition(".")
    return last if group in ("prompts", "pairs") else name


def _settings(folder: Path) -> dict[str, str]:
    config = read_json(folder / "config.json", dict)
    held = [(_one_name(name), value) for name, value in flatten(config.get("config", {}))]
    held += flatten(config.get("versions", {}))
    held += [(name, str(config[name])) for name in ("stage", "commit", "device") if config.get(name)]
    return {name: value for name, value in held if name not in _OF_THE_FOLDER}


def _panels(names: Sequence[str], runs: Sequence[Curves]) -> list[dict[str, Any]]:
    """A chart for each panel that two runs or more fill; the seeds of a run are one curve, their mean."""
    views = []
    for panel in {panel: None for metrics in runs for panel in panels_of(metrics)}:
        found: Mapping[int, Curve] = {
            place: mean_curve(curves)
            for place, metrics in enumerate(runs)
            if (curves := find_curves(metrics, panel.names))
        }
        if len(found) > 1:
            chosen, colours = [names[place] for place in found], [_colour(place) for place in found]
            views.append(chart_view(panel, list(found.values()), chosen, colours))
    return views
