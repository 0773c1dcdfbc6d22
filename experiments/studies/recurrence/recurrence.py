"""RNN, GRU and LSTM beside a transformer of as many parameters, trained on the same text.

    python experiments/studies/recurrence/recurrence.py --out runs/recurrence --data shakespeare/input.txt

Every run is one of `pretrain.py`; those that are finished are not run again. The folder gets `table.md` and
`curves.svg`: bits a byte on held-out text against tokens seen, mean and 95 % t interval over seeds.
With `--steps 1000 --batch-size 8 --max-seq-length 128 --width 64`, 6 min on a CPU core: 2.53 (RNN), 2.59
(GRU), 2.66 (LSTM), 2.67 (transformer) on Shakespeare.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer
from rlhf_jax.evaluation.statistics import mean_interval
from rlhf_jax.metrics import read_metrics
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.stages import option_checks, option_groups, pretrain

KINDS: tuple[option_groups.ModelKind, ...] = ("transformer", "lstm", "gru", "rnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared.

    Attributes:
      out: folder of all runs.
      data: plain text, as pretrain.py takes it.
      seeds: how many runs of each kind.
      steps: of each run.
      eval_every: steps between evaluations.
      batch_size: rows a step.
      max_seq_length: tokens a row.
      width: of the transformer; the others get the width with which they have as many parameters.
      layers: of all of them.
      learning_rates: that each kind is given, in the order transformer, lstm, gru, rnn.
      quiet: show no progress.
    """

    out: Path = Path("runs/recurrence")
    data: str = "arithmetic:1"
    seeds: int = 3
    steps: int = 200
    eval_every: int = 50
    batch_size: int = 16
    max_seq_length: int = 128
    width: int = 96
    layers: int = 2
    learning_rates: tuple[float, float, float, float] = (3e-3, 3e-3, 3e-3, 3e-3)
    quiet: bool = False


def size(arch: option_groups.ArchOptions, tokenizer: Tokenizer) -> int:
    """Parameters of a new model."""
    shapes = jax.eval_shape(lambda key: models.init_params(arch.config(tokenizer), key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def of_equal_size(
    kind: option_groups.ModelKind, like: option_groups.ArchOptions, tokenizer: Tokenizer
) -> option_groups.ArchOptions:
    """A recurrent model with as many layers and about as many parameters."""
    wanted = size(like, tokenizer)
    widths = range(8, 8 * like.width, 4)
    candidates = [dataclasses.replace(like, kind=kind, width=width) for width in widths]
    return min(candidates, key=lambda arch: abs(size(arch, tokenizer) - wanted))


def train(
    options: Options, arch: option_groups.ArchOptions, seed: int, learning_rate: float
) -> dict[str, Any]:
    """One run, unless it is finished; its evaluations."""
    out = options.out / f"{arch.kind}_{seed}"
    run = option_groups.RunOptions(
        out,
        seed=seed,
        resume=True,
        steps=options.steps,
        save_every=options.steps,
        eval_every=options.eval_every,
        quiet=options.quiet,
        report=False,
    )
    done = [line for line in read_metrics(out) if "eval/bits_per_byte" in line] if out.exists() else []
    if not done or done[-1]["step"] < options.steps:
        pretrain.run(
            pretrain.Options(
                run=run,
                arch=arch,
                optimizer=OptimizerConfig(
                    schedule="cosine", warmup_steps=options.steps // 10, end_lr_ratio=0.1
                ),
                data=options.data,
                max_seq_length=options.max_seq_length,
                batch_size=options.batch_size,
                learning_rate=learning_rate,
                eval_rows=128,
                sample_tokens=0,
            )
        )
        done = [line for line in read_metrics(out) if "eval/bits_per_byte" in line and line["step"]]
    lines = [line for line in read_metrics(out) if "time/update_seconds" in line]
    return {
        "steps": [line["step"] for line in done],
        "bits": [line["eval/bits_per_byte"] for line in done],
        "tokens": [line["step"] * options.batch_size * (options.max_seq_length - 1) for line in done],
        "rate": float(np.median([line["tokens"] / line["time/update_seconds"] for line in lines])),
    }


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bits a byte against tokens, one curve a kind."""
    with picture(path, 1, 1, height=3.0) as (axes,):
        lines = {}
        for kind, runs in found.items():
            intervals = [mean_interval(bits) for bits in zip(*(run["bits"] for run in runs), strict=True)]
            tokens = np.asarray(runs[0]["tokens"]) / 1000
            (line,) = axes.plot(tokens, [interval.mean for interval in intervals], "o-", markersize=3)
            low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            lines[kind] = line
        axes.set(xlabel="thousand tokens seen", ylabel="bits a byte, held-out text")
        name_ends(axes, lines)


def run(options: Options) -> None:
    """Trains all of them, and writes the table and the picture."""
    files.hold(options.out, "--out")
    tokenizer = byte_tokenizer()
    transformer = option_groups.ArchOptions(width=options.width, layers=options.layers)
    found: dict[str, list[dict[str, Any]]] = {}
    lines = [
        "| model | width | parameters | bits a byte | trained tokens a second |",
        "|---|---|---|---|---|",
    ]
    for kind, learning_rate in zip(KINDS, options.learning_rates, strict=True):
        arch = transformer if kind == "transformer" else of_equal_size(kind, transformer, tokenizer)
        found[kind] = [train(options, arch, seed, learning_rate) for seed in range(options.seeds)]
        last = mean_interval([found_run["bits"][-1] for found_run in found[kind]])
        rate = float(np.median([found_run["rate"] for found_run in found[kind]]))
        count = size(arch, tokenizer)
        lines.append(f"| {kind} | {arch.width} | {count:,} | {last:.3f} | {rate:,.0f} |")
    table = "\n".join(lines) + "\n"
    files.write_text(options.out / "table.md", table)
    files.write_json(
        options.out / "results.json", {"config": option_checks.to_json(options), "runs": cast(Any, found)}
    )
    draw(found, options.out / "curves.svg")
    print(table)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
