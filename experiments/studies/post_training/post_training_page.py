"""The page of the table of post-training algorithms, and its pictures, from what the cells left behind."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import post_training_methods
import post_training_rows

from rlhf_jax.core import files
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.evaluation.statistics import (
    Interval,
    interquartile_mean,
    probability_of_improvement,
    stratified_bootstrap_interval,
)
from rlhf_jax.metrics.pages import commands, kept_remarks, when_and_with
from rlhf_jax.metrics.pictures import picture
from rlhf_jax.metrics.progress import format_seconds

PICTURE = "table_scores.svg"
Summaries = Mapping[tuple[str, str], Mapping[str, Any]]

HEAD = """# Post-training algorithms, one table

Written by `experiments/studies/post_training/post_training.py`; tasks, algorithms and all settings are in
`experiments/studies/post_training/post_training_rows.py`.

A cell: held-out score of sampled answers as a share of the best there is, in percent: interquartile mean over
seeds with its 95 % bootstrap interval; below it the KL to the policy all start from (nats an answer) and the
learning rate that the search chose, the time that the search and all seeds took together (other work ran
on the same cores), and the commit that made it. All sample the same number of answers; `start` is where all
begin.

What it does not show: models of some ten thousand parameters on synthetic tasks with exact rewards say how
the algorithms differ where everything else is equal and cheap to repeat, and nothing of how they scale.
"""


def iqm(summary: Mapping[str, Any], name: str = "sampled_score") -> Interval:
    """Interquartile mean over seeds with its bootstrap interval."""
    return stratified_bootstrap_interval(np.asarray(summary[name])[:, None], statistic_fn=interquartile_mean)


def cell(summary: Mapping[str, Any] | None) -> str:
    """The score of a cell in percent."""
    if summary is None:
        return "-"
    found = iqm(summary)
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _full_cell(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "not run"
    kl, seconds = np.mean(summary["kl"]), summary["seconds"]
    took = f", {format_seconds(seconds)}" if seconds else ""  # not known where a cell was interrupted
    commit = (summary.get("commit") or "")[:7] or "commit not noted"
    return f"{cell(summary)}<br>KL {kl:.2g}, lr {summary['learning_rate']:g}{took}, {commit}"


def page_text(done: Summaries, starts: Mapping[str, Mapping[str, Any]], remarks: str) -> str:
    """The page; `remarks` say in words what it shows."""
    tasks = [row.name for row in post_training_rows.TASKS if any(task == row.name for task, _ in done)]
    lines = [
        HEAD,
        remarks,
        "",
        "## Scores",
        "",
        f"| algorithm | {' | '.join(tasks)} | what it is |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    lines.append(f"| start | {' | '.join(cell(starts.get(task)) for task in tasks)} | where all begin |")
    for number, algorithm in enumerate(post_training_rows.ALGORITHMS, 1):
        cells = [_full_cell(done.get((task, algorithm.name))) for task in tasks]
        if any(text != "not run" for text in cells):
            lines.append(f"| {number} {algorithm.name} | {' | '.join(cells)} | {algorithm.what} |")
    seeds = sorted({summary["seeds"] for summary in done.values()})
    lines += ["", f"Seeds a cell: {' or '.join(map(str, seeds))}.", ""]
    if ("style", "grpo") in done or len(done) > 1:
        lines += [
            f"![scores of every algorithm on every task]({PICTURE})",
            "",
            "The scores of the table with their intervals, a task a panel, in grey the KL to the start in "
            "nats an answer; the line is where all begin.",
            "",
        ]
    lines += _against_grpo(done, tasks)
    total = format_seconds(sum(summary["seconds"] or 0.0 for summary in done.values()))
    how = when_and_with(done.values())
    lines += [*_settings(tasks), "## Made", "", f"{how}; {total} in all.", "", commands(done.values())]
    return "\n".join(lines) + "\n"


def _settings(tasks: list[str]) -> list[str]:
    """The numbers of `table_rows.py`, as tables; options for a quick look are not seen here."""
    lines = [
        "## Settings",
        "",
        "| task | width | layers | supervised steps before | their learning rate | steps |",
        "|---" * 6 + "|",
    ]
    for row in post_training_rows.TASKS:
        if row.name in tasks:
            numbers = (row.width, row.layers, row.base_steps, row.base_learning_rate, row.steps)
            lines.append(f"| {row.name} | {' | '.join(f'{number:g}' for number in numbers)} |")
    lines += ["", "| algorithm | besides the learning rate | answers a step |", "|---|---|---|"]
    for algorithm in post_training_rows.ALGORITHMS:
        hyper = named_leaves(algorithm.hyper)
        named = (f"`{name}` {value:g}" for name, value in hyper.items() if name != "learning_rate")
        lines.append(f"| {algorithm.name} | {', '.join(named) or '-'} | {64 * algorithm.cost:g} |")
    return [
        *lines,
        "",
        f"A supervised step has 64 rows, a prompt {post_training_methods.GROUP} answers; who samples more "
        "than 64 answers a step takes fewer steps. The optimizer is Adam (b2 .99, epsilon 1e-4, gradients "
        "clipped at a norm of 1), its learning rate linear to 0 after a warm-up of a twentieth of the steps.",
        "",
    ]


def _against_grpo(done: Summaries, tasks: list[str]) -> list[str]:
    """Probability that a run of each algorithm scores higher than one of GRPO."""
    rows = []
    for algorithm in post_training_rows.ALGORITHMS:
        found = []
        for task in tasks:
            ours, grpo = done.get((task, algorithm.name)), done.get((task, "grpo"))
            if ours is None or grpo is None or algorithm.name == "grpo":
                found.append("-")
                continue
            scores = (np.asarray(side["sampled_score"])[:, None] for side in (ours, grpo))
            interval = stratified_bootstrap_interval(*scores, statistic_fn=probability_of_improvement)
            found.append(f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]")
        if any(text != "-" for text in found):
            rows.append(f"| {algorithm.name} | {' | '.join(found)} |")
    if not rows:
        return []
    head = [f"| algorithm | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    return ["## Probability that a run beats one of GRPO", "", *head, *rows, ""]


Cells = Mapping[str, Mapping[str, tuple[Interval, float]]]
"""Task -> algorithm -> (score, KL)."""


def cells_of(done: Summaries) -> Cells:
    """What the picture shows, in the order of the page."""
    found: dict[str, dict[str, tuple[Interval, float]]] = {row.name: {} for row in post_training_rows.TASKS}
    for (task, algorithm), summary in done.items():
        found[task][algorithm] = iqm(summary), float(np.mean(summary["kl"]))
    return {task: cells for task, cells in found.items() if cells}


def draw(path: Path, cells: Cells, starts: Mapping[str, float]) -> None:
    """Scores with their intervals: a row an algorithm, a panel a task; readable 800 pixels wide.

    Args:
      starts: score of the start on each task.
    """
    from matplotlib.lines import Line2D

    known = {algorithm.name: algorithm for algorithm in post_training_rows.ALGORITHMS}
    names = [name for name in known if any(name in scores for scores in cells.values())]
    with picture(path, 1, len(cells), height=0.165 * len(names) + 1.0, sharey=True) as panels:
        for axes, (task, scores) in zip(panels, cells.items(), strict=True):
            axes.axvline(100 * starts.get(task, math.nan), color="0.6", linewidth=0.8, zorder=0)
            for row, name in enumerate(names):
                if name in scores:
                    score, kl = scores[name]
                    colour, low, high = _colour(known[name]), 100 * score.low, 100 * score.high
                    axes.plot([low, high], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
                    axes.plot(100 * score.mean, row, "o", color=colour, markersize=4)
                    place = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "right"}
                    axes.annotate(f"{kl:.2g}", (1.0, row), fontsize=7, color="0.45", **place)
            axes.set(title=task, xlabel="score, %")
            low, high = axes.get_xlim()
            axes.set_xlim(low, high + 0.22 * (high - low))  # room for the KL
            axes.grid(visible=False, axis="x")
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        families = dict.fromkeys(known[name].family for name in names)
        handles = [
            Line2D([], [], marker="o", linestyle="", color=f"C{post_training_rows.FAMILIES.index(one)}")
            for one in families
        ]
        panels[0].get_figure().legend(
            handles, families, loc="outside upper center", ncols=len(families), frameon=False
        )


def _colour(algorithm: post_training_rows.AlgorithmRow) -> str:
    return f"C{post_training_rows.FAMILIES.index(algorithm.family)}"


def write(path: Path, done: Summaries, starts: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the page, and the pictures beside it; what was written there by hand stays.

    Raises:
      UserError: the disk is full or read-only.
    """
    if not done:
        return
    files.write_text(path, page_text(done, starts, kept_remarks(path)))
    begun = {task: iqm(summary).mean for task, summary in starts.items()}
    draw(path.with_name(PICTURE), cells_of(done), begun)
