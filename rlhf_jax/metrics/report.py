"""The report of a run: one HTML file made from the run folder alone, readable without a network."""

import base64
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.headline import STAGE_NAMES, TableRow, base_row, display, headline
from rlhf_jax.metrics.health import HEALTH, HEALTH_CHECKS
from rlhf_jax.metrics.plots import Curve, curve_svg
from rlhf_jax.metrics.progress import format_seconds
from rlhf_jax.metrics.writers import METRICS_FILE, read_metrics

MOST = sys.float_info.max
REPORT_FILE = "report.html"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small multiple: the metrics that may fill it, by the last part of their name, first found wins."""

    title: str
    names: tuple[str, ...]
    percent: bool = False


PANELS = (
    Panel("Loss", ("loss",)),
    Panel("Held-out score", ("exact_match", "score"), percent=True),
    Panel("Pair accuracy", ("pair_accuracy", "accuracy", "reward_accuracy"), percent=True),
    Panel("Best answer on top", ("top1_accuracy",), percent=True),
    Panel("Reward", ("reward", "rewards", "mean_reward", "reward_mean")),
    Panel("Reward margin", ("margin", "reward_margin", "margins")),
    Panel("KL to the reference, nats", ("kl", "ref_kl", "kl_ref")),
    Panel("Length, tokens", ("length", "mean_length", "response_length", "completion_length")),
    Panel("Entropy, nats", ("entropy",)),
    Panel("Tokens a second", ("tokens_per_second",)),
    Panel("Share of peak FLOP/s (MFU)", ("mfu",), percent=True),
)
_TERM = "reward/"
"""Before the names of rewards that are summed."""
# What a step's time is divided into, in the order of a step.
_PARTS = ("data", "rollout", "reward", "update", "save", "eval")

_COLOURS = 8  # --c0 to --c7 in the template; the first five belong to the names above
_MOST_TEXT = 4000
_MOST_SAMPLES = 40


def write_report(
    folder: str | os.PathLike[str],
    table: Sequence[TableRow] = (),
    *,
    interval: str = "95 % interval over seeds",
    pictures: Mapping[str, Path] = {},
) -> Path:
    """Writes `folder/report.html` from what the run folder holds; parts that are missing are left out.

    It reads `summary.json`, `config.json`, `samples.json`, and `metrics.jsonl` here and below `seed_*/`.
    Texts of models are untrusted: everything is escaped, and the page forbids itself scripts and network.

    Args:
      folder: the run folder.
      table: rows of the result table in order; intervals are computed by the caller.
      interval: what the intervals of `table` are.
      pictures: caption -> PNG, which is copied into the page.
    Raises:
      UserError: a file of the folder is damaged, or the report cannot be written.
    """
    import jinja2

    folder = files.as_path(folder)
    if not files.is_folder(folder):
        raise UserError(f"{folder}: no such run folder; give the folder that the run was told with --out")
    template = (resources.files("rlhf_jax.metrics") / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template).render(
        **_view(folder, table, interval), pictures=_picture_views(pictures)
    )
    # JSON may hold lone surrogates, which UTF-8 cannot.
    data = html.encode("utf-8", errors="backslashreplace")
    path = folder / REPORT_FILE
    with files.disk_errors(path):
        files.write_whole(path, data)
    return path


def _view(folder: Path, table: Sequence[TableRow], interval: str) -> dict[str, Any]:
    """Everything the template shows, as plain values."""
    config = _read_json(folder / "config.json", dict)
    summary = _read_json(folder / "summary.json", dict)
    samples = _read_json(folder / "samples.json", list)
    curves = _read_curves(folder)
    methods = list(dict.fromkeys([*summary, *curves, *(row.method for row in table)]))
    colours = _assign_colours(methods)
    rows = _table_view(table, summary, colours)
    stages = [_stage_view(stage, metrics, colours[stage]) for stage, metrics in curves.items()]
    return {
        "title": headline(table, curves),
        "folder": folder.resolve().name,
        "command": config.get("command"),
        "started": str(config.get("started", ""))[:16].replace("T", " "),
        "seeds": config.get("seeds", []),
        "task": _flatten(config.get("task", {})),
        "config": _flatten(config.get("config", {})),
        "versions": _flatten(config.get("versions", {})),
        "rows": rows,
        "table_note": _table_note(rows, interval),
        "curves_note": _curves_note(stages),
        "reward_model": _pair_accuracy(summary),
        "stages": stages,
        "warnings": [
            view for stage, metrics in curves.items() for view in _warnings(stage, metrics, colours)
        ],
        "samples": [_sample_view(sample, colours) for sample in samples[:_MOST_SAMPLES]],
        "sample_count": len(samples),
    }


def _picture_views(pictures: Mapping[str, Path]) -> list[dict[str, str]]:
    return [
        {"caption": caption, "data": base64.b64encode(files.read_bytes(path)).decode("ascii")}
        for caption, path in pictures.items()
    ]


def _read_json(path: Path, kind: type) -> Any:
    value = files.read_json(path, otherwise=kind(), remedy="mend or remove the file")
    if not isinstance(value, kind):
        raise UserError(
            f"{path}: holds a {type(value).__name__}, not a {kind.__name__}; mend or remove the file"
        )
    return value


def _read_curves(folder: Path) -> dict[str, dict[str, list[Curve]]]:
    """Stage -> metric -> one curve a seed: the stages of RLHF in their order, then others as they come."""
    below = [path for path in files.list_folder(folder) if path.name.startswith("seed_")]
    found = [path / name for path in below for name in files.list_files(path)]
    seeds = sorted(
        (path for path in found if path.name == METRICS_FILE), key=lambda path: _natural(str(path))
    )
    points: dict[str, dict[str, list[dict[int, float]]]] = {}
    for run in [folder, *(path.parent for path in seeds)]:
        below = "/".join(run.relative_to(folder).parts[1:])  # two stages of a seed may run the same script
        of_run: dict[tuple[str, str], dict[int, float]] = {}
        for line in read_metrics(run):
            stage, step = below or str(line.get("stage", "run")), line.get("step", 0)
            for name, value in line.items():
                if name not in ("stage", "step", "time") and isinstance(value, int | float):
                    # A step written twice counts as written last. A number may have 400 digits.
                    of_run.setdefault((stage, name), {})[step] = float(min(max(value, -MOST), MOST))
        for (stage, name), values in of_run.items():
            points.setdefault(stage, {}).setdefault(name, []).append(values)
    known = [stage for stage in STAGE_NAMES if stage in points]
    return {
        stage: {name: [_to_curve(values) for values in seeds] for name, seeds in points[stage].items()}
        for stage in dict.fromkeys([*known, *points])
    }


def _to_curve(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps), np.array([points[step] for step in steps]))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


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
                    *((title, _or_dash(x, "{:.1%}".format), 100 * x) for title, x in row.shares.items()),
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


def _stage_view(stage: str, metrics: Mapping[str, Sequence[Curve]], colour: str) -> dict[str, Any]:
    import markupsafe

    panels, steps, seeds = [], 0, 0
    for curves in metrics.values():
        steps = max(steps, *(int(curve.steps[-1]) for curve in curves))
        seeds = max(seeds, len(curves))
    terms = [Panel(name.replace("_", " "), (name,)) for name in metrics if name.startswith(_TERM)]
    for panel in (*PANELS, *terms):
        curves = _find(metrics, panel.names)
        if curves and any(len(curve.steps) > 1 for curve in curves):
            panels.append(
                {"title": panel.title, "svg": markupsafe.Markup(curve_svg(curves, percent=panel.percent))}
            )
    return {
        "name": display(stage),
        "colour": colour,
        "steps": steps,
        "seeds": seeds,
        "panels": panels,
        "time": _time_by_part(metrics),
    }


def _time_by_part(metrics: Mapping[str, Sequence[Curve]]) -> str:
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


def _warnings(
    stage: str, metrics: Mapping[str, Sequence[Curve]], colours: Mapping[str, str]
) -> list[dict[str, Any]]:
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


def _find(metrics: Mapping[str, Sequence[Curve]], names: Sequence[str]) -> Sequence[Curve] | None:
    for name in names:
        if name in metrics:  # before `eval/NAME`, which may stand first
            return metrics[name]
        for full, curves in metrics.items():
            if name == (full if full.startswith(_TERM) else full.rsplit("/", 1)[-1]):
                return curves
    return None


def _sample_view(sample: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    completions = sample.get("completions", {})
    return {
        "prompt": _shorten(sample.get("prompt", "")),
        "answer": _shorten(sample.get("answer", "")),
        "completions": [
            {
                "name": display(method),
                "colour": colours.get(method, "var(--c0)"),
                "text": _shorten(completion.get("text", "")),
                "correct": completion.get("correct"),
            }
            for method, completion in completions.items()
        ],
    }


def _shorten(text: Any) -> str:
    text = str(text)
    more = len(text) - _MOST_TEXT
    return text if more <= 0 else f"{text[:_MOST_TEXT]} … ({more} more characters)"


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    if not isinstance(value, Mapping):
        return [(prefix, value if isinstance(value, str) else json.dumps(value))]
    return [
        pair
        for name, inner in value.items()
        for pair in _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    ]
