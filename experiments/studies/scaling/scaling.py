"""Loss of small decoders against parameters, tokens and operations, and against batch size and learning rate.

    python experiments/studies/scaling/scaling.py --out runs/scaling --data shakespeare/input.txt
    python experiments/studies/scaling/scaling.py --out runs/scaling --data shakespeare/input.txt \\
        --page docs/results/scaling.md

Every cell is a run of `rlhf pretrain`, and one that is finished is not run again. The first grid has every
width with every number of steps; the second has every batch size with every learning rate, at one width and
as many tokens each. What `rlhf scaling-laws` finds in them stands on the page.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import scaling_page

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.ranges import LearningRate, Length, Positive, PositiveInt, Seed, Width
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import option_groups, pretrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The grids.

    Attributes:
      out: folder of all runs.
      page: where the page goes, with its pictures beside it; None for the folder of the runs.
      data: plain text, as `rlhf pretrain` takes it.
      widths: of the decoders.
      layers: of all of them.
      steps: of the runs of each width.
      batch_size: rows a step, in the first grid.
      learning_rate: at its peak, in the first grid.
      max_seq_length: tokens a row.
      eval_rows: held-out rows that are evaluated at the end, in the first grid.
      batch_sizes: of the second grid; none to leave it out.
      learning_rates: of the second grid.
      batch_rows: rows that each of its runs sees.
      batch_eval_rows: held-out rows of its evaluations, of which there are 16.
      batch_width: width of its decoders.
      target_losses: held-out losses to which its steps are counted.
      seed: of all runs.
      quiet: show no progress.
    """

    out: Path = Path("runs/scaling")
    page: Path | None = None
    data: str
    widths: tuple[Width, ...] = (32, 48, 64, 96)
    layers: Width = 3
    steps: tuple[PositiveInt, ...] = (128, 256, 512, 1024)
    batch_size: PositiveInt = 2
    learning_rate: LearningRate = 3e-3
    max_seq_length: Length = 128
    eval_rows: PositiveInt = 256
    batch_sizes: tuple[PositiveInt, ...] = (1, 2, 8, 32)
    learning_rates: tuple[LearningRate, ...] = (1e-3, 3e-3, 1e-2)
    batch_rows: PositiveInt = 2048
    batch_eval_rows: PositiveInt = 64
    batch_width: Width = 32
    target_losses: tuple[Positive, ...] = (3.0, 2.7)
    seed: Seed = 0
    quiet: bool = False


Cell = tuple[Path, pretrain.Options]
"""A run folder, and what is run there."""


def size_cells(options: Options) -> Iterator[Cell]:
    """Every width with every number of steps; the learning rate falls to its end in each."""
    for width in options.widths:
        for steps in options.steps:
            optimizer = OptimizerConfig(schedule="cosine", warmup_steps=steps // 8, end_lr_ratio=0.1)
            yield _cell(
                options,
                f"size/width_{width}_steps_{steps}",
                arch=option_groups.ArchOptions(width=width, layers=options.layers),
                steps=steps,
                eval_every=steps,
                eval_rows=options.eval_rows,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                optimizer=optimizer,
            )


def batch_cells(options: Options) -> Iterator[Cell]:
    """Every batch size with every learning rate, which stays as it is after a warm-up of the same rows."""
    for size in options.batch_sizes:
        steps = max(options.batch_rows // size, 1)
        for rate in options.learning_rates:
            yield _cell(
                options,
                f"batch/rows_{size}_rate_{rate:g}",
                arch=option_groups.ArchOptions(width=options.batch_width, layers=options.layers),
                steps=steps,
                eval_every=max(steps // 16, 1),
                eval_rows=options.batch_eval_rows,
                batch_size=size,
                learning_rate=rate,
                optimizer=OptimizerConfig(schedule="constant", warmup_steps=steps // 16),
            )


def _cell(options: Options, name: str, *, steps: int, eval_every: int, **more: object) -> Cell:
    folder = options.out / name
    run = option_groups.RunOptions(
        folder,
        seed=options.seed,
        resume=True,
        steps=steps,
        save_every=steps,
        eval_every=eval_every,
        quiet=options.quiet,
        report=False,
    )
    return folder, pretrain.Options(
        run=run,
        data=options.data,
        max_seq_length=options.max_seq_length,
        sample_tokens=0,
        **more,  # pyright: ignore[reportArgumentType]
    )


def train(cell: Cell) -> Path:
    """Runs a cell unless it is finished; its folder."""
    folder, options = cell
    evaluated = [line["step"] for line in read_metrics(folder) if "eval/loss" in line]
    if not evaluated or evaluated[-1] < options.run.num_steps:
        pretrain.run(options)
    return folder


def run(options: Options) -> None:
    """Trains all of them, and writes the page."""
    files.hold(options.out, "--out")
    sizes = [train(cell) for cell in size_cells(options)]
    batches = [train(cell) for cell in batch_cells(options)]
    page = options.page or options.out / "page.md"
    files.write_text(page, scaling_page.text(page, sizes, batches, options.target_losses))
    print(page)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
