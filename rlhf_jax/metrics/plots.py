"""Small curves as inline SVG. Colours stay CSS, so that one picture fits a light and a dark page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# matplotlib wants real colours. These stand in for CSS ones and are replaced in the SVG text.
_STAND_INS = {"#0a0b01": "var(--chart-line)", "#0a0b02": "var(--chart-grid)", "#0a0b03": "var(--chart-text)"}
_LINE, _GRID, _TEXT = _STAND_INS
_RUNS = {f"var(--c{index})": f"#0a0c{index:02d}" for index in range(8)}
_STAND_INS |= {stand_in: colour for colour, stand_in in _RUNS.items()}
_MOST_POINTS = 160


@dataclass(frozen=True)
class Curve:
    """One seed's metric over steps.

    Attributes:
      steps: increasing.
      values: one a step, all finite.
    """

    steps: np.ndarray
    values: np.ndarray


def are_shares(curves: Sequence[Curve]) -> bool:
    """True if all values are between 0 and 1: a score may also be a reward, which percents would tear."""
    return all(np.nanmin(curve.values) >= 0 and np.nanmax(curve.values) <= 1 for curve in curves)


def curve_svg(curves: Sequence[Curve], *, percent: bool = False, colours: Sequence[str] = ()) -> str:
    """A metric over steps: each seed thin, their smoothed mean thick, its last value written at its end.

    Args:
      curves: one a seed, at least one, none of them empty.
      colours: `var(--c0)` to `var(--c7)`, one a curve, where each is a run of its own: then no mean is drawn,
        and each is smoothed.
      percent: the values are shares; the axis runs from 0 to 100 %.
    Returns:
      One `<svg>` element without script, style sheet, ids of groups or fixed size. The page around it sets
      the CSS variables `--chart-line`, `--chart-grid` and `--chart-text`.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    curves = [thin_out(curve) for curve in curves]
    runs = [(trend([curve]), _RUNS[colour]) for curve, colour in zip(curves, colours, strict=bool(colours))]
    thick = runs or [(trend(curves), _LINE)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curve", "font.size": 9.5}):
        # Figure and canvas directly: pyplot would keep global state and pick a window system.
        figure = Figure(figsize=(3.3, 1.75))
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_axes((0.135, 0.15, 0.69, 0.77))
        for place, curve in enumerate(curves):
            colour = _RUNS[colours[place]] if colours else _LINE
            axes.plot(curve.steps, curve.values, color=colour, alpha=0.28, linewidth=0.8)
        for line, colour in thick:
            axes.plot(line.steps, line.values, color=colour, linewidth=1.9, solid_capstyle="round")
            axes.plot(line.steps[-1:], line.values[-1:], "o", color=colour, markersize=4.2, clip_on=False)
        _set_limits(axes, curves, [line for line, _ in thick], percent)
        _set_ticks(axes, percent)
        for line, colour in thick:
            _label_end(axes, line, colour, percent)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.print_svg(text, metadata=nothing)
    return _clean_svg(text.getvalue())


def _label_end(axes: Any, line: Curve, colour: str, percent: bool) -> None:
    axes.annotate(
        _label(float(line.values[-1]), percent, float(np.ptp(axes.get_ylim()))),
        (float(line.steps[-1]), float(line.values[-1])),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=10.5,
        fontweight="bold",
        annotation_clip=False,
    )


def trend(curves: Sequence[Curve]) -> Curve:
    """The smoothed mean over seeds, in few points."""
    return smooth(thin_out(mean_curve([thin_out(curve) for curve in curves])))


def thin_out(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """At most `most` points: means of runs of neighbours, so that no spike appears or moves by chance."""
    count = len(curve.steps)
    if count <= most:
        return curve
    starts = np.linspace(0, count, most, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, count))
    return Curve(
        steps=np.add.reduceat(curve.steps.astype(float), starts) / sizes,
        values=np.add.reduceat(curve.values.astype(float), starts) / sizes,
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds on the steps that all of them cover; the longest curve where they share none."""
    first = max(curve.steps[0] for curve in curves)
    last = min(curve.steps[-1] for curve in curves)
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        return max(curves, key=lambda curve: len(curve.steps))
    return Curve(steps, np.mean([np.interp(steps, curve.steps, curve.values) for curve in curves], axis=0))


def smooth(curve: Curve) -> Curve:
    """Gaussian running mean, two percent of the points wide; curves of a few points stay as they are."""
    count = len(curve.values)
    width = count / 50
    if width < 0.5:
        return curve
    offsets = np.arange(count)
    weights = np.exp(-0.5 * ((offsets[:, None] - offsets[None, :]) / width) ** 2)
    return Curve(curve.steps, weights @ curve.values / weights.sum(axis=1))


def _set_limits(axes: Any, curves: Sequence[Curve], thick: Sequence[Curve], percent: bool) -> None:
    axes.margins(x=0)
    if percent:
        axes.set_ylim(0, 1)
        return
    # Single spikes of a seed may leave the picture; the mean never does.
    values = np.concatenate([curve.values for curve in curves])
    drawn = np.concatenate([line.values for line in thick])
    low = min(float(np.percentile(values, 1)), float(np.min(drawn)))
    high = max(float(np.percentile(values, 99)), float(np.max(drawn)))
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _set_ticks(axes: Any, percent: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if percent:
        axes.set_yticks((0, 0.5, 1))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, percent, axes.get_ylim())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, False, axes.get_xlim())))
    axes.tick_params(length=0, colors=_TEXT, pad=4)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)


def _tick(value: float, percent: bool, limits: tuple[float, float]) -> str:
    """All ticks of an axis in one notation, which the largest of them decides."""
    if percent:
        return f"{100 * value:.0f} %"
    largest = max(map(abs, limits))
    if value == 0:
        return "0"
    if largest >= 1e6 or largest < 1e-3:
        return _power(f"{value:.1e}")
    return f"{value / 1000:g}k" if largest >= 10_000 else f"{value:.10g}"


def _label(value: float, percent: bool, span: float) -> str:
    """Three digits, in the notation of the axis."""
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) < 1e-4 * span:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return _power(f"{value:.2e}")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _power(text: str) -> str:
    """`2.5e-04` as `2.5e-4`, `2.0e+06` as `2e6`."""
    digits, _, exponent = text.partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _clean_svg(text: str) -> str:
    """Keeps what an HTML page needs of matplotlib's SVG document."""
    text = text[text.index("<svg") :]
    # Its style sheet would apply to the whole page, group ids repeat from picture to picture,
    # and the size is the page's business.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    for stand_in, colour in _STAND_INS.items():
        text = text.replace(stand_in, colour)
    return re.sub(r">\s+<", "><", text).strip()
