"""The picture and the table of `r1.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pipeline_stages

from rlhf_jax.metrics import TableRow, final_table, format_seconds, read_metrics
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.metrics.plots import Curve, smooth, trend

RUNS = {
    "zero": "R1-Zero",
    "zero_mixed": "R1-Zero without the\nreward for one language",
    "reasoning": "RL after the cold start",
}
PANELS = {
    "length": "Length of an answer, tokens",
    "reward/symbolic_reward": "Right answers",
    "reward/think_answer_reward": "Thought and answer in tags",
    "reward/step_language_reward": "Steps in the language of the prompt",
}
CAPTION = (
    "Answers to training problems, sampled at temperature 1, against the step of RL. "
    "Thin: one seed each; thick: their smoothed mean."
)


def curve(folder: Path, name: str) -> Curve:
    """A metric of a run over its steps."""
    import numpy as np

    points = {line["step"]: line[name] for line in read_metrics(folder) if name in line}
    return Curve(np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))


def draw(path: Path, out: Path, seeds: Sequence[int]) -> None:
    """Length, accuracy, format and language of the RL stages, a panel each."""
    with picture(path, 2, 2, height=2.3) as grid:
        for axes, (name, title) in zip(grid, PANELS.items(), strict=True):
            lines = {}
            for number, (run, label) in enumerate(RUNS.items()):
                curves = [curve(out / f"seed_{seed}" / run, name) for seed in seeds]
                for one in curves:
                    thin = smooth(one)
                    axes.plot(thin.steps, thin.values, color=f"C{number}", alpha=0.3, linewidth=0.8)
                thick = trend(curves)
                (lines[label],) = axes.plot(thick.steps, thick.values, color=f"C{number}", linewidth=1.8)
            axes.set(title=title, xlabel="step of RL")
            axes.set_ylim(bottom=0, top=1.02 if name.startswith("reward/") else None)
            name_ends(axes, lines)


def show(
    rows: Sequence[TableRow],
    summary: Mapping[str, Mapping[str, Sequence[float]]],
    over: str,
    seconds: float,
) -> None:
    """Prints the table."""
    pairs = pipeline_stages.mean(summary["reward_model"]["pair_accuracy"])
    columns = ["policy", "right", "interval", "sampled", *rows[0].shares, "length, tokens", "wall time"]
    final_table(
        f"Held-out problems, most likely answers (95 % interval over {over}); "
        f"reward model: {pairs:.1%} of held-out pairs right",
        columns,
        [
            [
                row.method.replace("_", " "),
                f"{row.exact_match[0]:.1%}",
                f"[{row.exact_match[1]:.1%}, {row.exact_match[2]:.1%}]",
                f"{pipeline_stages.mean(summary[row.method]['sampled_exact_match']):.1%}",
                *(f"{share:.1%}" for share in row.shares.values()),
                f"{row.length:.1f}",
                format_seconds(row.seconds),
            ]
            for row in rows
        ],
    )
    print(f"Wall time: {format_seconds(seconds)}")
