"""Held-out score against sparsity, for magnitude and Wanda, before and after fine-tuning what is left.

    for seed in 0 1 2; do
        rlhf sft --out runs/sft_$seed --seed $seed --data arithmetic:1 --learning-rate 3e-3 \\
            --slip-rate 0 --late-slip-rate 0 --steps 500
    done
    python experiments/studies/pruning/pruning.py --out runs/pruning --models runs/sft_0 runs/sft_1 runs/sft_2

Each of `--models` is a seed. Cells that are done are not done again. Leaves `cells.jsonl`, the table
`pruning.md`, and the picture `pruning.svg`. About six minutes of one core.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import sft as supervised
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.evaluation.statistics import Interval, mean_interval
from rlhf_jax.metrics import Progress
from rlhf_jax.metrics.pages import made, when_and_with
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.models import Policy, pruning
from rlhf_jax.stages import embedded, inputs, option_checks, option_groups, prune, sft, starting
from rlhf_jax.training.run_folder import describe_run, load_policy

Cell = tuple[prune.Method, float, str]
"""Method, sparsity, run folder of the policy."""

Cells = dict[Cell, dict[str, Any]]
"""What was found in each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The grid.

    Attributes:
      out: folder of the study.
      models: run folders of policies on the embedded task that differ in their seed alone.
      methods: how weights are scored.
      sparsities: shares of weights that go; 0 shows what more training does by itself.
      granularity: which weights compete.
      data: level of the embedded task.
      steps: of fine-tuning; 0 for none.
      batch_size: rows a step.
      learning_rate: at its peak.
      demonstrations: how many conversations are learnt from.
      rows: conversations on which inputs are measured.
      eval_count: held-out problems.
      seed: of data and order.
      quiet: show no progress.
    """

    out: Path
    models: tuple[str, ...]
    methods: tuple[prune.Method, ...] = ("magnitude", "wanda")
    sparsities: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
    granularity: pruning.Granularity = "output"
    data: str = "arithmetic:1"
    steps: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    demonstrations: int = 8_000
    rows: int = 128
    eval_count: int = 256
    seed: int = 100
    quiet: bool = False


WATCHING = ("out", "models", "methods", "sparsities", "quiet")
"""Options that change nothing of a cell."""


def make_tune_fn(options: Options, model: Policy) -> Callable[[Params], Params]:
    """`tune(params)`: supervised fine-tuning in which zeros stay zeros; compiled once."""
    run = option_groups.RunOptions(options.out, seed=options.seed)
    source = sft.Options(
        run=run, data=options.data, demonstrations=options.demonstrations, slip_rate=0, late_slip_rate=0
    )
    rows = sft.lay_out(
        source, sft.make_examples(source, sft.load_rows(source, held_out=False), model.tokenizer)
    )
    sampler = BatchSampler(len(rows.tokens), options.batch_size, options.seed)
    schedule = OptimizerConfig(schedule="cosine", warmup_steps=min(5, options.steps - 1), end_lr_ratio=0.02)
    tx = pruning.preserve_sparsity(make_optimizer(with_total_steps(schedule, options.steps)))
    logprob_fn = model.make_logprob_fn()
    update = jax.jit(supervised.make_update(supervised.Config(), logprob_fn, tx), donate_argnums=0)
    hyper = supervised.Hyper(learning_rate=jnp.float32(options.learning_rate))

    def batch(step: int) -> Sequences:
        return jax.tree.map(lambda x: x[sampler.indices(step)], rows)

    def tune(params: Params) -> Params:
        state = supervised.init(starting.copied(params), tx, jax.random.key(options.seed))
        for step in range(options.steps):
            state, _ = update(state, hyper, batch(step))
        return state.learner.params

    return tune


def make_exact_match(options: Options, model: Policy) -> Callable[[Params], float]:
    """`score(params)`: share of held-out problems whose most likely answer is right."""
    prompts = option_groups.PromptOptions(
        data=options.data,
        rewards=("rlhf_jax.rewards.verifiers:exact_answer_reward",),
        prompt_count=options.batch_size,
        eval_count=options.eval_count,
        samples=1,
    )
    evaluate = inputs.load_prompts(prompts, model, options.seed).evaluate
    assert evaluate is not None
    return lambda params: evaluate(params, None).score


def grid(options: Options) -> list[Cell]:
    """Cells, all seeds of one setting in a row; without sparsity the method makes no difference."""
    settings: list[tuple[prune.Method, float]] = [
        (method, sparsity)
        for sparsity in options.sparsities
        for method in (options.methods if sparsity else options.methods[:1])
    ]
    return [(method, sparsity, name) for method, sparsity in settings for name in options.models]


def read_cells(path: Path) -> Cells:
    """Cells that are done."""
    cells = files.read_lines(path, keys=("method", "sparsity", "model", "before"))
    return {(c["method"], c["sparsity"], c["model"]): c for c in cells}


# Table and picture ------------------------------------------------------------------------------------


def columns(options: Options, done: Cells) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Scores over seeds by sparsity, of each method before and after fine-tuning."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for method in options.methods:
        for when in ("before", "after") if options.steps else ("before",):
            rows = found[method, when] = {}
            for sparsity in sorted(options.sparsities):
                of = method if sparsity else options.methods[0]
                cells = [done.get((of, sparsity, name)) for name in options.models]
                scores = [cell[when] for cell in cells if cell is not None]
                if scores:
                    rows[sparsity] = scores
    return found


def table(options: Options, done: Cells) -> str:
    """Means with 95 % t intervals, in percent, and each seed."""
    found = columns(options, done)
    names = [f"{method}, {when}" for method, when in found]
    lines = ["| sparsity | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for sparsity in sorted(options.sparsities):
        cells = [_cell(scores.get(sparsity)) for scores in found.values()]
        lines.append(f"| {100 * sparsity:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(scores: Sequence[float] | None) -> str:
    if not scores:
        return "-"
    percent = 100 * np.asarray(scores)
    mean, low, high = (getattr(mean_interval(percent), name) for name in ("mean", "low", "high"))
    interval = f" [{max(low, 0):.0f}, {min(high, 100):.0f}]" if len(scores) > 1 else ""
    return f"{mean:.1f}{interval}"


def draw(path: Path, found: Mapping[str, Mapping[str, Mapping[float, Interval]]]) -> None:
    """Score against sparsity: a panel before and after fine-tuning, a line a method, its interval over seeds.

    Args:
      found: percent by panel, method and sparsity.
    """
    with picture(path, 1, len(found), height=2.6, sharey=True) as panels:
        for axes, (when, methods) in zip(panels, found.items(), strict=True):
            lines = {}
            for method, rows in methods.items():
                x, intervals = 100 * np.asarray(list(rows)), list(rows.values())
                (lines[method],) = axes.plot(x, [i.mean for i in intervals], marker=".")
                low, high = [max(i.low, 0) for i in intervals], [min(i.high, 100) for i in intervals]
                band = {"color": lines[method].get_color(), "alpha": 0.12, "linewidth": 0}
                axes.fill_between(x, low, high, **band)
            axes.set(title=when, xlabel="weights of linear layers pruned, %", ylim=(-2, 102))
            name_ends(axes, lines)
        panels[0].set_ylabel("held-out exact match, %")


def check(options: Options) -> None:
    """Raises: UserError where the options make no sense, or the folder holds cells of others."""
    if not options.models or options.steps < 0 or options.batch_size < 1:
        raise UserError("give at least one of --models, 0 or more --steps and a --batch-size of at least 1")
    if embedded.find_level(options.data) is None:
        raise UserError(
            f"--data {options.data}: the study knows the embedded task alone: give arithmetic:LEVEL"
        )
    if not files.exists(options.out / "cells.jsonl"):
        return
    again = f"remove {options.out}, or choose another --out"
    held = files.read_json(options.out / "config.json", keys=("config",), remedy=again)["config"]
    ours = option_checks.to_json(options)
    changed = [name for name in ours if name not in WATCHING and ours[name] != held.get(name)]
    if changed:
        raise UserError(f"{options.out} holds cells with other {', '.join(changed)}: choose another --out")


def make_cell_fn(options: Options, policies: dict[str, Policy]) -> Callable[[Cell], dict[str, Any]]:
    """`compute(cell)`: prunes, scores, fine-tunes, scores again."""
    first = policies[options.models[0]]
    score = make_exact_match(options, first)
    tune = make_tune_fn(options, first) if options.steps else None
    sums: dict[str, Params] = {}
    if "wanda" in options.methods:
        rows = prune.calibration_rows(options.data, options.rows, options.seed, first)
        sums = {name: prune.measure(model, rows) for name, model in policies.items()}

    def compute(cell: Cell) -> dict[str, Any]:
        method, sparsity, name = cell
        params = policies[name].params
        choice = prune.PruneOptions(method=method, sparsity=sparsity, granularity=options.granularity)
        masks = choice.masks(params, sums[name] if method == "wanda" else None)
        params = pruning.apply_masks(params, masks)
        found = {"method": method, "sparsity": sparsity, "model": name, "before": score(params)}
        if tune is not None:
            params = tune(params)
            found |= {"after": score(params)}
        return {**found, "zeros": pruning.kernel_sparsity(params)[""]}

    return compute


def run(options: Options) -> None:
    """Does what is missing of the grid, then writes table and picture."""
    check(options)
    policies = {name: load_policy(Path(name)) for name in options.models}
    first = policies[options.models[0]]
    for name, model in policies.items():
        models.check_same_architecture(first.architecture, model.architecture, f"--models {name}")
    describe_run(options.out, option_checks.to_json(options), stage="prune_study")
    path, cells = options.out / "cells.jsonl", grid(options)
    done, compute = read_cells(path), make_cell_fn(options, policies)
    with Progress("pruning", len(cells), quiet=options.quiet) as progress:
        for number, cell in enumerate(cells):
            if cell not in done:
                done[cell] = compute(cell)
                files.append_lines(path, [done[cell]])
            shown = {name: value for name, value in done[cell].items() if isinstance(value, float)}
            progress.update(number + 1, shown)
    note = made(options.out)
    text = f"{table(options, done)}\n`{note['command']}`, {when_and_with([note])}\n"
    files.write_text(options.out / "pruning.md", text)
    found: dict[str, dict[str, dict[float, Interval]]] = {}
    for (method, when), scores in columns(options, done).items():
        intervals = {sparsity: mean_interval(100 * np.asarray(row)) for sparsity, row in scores.items()}
        found.setdefault("pruned" if when == "before" else "fine-tuned", {})[method] = intervals
    draw(options.out / "pruning.svg", found)
    if not options.quiet:
        print(table(options, done))


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
