"""The report of a run: one HTML file made from the run folder alone, readable without a network."""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.curves import Curves, chart_view, find_curves, panels_of, read_curves
from rlhf_jax.metrics.headline import STAGE_NAMES, TableRow, base_row, display, headline
from rlhf_jax.metrics.health import HEALTH, HEALTH_CHECKS
from rlhf_jax.metrics.progress import format_seconds
from rlhf_jax.metrics.rendering import render
from rlhf_jax.metrics.report_samples import completions_view, sample_views
from rlhf_jax.metrics.run_facts import facts, flatten, read_json, settings_of_stages

REPORT_FILE = "report.html"

# What a step's time is divided into, in the order of a step.
_PARTS = ("data", "rollout", "reward", "update", "save", "eval")

_COLOURS = 8  # --c0 to --c7 in the template; the first five belong to the names above


def write_report(
    folder: str | os.PathLike[str],
    table: Sequence[TableRow] = (),
    *,
    interval: str = "95 % interval over seeds",
    pictures: Mapping[str, Path] = {},
    path: str | os.PathLike[str] | None = None,
    refresh: int = 0,
) -> Path:
    """Writes `folder/report.html` from what the run folder holds; parts that are missing are left out.

    It reads `summary.json`, `config.json`, `samples.json`, `completions/`, and `metrics.jsonl` here and below
    `seed_*/`. Texts of models are untrusted: everything is escaped, and the page forbids itself the network
    and all scripts but its own.

    Args:
      folder: the run folder.
      table: rows of the result table in order; intervals are computed by the caller.
      interval: what the intervals of `table` are.
      pictures: caption -> PNG or SVG, which is copied into the page.
      path: of the page; None for `report.html` in the folder.
      refresh: seconds after which a browser loads the page again, while the run goes on; 0 for never.
    Raises:
      UserError: a file of the folder is damaged, or the report cannot be written.
    """
    folder = files.as_path(folder)
    if not files.is_folder(folder):
        raise UserError(f"{folder}: no such run folder; give the folder that the run was told with --out")
    view = _view(folder, table, interval) | {"pictures": _picture_views(pictures)}
    data = render("report.html.jinja", view, refresh=refresh)
    path = files.as_path(path) if path is not None else folder / REPORT_FILE
    with files.disk_errors(path):
        files.write_whole(path, data)
    return path


def _view(folder: Path, table: Sequence[TableRow], interval: str) -> dict[str, Any]:
    """Everything the template shows, as plain values."""
    config = read_json(folder / "config.json", dict)
    summary = read_json(folder / "summary.json", dict)
    samples = read_json(folder / "samples.json", list)
    curves = read_curves(folder)
    methods = list(dict.fromkeys([*summary, *curves, *(row.method for row in table)]))
    colours = _assign_colours(methods)
    rows = _table_view(table, summary, colours)
    stages = [_stage_view(stage, metrics, colours[stage]) for stage, metrics in curves.items()]
    return {
        "title": headline(table, curves),
        "folder": files.resolved(folder).name,
        "command": config.get("command"),
        "started": str(config.get("started", ""))[:16].replace("T", " "),
        "seeds": config.get("seeds", []),
        "task": flatten(config.get("task", {})),
        "config": flatten(config.get("config", {})),
        "versions": flatten(config.get("versions", {})),
        "rows": rows,
        "table_note": _table_note(rows, interval),
        "curves_note": _curves_note(stages),
        "reward_model": _pair_accuracy(summary),
        "stages": stages,
        "warnings": [
            view for stage, metrics in curves.items() for view in _warnings(stage, metrics, colours)
        ],
        "samples": sample_views(samples, colours),
        "sample_count": len(samples),
        "facts": facts(config, curves),
        "settings": settings_of_stages(folder, config),
        **completions_view(folder),
    }


def _picture_views(pictures: Mapping[str, Path]) -> list[dict[str, str]]:
    return [
        {
            "caption": caption,
            "kind": "svg+xml" if path.suffix == ".svg" else "png",
            "data": base64.b64encode(files.read_bytes(path)).decode("ascii"),
        }
        for caption, path in pictures.items()
    ]


def _assign_colours(methods: Sequence[str]) -> dict[str, str]:
    known = {name: index for index, name in enumerate(STAGE_NAMES)}
    others = [method for method in methods if method not in known]
    spare = _COLOURS - len(known)
    known |= {method: len(known) + index % spare for index, method in enumerate(others)}
    return {method: f"var(--c{index})" for method, index in known.items()}


def _table_view(
    table: Sequence[TableRow], summary: Mapping[str, Any], colours: Mapping[str, str]
) -> list[dict[str, Any]]:
    def share(row: TableRow, name: str) -> float:
        most = max((abs(value) for other in table if math.isfinite(value := getattr(other, name))), default=0)
        value = abs(getattr(row, name))
        return 100 * value / most if most and math.isfinite(value) else 0.0

    views = []
    base = base_row(table).exact_match[0] if table else math.nan
    for row in table:
        mean, low, high = row.exact_match
        seeds = [seed for seed in summary.get(row.method, {}).get("exact_match", []) if math.isfinite(seed)]
        views.append(
            {
                "name": display(row.method),
                "colour": colours[row.method],
                "mean": 100 * mean if math.isfinite(mean) else None,
                "interval": (100 * low, 100 * high) if math.isfinite(low + high) and low < high else None,
                "base": 100 * base if math.isfinite(base) and row is not base_row(table) else None,
                "seeds": [100 * seed for seed in seeds] if len(seeds) > 1 else [],
                "cells": [
                    *(
                        (title, _or_dash(100 * x, "{:.1f} %".format), 100 * x)
                        for title, x in row.shares.items()
                    ),
                    ("KL, nats", _or_dash(row.kl, "{:.2f}".format), share(row, "kl")),
                    ("Length, tokens", _or_dash(row.length, "{:.1f}".format), share(row, "length")),
                    ("Wall time", _or_dash(row.seconds, format_seconds), share(row, "seconds")),
                ],
            }
        )
    return views


def _table_note(rows: Sequence[Mapping[str, Any]], interval: str) -> str:
    notes = []
    if any(row["interval"] for row in rows):
        notes.append(f"Whiskers: {interval}.")
    if any(row["seeds"] for row in rows):
        notes.append("Dots: single seeds.")
    compared = [row["name"] for row in rows if row["base"] is None]
    if len(compared) < len(rows):
        notes.append(f"Line across: {compared[0]}.")
    return " ".join([*notes, "KL is that of each policy from its reference."])


def _curves_note(stages: Sequence[Mapping[str, Any]]) -> str:
    many = max((stage["seeds"] for stage in stages), default=0) > 1
    thin, thick = ("one seed each", "their mean, smoothed") if many else ("as measured", "smoothed")
    return f"Against the step of each stage. Thin: {thin}. Thick: {thick}; its last value stands at its end."


def _or_dash(value: float, form: Any) -> str:
    return form(value) if math.isfinite(value) else "-"


def _pair_accuracy(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    seeds = summary.get("reward_model", {}).get("pair_accuracy", [])
    return {"mean": 100 * sum(seeds) / len(seeds), "seeds": [100 * seed for seed in seeds]} if seeds else None


def _stage_view(stage: str, metrics: Curves, colour: str) -> dict[str, Any]:
    steps = max((int(curve.steps[-1]) for curves in metrics.values() for curve in curves), default=0)
    seeds = max((len(curves) for curves in metrics.values()), default=0)
    panels = []
    for panel in panels_of(metrics):
        curves = find_curves(metrics, panel.names) or ()
        panels.append(chart_view(panel, curves, [f"seed {seed}" for seed in range(len(curves))]))
    return {
        "name": display(stage),
        "colour": colour,
        "steps": steps,
        "seeds": seeds,
        "panels": panels,
        "time": _time_by_part(metrics),
    }


def _time_by_part(metrics: Curves) -> str:
    """Where the time went, all steps together: `rollout 61 % (38 s), update 30 % (19 s), rest 9 % (6 s)`."""

    def seconds(part: str) -> float:
        curves = metrics.get(f"time/{part}_seconds", ())
        return float(np.mean([np.nansum(curve.values) for curve in curves])) if curves else 0.0

    found = {part: seconds(part) for part in _PARTS}
    between = found["save"] + found["eval"]  # a step's own time has neither
    whole = seconds("step") + between
    found["rest"] = whole - sum(found.values())
    if len([value for value in found.values() if value > 0]) < 2:
        return ""
    words = [
        f"{part} {value / whole:.0%} ({format_seconds(value)})"
        for part, value in found.items()
        if value > 0.005 * whole
    ]
    return ", ".join(words)


def _warnings(stage: str, metrics: Curves, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Failed health checks of a stage, with the steps at which they failed, over all seeds."""
    views = []
    for check in HEALTH_CHECKS:
        steps = sorted({int(s) for curve in metrics.get(f"{HEALTH}{check.name}", ()) for s in curve.steps})
        if steps:
            gaps = [place for place in range(1, len(steps)) if steps[place] > steps[place - 1] + 1]
            ends = zip([0, *gaps], [*gaps, len(steps)], strict=True)
            episodes = [(steps[first], steps[last - 1]) for first, last in ends]
            views.append(
                {
                    "stage": display(stage),
                    "colour": colours[stage],
                    "title": check.title,
                    "advice": check.advice,
                    "steps": ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in episodes),
                }
            )
    return views
