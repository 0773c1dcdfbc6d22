"""Learning curves of a run folder, and the charts of a page that show them."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.headline import STAGE_NAMES
from rlhf_jax.metrics.plots import Curve, are_shares, curve_svg, thin_out
from rlhf_jax.metrics.writers import METRICS_FILE, read_metrics

MOST = 1e300
"""Numbers are drawn up to here, so that the room around them is a number, too."""

Curves = Mapping[str, Sequence[Curve]]
"""Metric -> one curve a seed."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small multiple: the metrics that may fill it, by the last part of their name, first found wins."""

    title: str
    names: tuple[str, ...]
    percent: bool = False


PANELS = (
    Panel("Loss", ("loss",)),
    Panel("Held-out loss", ("eval/loss",)),
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


def read_curves(folder: Path) -> dict[str, dict[str, list[Curve]]]:
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


def find_curves(metrics: Curves, names: Sequence[str]) -> Sequence[Curve] | None:
    """The curves of the first of these metrics that there is, by its full name or by its last part."""
    for name in names:
        if name in metrics:  # before `eval/NAME`, which may stand first
            return metrics[name]
        for full, curves in metrics.items():
            if name == (full if full.startswith(_TERM) else full.rsplit("/", 1)[-1]):
                return curves
    return None


def panels_of(metrics: Curves) -> list[Panel]:
    """The panels that these metrics fill, each of the summed rewards with one of its own."""
    terms = [Panel(name.replace("_", " "), (name,)) for name in metrics if name.startswith(_TERM)]
    panels = [panel for panel in (*PANELS, *terms) if _is_drawn(find_curves(metrics, panel.names))]
    # An evaluation's loss that stands alone is the panel of the loss already.
    return [panel for panel in panels if panel.names != ("eval/loss",) or "loss" in metrics]


def _is_drawn(curves: Sequence[Curve] | None) -> bool:
    return bool(curves) and any(len(curve.steps) > 1 for curve in curves or ())


def chart_view(
    panel: Panel, curves: Sequence[Curve], names: Sequence[str], colours: Sequence[str] = ()
) -> dict[str, Any]:
    """A chart for the template: its title, a picture for where scripts are off, and data for the script.

    Args:
      names: of the curves, such as `seed 0`.
      colours: of the curves, each of them a run of its own; none for seeds of one run, in the page's colour.
    """
    import markupsafe

    percent = panel.percent and are_shares(curves)
    lines = []
    for place, curve in enumerate(map(thin_out, curves)):
        points = [[_short(x), _short(y)] for x, y in zip(curve.steps, curve.values, strict=True)]
        colour = {"colour": colours[place]} if colours else {}
        lines.append({"name": names[place], "points": points, **colour})
    data = {"percent": percent, "runs": bool(colours), "lines": lines}
    return {
        "title": panel.title,
        "svg": markupsafe.Markup(curve_svg(curves, percent=percent, colours=colours)),
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False),
    }


def _short(value: float) -> float | int:
    number = float(f"{float(value):.5g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
