"""The page and the learning curves of the table of results, from what its rows left behind."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.evaluation.statistics import Interval, iqm_interval
from rlhf_jax.metrics.pages import commands, when_and_with
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.metrics.progress import format_seconds
from rlhf_jax.stages import rl_joint_rows, rl_rows
from rlhf_jax.stages.rl_rows import Row
from rlhf_jax.sweep.plots import curve_with_band

HEAD = """# {title}

Written by `experiments/studies/control/rl_table.py`; the settings of each row are in
`rlhf_jax/stages/{module}.py`. Evaluation return: mean over {episodes} episodes of their own, actions
deterministic, undiscounted; then the interquartile mean (IQM) over seeds with its 95 % bootstrap interval.
Steps are environment steps of each seed. Times are those of all seeds of a row together, compilation and
evaluation included; other work ran on the same cores, so CPU time says more.
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of rows.

    Attributes:
      module: that holds the rows, of `rlhf_jax.stages`.
      page: its file, where no other is asked for.
      curves: file of the learning curves, beside the page.
      scores: file of the evaluation returns, beside the page.
    """

    title: str
    module: Any
    page: str
    curves: str
    scores: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows, in the order in which they are run."""
        return self.module.ROWS


TABLES = {
    "control": Table("Results in control", rl_rows, "RL_RESULTS.md", "rl_curves.svg", "rl_scores.svg"),
    "several_agents": Table(
        "Several agents",
        rl_joint_rows,
        "SEVERAL_AGENTS.md",
        "several_agents_curves.svg",
        "several_agents_scores.svg",
    ),
}


def iqm(summary: Mapping[str, Any], name: str = "evaluation_return") -> Interval:
    """Interquartile mean over seeds with its bootstrap interval."""
    return iqm_interval(summary[name])


def verdict(row: Row, found: Interval) -> str:
    """Whether the number to beat was reached: by the interval's ends, or else by the mean."""
    if row.to_beat is None:
        return ""
    if found.low >= row.to_beat:
        return "yes"
    if found.mean >= row.to_beat:
        return "yes, within the interval"
    return "within the interval" if found.high >= row.to_beat else "no"


def table_line(row: Row, summary: Mapping[str, Any] | None) -> str:
    """One line of the Markdown table."""
    what = f"{row.algo} ({row.variant})" if row.variant else row.algo
    to_beat = "-" if row.to_beat is None else f"{row.to_beat:g}" + (f" ({row.source})" if row.source else "")
    if summary is None:
        return f"| {row.env} | {what} | {row.steps:,} | - | not run | - | {to_beat} | | | |"
    steps, seeds = summary["steps"], summary["seeds"]
    of = f"{steps:,}" if steps == row.steps else f"{steps:,} of {row.steps:,}"
    found, sampled = iqm(summary), iqm(summary, "evaluation_return_sampled")
    least = min(summary["evaluation_return"])
    cpu, wall = (
        "-" if summary[name] is None else format_seconds(summary[name]) for name in ("cpu_seconds", "seconds")
    )
    numbers = f"{found:.1f} | {least:.1f} | {to_beat} | {verdict(row, found)} | {sampled.mean:.1f}"
    return f"| {row.env} | {what} | {of} | {seeds} | {numbers} | {cpu} / {wall} |"


def page_text(done: Mapping[str, Mapping[str, Any]], table: Table) -> str:
    """The page."""
    episodes = sorted({summary["eval_episodes"] for summary in done.values()})
    lines = [
        HEAD.format(
            title=table.title,
            module=table.module.__name__.rpartition(".")[2],
            episodes=" or ".join(map(str, episodes)),
        ),
        "| environment | algorithm | steps | seeds | IQM and 95 % interval | least seed | to beat | reached "
        "| IQM, sampled actions | CPU / wall time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(table_line(row, done.get(row.name)) for row in table.rows),
    ]
    if done:
        lines += ["", f"![returns]({table.scores})", "", "Dots: IQM with its interval; bars across: to beat."]
    notes = [f"- {row.name}: {row.note}" for row in table.rows if row.note]
    if notes:
        lines += ["", "## Notes", "", *notes]
    if done:
        lines += ["", "## Made", "", f"{when_and_with(done.values())}.", "", commands(done.values())]
        lines += ["", f"![learning curves]({table.curves})"]
        lines += ["", "Return of the episodes of training: IQM over seeds and its 95 % bootstrap interval."]
    return "\n".join(lines) + "\n"


def name_of(row: Row) -> str:
    """An algorithm as pictures name it."""
    return f"{row.algo}\n{row.variant}".strip()


def draw_scores(path: Path, scores: Mapping[tuple[str, str], tuple[Interval, float | None]]) -> None:
    """Evaluation return of each algorithm with its interval, and what was to beat: a panel an environment.

    Args:
      scores: (interval, number to beat) by environment and algorithm.
    """
    panels = list(dict.fromkeys(env for env, _ in scores))
    columns = min(len(panels), 2)
    most = max(sum(1 + algo.count("\n") for of, algo in scores if of == env) for env in panels)
    with picture(path, -(-len(panels) // columns), columns, height=max(1.7, 0.22 * most + 0.5)) as grid:
        for axes, env in zip(grid, panels, strict=False):
            rows = {algo: found for (of, algo), found in scores.items() if of == env}
            for place, (found, to_beat) in enumerate(rows.values()):
                axes.plot([found.low, found.high], [place, place], color="C0", linewidth=1.6)
                axes.plot(found.mean, place, "o", color="C0", markersize=4)
                if to_beat is not None:
                    axes.plot(to_beat, place, "|", color="C1", markersize=11, markeredgewidth=1.6)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.margins(x=0.08)
            axes.set(title=env, xlabel="return")


def scores_of(
    done: Mapping[str, Mapping[str, Any]], table: Table
) -> dict[tuple[str, str], tuple[Interval, float | None]]:
    """What `draw_scores` draws."""
    return {
        (row.env, name_of(row)): (iqm(done[row.name]), row.to_beat) for row in table.rows if row.name in done
    }


def curve(folder: Path) -> dict[str, list[float | None]]:
    """A row's learning curve of at most 50 points, as JSON: steps, and of the mean return of the episodes of
    training the IQM over seeds and its interval; None where no episode ended.
    """
    import pyarrow.parquet as pq

    names = ("seed", "steps", "episodes", "episode_return_sum")
    table = pq.read_table(folder / "results.parquet", columns=list(names))
    seeds = int(np.max(table["seed"])) + 1
    steps, episodes, sums = (np.asarray(table[name]).reshape(seeds, -1) for name in names[1:])
    parts = np.array_split(np.arange(steps.shape[1]), min(steps.shape[1], 50))
    count, total = (np.stack([x[:, part].sum(axis=1) for part in parts], axis=1) for x in (episodes, sums))
    lines = curve_with_band(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    points = [steps[:, part[-1]].mean() for part in parts], *lines
    return {
        name: [float(f"{y:.5g}") if np.isfinite(y) else None for y in line]
        for name, line in zip(("steps", "iqm", "low", "high"), points, strict=True)
    }


def draw(path: Path, done: Mapping[str, Mapping[str, Any]], table: Table) -> None:
    """Learning curves, a panel for each environment and number of steps, so that none is a smear beside
    another.
    """
    rows = [row for row in table.rows if row.name in done]
    panels = list(dict.fromkeys((row.env, row.steps) for row in rows))
    columns = min(len(panels), 2)
    with picture(path, -(-len(panels) // columns), columns) as grid:
        for axes, (env, steps) in zip(grid, panels, strict=False):
            lines = {}
            for row in rows:
                if (row.env, row.steps) == (env, steps):
                    names = ("steps", "iqm", "low", "high")
                    x, middle, low, high = (np.array(done[row.name]["curve"][name], float) for name in names)
                    (line,) = axes.plot(x / 1000, middle, linewidth=1.3)
                    axes.fill_between(x / 1000, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
                    lines[name_of(row)] = line
            axes.set(title=env, xlabel="thousand environment steps", ylabel="return", xlim=(0, steps / 1000))
            name_ends(axes, lines)


def write(path: Path, done: Mapping[str, Mapping[str, Any]], table: Table) -> None:
    """Writes the page, and the curves beside it.

    Raises:
      UserError: the disk is full or read-only.
    """
    files.write_text(path, page_text(done, table))
    if done:
        draw_scores(path.with_name(table.scores), scores_of(done, table))
    draw(path.with_name(table.curves), done, table)
