"""The page and the pictures of the study of scaling, from the runs that it left."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.evaluation import scaling_laws as laws
from rlhf_jax.metrics.pages import commands, kept_remarks, made, when_and_with
from rlhf_jax.stages import scaling_laws as stage
from rlhf_jax.stages.scaling_runs import Measured, read_run

SIZES, BATCHES = "scaling_sizes.svg", "scaling_batches.svg"
_BUDGETS = (1e12, 1e13)
"""Beyond the largest runs of the study."""


def text(page: Path, sizes: Sequence[Path], batches: Sequence[Path], targets: Sequence[float]) -> str:
    """The page; its pictures go beside it."""
    cells = [made(folder) for folder in [*sizes, *batches]]
    parts = [
        "# Scaling laws\n",
        "Written by `experiments/studies/scaling/scaling.py`. Intervals: 95 %, bootstrap over runs.\n",
        kept_remarks(page),
        of_sizes(page, [_read(folder) for folder in sizes]),
        of_batches(page, [_read(folder) for folder in batches], targets) if batches else "",
        f"## Made\n\n{when_and_with(cells)}.\n\n{commands(cells)}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _read(folder: Path) -> Measured:
    return read_run(folder, params=None, embeddings=False, loss="eval/loss", tokens="tokens", total=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


# Parameters and tokens -----------------------------------------------------------------------------


def of_sizes(page: Path, runs: Sequence[Measured]) -> str:
    """Losses of the first grid, both laws, and the parabolas."""
    options = stage.Options((), flops=_BUDGETS)
    columns = stage.points(runs)
    fitted = {name: stage.fit_law(name, columns, options) for name in stage.FITS}
    isoflops = laws.fit_isoflops(*columns)
    stage.draw_laws(page.parent / SIZES, columns, fitted["chinchilla"].law, isoflops)
    parts = [
        "\n## Parameters and tokens\n",
        "Held-out loss in nats a byte at the end of each run, by parameters without embeddings and tokens:",
        _grid(*columns),
        f"![loss against tokens and parameters]({SIZES})\n",
    ]
    for name, found in fitted.items():
        rows = [(number, f"{interval:.4g}") for number, interval in found.numbers.items()]
        parts += [
            f"{stage.FORMULAS[name]}. Error of log L: {found.error:.2%}. C = 6 N D.",
            _table(["number", "fit"], rows),
        ]
        if found.undetermined:
            parts.append(f"At an end of its range, so not determined: {', '.join(found.undetermined)}.\n")
    rows = [
        (
            f"{one.flops:.3g}",
            str(len(one.runs)),
            f"{one.params:,.0f}" if one.curvature > 0 else "no minimum",
            f"{one.loss:.3f}" if one.curvature > 0 else "-",
            "yes" if one.inside else "no",
        )
        for one in isoflops
    ]
    names = ["operations", "runs", "parameters of least loss", "loss there", "between the sizes"]
    parts += ["Parabolas through runs of equal budgets (IsoFLOP):", _table(names, rows)]
    if (exponent := stage.isoflop_exponent(isoflops)) is not None:
        parts.append(f"Their minima between the sizes: N ~ C^{exponent:.3f}.\n")
    return "\n".join(parts)


def _grid(params: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> str:
    seen = np.unique(tokens)
    rows = [
        [
            f"{size:,.0f}",
            *(f"{losses[(params == size) & (tokens == count)].mean():.3f}" for count in seen),
        ]
        for size in np.unique(params)
    ]
    return _table(["parameters", *(f"{count:,.0f} tokens" for count in seen)], rows)


# Batch sizes ---------------------------------------------------------------------------------------


def of_batches(page: Path, runs: Sequence[Measured], targets: Sequence[float]) -> str:
    """Losses of the second grid, and steps to each loss by batch size."""
    rows = [
        (
            Path(run.name).name,
            f"{run.batch_tokens:,}",
            f"{run.losses[-1]:.3f}",
            *("never" if math.isnan(steps := run.steps_to(target)) else f"{steps:.0f}" for target in targets),
        )
        for run in runs
    ]
    names = ["run", "tokens a batch", "loss at the end", *(f"steps to {target:g}" for target in targets)]
    parts = [
        "## Batch size and learning rate\n",
        "One width, constant learning rates, as many tokens in every run:",
        _table(names, rows),
    ]
    fits = []
    for target in targets:
        try:
            fits.append(stage.fit_batches(runs, target, stage.Options(())))
        except UserError as error:
            parts.append(f"No critical batch size: {error}.\n")
    for fit in fits:
        found = [(name, f"{interval:.4g}") for name, interval in fit.numbers.items()]
        parts += [
            f"To a loss of {fit.target:g}, by the fastest run of each batch size: "
            "(S / S_min - 1)(E / E_min - 1) = 1.",
            _table(["number", "fit"], found),
        ]
    if fits:
        stage.draw_batches(page.parent / BATCHES, fits)
        parts.append(f"![steps against batch size]({BATCHES})\n")
    return "\n".join(parts)
