"""Progress of a stage on the console: a bar in a terminal, a plain line now and then elsewhere."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress as RichProgress, TextColumn
from rich.table import Column, Table
from rich.text import Text

SAMPLED_METRICS = ("reward", "win_rate", "eval/score", "kl", "length", "entropy")
"""What is shown of a stage whose answers are rewarded or judged, in this order. Its loss says nothing."""
FITTED_METRICS = (
    "episode_return",
    "loss",
    "accuracy",
    "margin",
    "eval/score",
    "kl",
    "length",
    "entropy",
    "time/tokens_per_second",
)
"""What is shown of every other stage: those that it has, in this order."""
_NAME_WIDTH = 12
_MOST_SHOWN = 5
_LABELS = {"time/tokens_per_second": "tokens/s"}

_RATE_WINDOW_SECONDS = 30.0
_SECONDS_BETWEEN_FRAMES = 0.1


class Progress:
    """One stage's progress: share done, steps a second, time left and a few live metrics.

    The rate is that of the last half minute and starts at the first step, so that compilation, which
    comes before it, does not spoil it. In a narrow terminal words are cut off, never the bar and the steps.

    Args:
      stage: what is running, such as "sft".
      total: number of steps at the end.
      completed: steps already done, on resume.
      shown: names of the metrics to show, in this order; None shows those that matter to the stage
        (`choose_shown`).
      quiet: show nothing.
      seconds_between_lines: how often a plain line is printed where there is no terminal.
      console: where to write; standard error by default, which leaves standard output to results.
      clock: seconds from any origin.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        completed: int = 0,
        shown: Sequence[str] | None = None,
        quiet: bool = False,
        seconds_between_lines: float = 15.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._completed = stage, total, completed
        self._shown, self._quiet = shown, quiet
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._started = clock()
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._bar = _make_bar(self._console) if self._console.is_terminal and not quiet else None
        self._seconds_between = _SECONDS_BETWEEN_FRAMES if self._bar else seconds_between_lines
        self._shown_at = self._started
        self._task = self._bar and self._bar.add_task(
            stage, total=total, completed=completed, text="compiling the first step"
        )
        self._evaluated: dict[str, Any] = {}  # shown until the next evaluation

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, *, note: str = "") -> None:
        """Says that `step` steps are done. Device arrays are fetched only when they are about to be shown.

        Args:
          metrics: by name; those of an evaluation (`eval/...`) stay until the next one.
          note: words that are shown behind the metrics.
        """
        self._evaluated |= {name: x for name, x in (metrics or {}).items() if name.startswith("eval/")}
        if step == 0:  # an evaluation before the first step
            return
        now = self._clock()
        self._completed = step
        self._marks.append((now, step))
        # The oldest mark may stay a little over the window: slow steps need two marks to have a rate.
        while len(self._marks) > 2 and now - self._marks[1][0] > _RATE_WINDOW_SECONDS:
            self._marks.popleft()
        if self._quiet or (step < self._total and now - self._shown_at < self._seconds_between):
            return
        self._shown_at = now
        self._show(now, self._evaluated | dict(metrics or {}), note)

    def log(self, text: str) -> None:
        """Prints a line above the bar, such as the result of an evaluation."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, thing: Any) -> None:
        """Prints what rich can show, such as a table, above the bar."""
        if not self._quiet:
            self._console.print(thing)

    @property
    def steps_per_second(self) -> float:
        """Rate over the last half minute; 0 before the second update."""
        if len(self._marks) < 2:
            return 0.0
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        return (last_step - first_step) / max(last_time - first_time, 1e-9)

    def _show(self, now: float, metrics: Mapping[str, Any], note: str) -> None:
        names = choose_shown(metrics) if self._shown is None else [n for n in self._shown if n in metrics]
        live = [f"{_label(name)} {format_number(float(np.asarray(metrics[name])))}" for name in names]
        rate = self.steps_per_second
        if self._completed >= self._total:
            when = f"done in {format_seconds(now - self._started)}"
        elif rate > 0:
            when = f"{format_seconds((self._total - self._completed) / rate)} left"
        else:
            when = "compiling"  # the second step may compile, too
        parts = [part for part in (_format_rate(rate) if rate > 0 else "", when, *live, note) if part]
        text = "  ".join(parts)
        if self._bar is not None and self._task is not None:
            used = _NAME_WIDTH + _bar_width(self._console) + len(f"{self._completed}/{self._total}") + 3
            while len(parts) > 1 and used + len(text) > self._console.width:
                text = "  ".join(parts := parts[:-1])  # half a number would be read as another
            self._bar.update(self._task, completed=self._completed, text=text)
        else:
            share = 100 * self._completed // max(self._total, 1)
            self.log(f"{self._stage:<{_NAME_WIDTH}} {self._completed}/{self._total}  {share:3d} %  {text}")


def choose_shown(metrics: Mapping[str, Any]) -> list[str]:
    """The few metrics that tell how a stage is going; the first ones where none of them is known."""
    sampled = "length" in metrics and not metrics.keys().isdisjoint(("reward", "win_rate"))
    known = [name for name in (SAMPLED_METRICS if sampled else FITTED_METRICS) if name in metrics]
    others = [name for name in metrics if not name.startswith(("time/", "health/"))]
    return (known or others)[:_MOST_SHOWN]


def final_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, console: Console | None = None
) -> None:
    """Prints a table on standard output; the first column to the left, the others to the right.

    Args:
      title: a line above the table; empty for none.
      columns: their names.
      rows: cells; floats go through `format_number`, None is shown as a dash, the rest as text.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            # A file or pipe has no width of its own; do not fold rows at rich's guess of 80.
            console.width = max(console.width, 160)
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for position, name in enumerate(columns):
        table.add_column(name, justify="right" if position else "left", overflow="fold")
    for row in rows:
        # As Text, because words from files and models may look like console markup.
        table.add_row(*(Text(_cell(cell)) for cell in row))
    console.print(table)


def format_seconds(seconds: float) -> str:
    """`4.2 ms`, `0.42 s`, `4.2 s`, `38 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_number(number: float) -> str:
    """Four significant digits, whole numbers whole, powers of ten only where zeros would hide the number."""
    if number == 0 or (1e-3 <= abs(number) < 1e6):
        if float(number).is_integer():
            return f"{number:.0f}"
        return f"{number:.4g}" if abs(number) < 1e4 else f"{number:.0f}"
    return f"{number:.2e}"


def _format_rate(steps_per_second: float) -> str:
    if steps_per_second >= 1:
        return f"{steps_per_second:.1f} steps/s"
    return f"{1 / steps_per_second:.1f} s/step"


def _label(name: str) -> str:
    return _LABELS.get(name, name.rpartition("/")[2].replace("_", " "))


def _cell(cell: Any) -> str:
    if cell is None:
        return "-"
    return format_number(cell) if isinstance(cell, float) else str(cell)


def _bar_width(console: Console) -> int:
    return 28 if console.width >= 100 else 12


def _make_bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn(
            f"[bold]{{task.description:<{_NAME_WIDTH}}}", markup=True, table_column=Column(no_wrap=True)
        ),
        BarColumn(bar_width=_bar_width(console)),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
        # The only column that may shrink.
        TextColumn(
            "{task.fields[text]}",
            markup=False,
            style="dim",
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        refresh_per_second=8,
        expand=True,
    )
