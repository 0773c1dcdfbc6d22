"""Pictures for pages and run folders: of a page's width on a white ground, every curve named at its end."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import PathLike, as_path

WIDTH = 8.3
"""Inches, of 96 pixels: what a page shows without scaling."""
_FONT = 8.5
FORMATS = ("svg", "png", "pdf")
_COLOURS = (
    "#2768d4",
    "#c9541a",
    "#078a63",
    "#a83f95",
    "#8a6a10",
    "#5c6570",
    "#b3362b",
    "#1f8a8a",
    "#5a45b5",
    "#3d4248",
)
"""Dark enough for small letters on white."""
_AT_THE_EDGE = 0.9  # share of the panel's width from which on a line ends at its edge
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": _FONT}


@contextlib.contextmanager
def picture(path: PathLike, rows: int, columns: int, *, height: float = 2.2, **shared: Any) -> Iterator[Any]:
    """`with picture(path, rows, columns) as panels`: draws into panels, [rows * columns], and saves.

    The words of an SVG stay words, and equal numbers make equal files.

    Args:
      path: its suffix decides the format.
      height: of a row, in inches.
      shared: `sharex` and `sharey`, as matplotlib has them.

    Raises:
      UserError: no such format; the disk is full or read-only.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    suffix = format_of(path)
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": as_path(path).name,
        "font.size": _FONT,
        "axes.titlesize": _FONT + 1,
        "axes.prop_cycle": cycler(color=_COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "0.7",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.xmargin": 0.0,
        "grid.color": "0.92",
        "xtick.color": "0.35",
        "ytick.color": "0.35",
    }
    with matplotlib.rc_context(style):
        # Not pyplot: it picks a window system.
        figure = Figure(figsize=(WIDTH, height * rows), layout="constrained", facecolor="white")
        panels = figure.subplots(rows, columns, squeeze=False, **shared).reshape(-1)
        yield panels
        for axes in panels:
            if not axes.has_data():
                axes.set_axis_off()
        with files.writing(path) as local:
            dated: Any = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 150}
            figure.savefig(local, format=suffix, **dated)


def format_of(path: PathLike) -> str:
    """The format of a picture, by its suffix.

    Raises:
      UserError: it is none of `FORMATS`.
    """
    suffix = as_path(path).suffix.removeprefix(".")
    if suffix not in FORMATS:
        raise UserError(f"picture {path}: its suffix is none of {', '.join(FORMATS)}: give it one of them")
    return suffix


def name_ends(axes: Any, lines: Mapping[str, Any]) -> None:
    """Writes the name of each line beside its last point, in its colour; at the right edge, names give way to
    each other, and those that would stand in another's way within the panel go there.

    The limits of the axes must be those that they will have.

    Args:
      lines: of matplotlib, by name; of each the last point within the panel counts.
    """
    _ = axes.get_xlim(), axes.get_ylim()  # which have them computed
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {name: end for name, line in lines.items() if (end := _last_point(line, to_axes)) is not None}
    # What a name takes of the panel's height, of which titles and ticks have about a third.
    figure = axes.get_figure()
    gap = 1.15 * _FONT / (72 * figure.get_figheight() / axes.get_gridspec().nrows * 0.66)
    places = {name: to_axes.transform(end) for name, end in ends.items()}
    for name, (x, y) in places.items():
        alone = all(other == name or abs(height - y) > gap for other, (_, height) in places.items())
        if x < _AT_THE_EDGE and alone:
            axes.annotate(name, ends.pop(name), (4, 0), color=lines[name].get_color(), **_BESIDE)
    rows = [name for name in ends for _ in name.split("\n")]  # a name of two lines takes two places
    heights = np.array(spread([float(places[name][1]) for name in rows], gap))
    for name, end in ends.items():
        place = float(heights[[row == name for row in rows]].mean())
        colour = lines[name].get_color()
        axes.annotate(
            name,
            end,
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=_FONT,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of `heights`, as near to them as may be."""
    order = np.argsort(heights, kind="stable")
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([int(index)])
        while len(blocks) > 1 and _bottom(blocks[-1], heights, gap) < _top(blocks[-2], heights, gap) + gap:
            last = blocks.pop()
            blocks[-1] += last
    found = [math.nan] * len(heights)
    for block in blocks:
        bottom = _bottom(block, heights, gap)
        for place, index in enumerate(block):
            found[index] = bottom + place * gap
    return found


def _bottom(block: list[int], heights: list[float], gap: float) -> float:
    """Of names that touch each other: their mean is that of their heights."""
    return float(np.mean([heights[index] for index in block])) - gap * (len(block) - 1) / 2


def _top(block: list[int], heights: list[float], gap: float) -> float:
    return _bottom(block, heights, gap) + gap * (len(block) - 1)


def _last_point(line: Any, to_axes: Any) -> tuple[float, float] | None:
    points = np.stack([np.asarray(values, float) for values in line.get_data()], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # no logarithm of 0
        inside = np.all(np.abs(to_axes.transform(points) - 0.5) <= 0.5 + 1e-9, axis=1)
    known = np.flatnonzero(inside)  # a NaN is nowhere
    return (float(points[known[-1], 0]), float(points[known[-1], 1])) if len(known) else None
