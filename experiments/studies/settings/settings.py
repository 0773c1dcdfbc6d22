"""Small studies of one setting each: what it does to score, KL and length, over seeds, one picture a study.

    python experiments/studies/settings/settings.py --out runs/studies
    python experiments/studies/settings/settings.py --out runs/studies --studies dpo_beta 'grpo_*'

All start from the same policies on the style task, sample 64 answers a step and take as many steps. Settings
that are numbers of a `Hyper` are swept in one program; others take a program each. What is done is not done
again.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.algorithms import grpo, grpo_variants, ppo, preference
from rlhf_jax.algorithms.grpo_variants import VariantFn, make_variant
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.evaluation.statistics import (
    Interval,
    mean_interval,
    probability_of_improvement,
    stratified_bootstrap_interval,
)
from rlhf_jax.jitted import algorithms
from rlhf_jax.jitted.train import Algorithm, SeedState, TaskSetup, make_train
from rlhf_jax.losses.reductions import constant_length, sequence_mean, token_mean
from rlhf_jax.metrics.pages import PLAN, SUMMARY, commands, held_summary, kept_remarks, made, when_and_with
from rlhf_jax.metrics.pictures import picture
from rlhf_jax.stages import option_checks
from rlhf_jax.sweep import sweep, zipped
from rlhf_jax.training.run_folder import describe_run

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))
import post_training
import post_training_rows

METRICS = {"sampled_score": "score, share of the best", "kl": "KL to the start, nats", "length": "tokens"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the studies.

    Attributes:
      out: folder of what is done.
      page: where the page goes, with its pictures beside it; None for the folder of what is done.
      studies: patterns of names, such as 'grpo_*'; none for all.
      seeds: of each setting.
      steps: of 64 answers each.
      base_steps: supervised steps before.
      width: of the policy, two layers.
      chunk: runs at once, in one program.
      quiet: show no progress.
    """

    out: Path | None = None
    page: Path | None = None
    studies: tuple[str, ...] = ()
    seeds: int = 4
    steps: int = 50
    base_steps: int = 400
    width: int = 32
    chunk: int = 4
    quiet: bool = False


MethodFn = Callable[[TaskSetup, OptimizerConfig], Algorithm]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One program: a method, and what of its hyperparameters is swept.

    Attributes:
      label: of the setting, where nothing is swept.
      swept: values of each field, going together; their number is that of settings.
    """

    make: MethodFn
    hyper: Any
    label: str = ""
    swept: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def labels(self) -> list[str]:
        """A name for each setting."""
        if not self.swept:
            return [self.label]
        return [f"{value:g}" for value in next(iter(self.swept.values()))]


@dataclasses.dataclass(frozen=True)
class Study:
    """A picture.

    Attributes:
      setting: what is on its axis.
      usual: label of the setting that the others are compared with.
    """

    name: str
    setting: str
    usual: str
    variants: tuple[Variant, ...]


# Studies -----------------------------------------------------------------------------------------------


def _dpo(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
    return algorithms.preference_algorithm(task_setup, preference.Config(), optimizer, source="reference")


def _ppo(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
    return algorithms.ppo_algorithm(task_setup, ppo.Config(num_ppo_epochs=1, num_minibatches=1), optimizer)


def _grpo(
    task_setup: TaskSetup,
    optimizer: OptimizerConfig,
    *,
    group_size: int = 4,
    variant: VariantFn = grpo_variants.grpo,
    **static: Any,
) -> Algorithm:
    """GRPO with other static choices, at as many answers a step."""
    epochs = static.get("num_iterations", 1)
    optimizer = dataclasses.replace(optimizer, total_steps=optimizer.total_steps * epochs)
    rows = task_setup.num_prompts * task_setup.num_samples
    task_setup = dataclasses.replace(task_setup, num_prompts=rows // group_size, num_samples=group_size)
    made = make_variant(variant, group_size=group_size, max_completion_length=_LENGTH, **static)
    return algorithms.grpo_algorithm(task_setup, made, optimizer)


_RATE = 3e-3
_FREE = grpo.Hyper(learning_rate=_RATE, kl_coef=0.0)
_LENGTH = 16


def _static(label: str, **options: Any) -> Variant:
    return Variant(functools.partial(_grpo, **options), _FREE, label)


def _bounds(*clips: float) -> dict[str, tuple[float, ...]]:
    return {"epsilon_low": clips, "epsilon_high": clips}


STUDIES = (
    Study(
        "dpo_beta",
        "beta of DPO",
        "0.3",
        (Variant(_dpo, preference.Hyper(_RATE), swept={"beta": (0.03, 0.1, 0.3, 1.0, 3.0)}),),
    ),
    Study(
        "ppo_kl_coef",
        "KL coefficient of PPO",
        "0.1",
        (Variant(_ppo, ppo.Hyper(_RATE), swept={"kl_coef": (0.0, 0.03, 0.1, 0.3, 1.0)}),),
    ),
    Study(
        "grpo_group_size",
        "answers to each prompt, of 64 in all",
        "4",
        tuple(_static(str(size), group_size=size) for size in (2, 4, 8, 16)),
    ),
    Study(
        "grpo_clip",
        "clip range, four epochs",
        "0.2",
        (
            Variant(
                functools.partial(_grpo, num_iterations=4), _FREE, swept=_bounds(0.02, 0.1, 0.2, 0.5, 1e3)
            ),
        ),
    ),
    Study(
        "grpo_epochs",
        "epochs over each batch",
        "1",
        tuple(_static(str(epochs), num_iterations=epochs) for epochs in (1, 2, 4)),
    ),
    Study(
        "grpo_normalisation",
        "what the sum over tokens is divided by",
        "sequence",
        (
            _static("sequence", reduce=sequence_mean),
            _static("token", reduce=token_mean),
            _static("constant", reduce=constant_length(_LENGTH)),
            _static("Dr. GRPO", variant=grpo_variants.dr_grpo),
        ),
    ),
)


# Runs --------------------------------------------------------------------------------------------------


def make_starts(options: Options, out: Path) -> tuple[TaskSetup, SeedState]:
    """The style task of the table, and each seed's policy."""
    row = next(row for row in post_training_rows.TASKS if row.name == "style")
    same = post_training.Options(out=out / "base", width=options.width, base_steps=options.base_steps)
    task_setup = post_training.make_task_setup(row, same)
    return task_setup, post_training.make_starts(row, task_setup, same, np.arange(options.seeds))


def run_study(study: Study, options: Options, task_setup: TaskSetup, starts: SeedState, folder: Path) -> None:
    """Every setting with every seed; leaves `summary.json`."""
    planned = {"study": study.name, "seeds": options.seeds, "steps": options.steps, "width": options.width}
    planned |= {"base_steps": options.base_steps, "settings": [x for v in study.variants for x in v.labels()]}
    if held_summary(folder, planned) is not None:
        return
    files.write_json(folder / PLAN, planned)
    describe_run(folder, option_checks.to_json(options), stage="studies", cell=study.name)
    found: dict[str, list[Any]] = {name: [] for name in METRICS}
    for number, variant in enumerate(study.variants):
        method = variant.make(task_setup, post_training.schedule(options.steps))
        results = sweep(
            make_train(task_setup, method, steps=options.steps),
            starts,
            zipped(post_training.as_floats(variant.hyper), **variant.swept),
            chunk_size=options.chunk,
            folder=folder / str(number),
            quiet=options.quiet,
        )
        for name, rows in found.items():
            rows.extend(results.scores(name).tolist())
        jax.clear_caches()
    hypers = [f"{variant.hyper}" for variant in study.variants[:1]]
    files.write_json(folder / SUMMARY, {**planned, **found, **made(folder), "hyper": hypers})


# Page --------------------------------------------------------------------------------------------------

HEAD = """# Studies of one setting each

Written by `experiments/studies/settings/settings.py`. Style task, decoder of two layers; every run starts
from the supervised policy of its seed. Score of sampled answers to held-out prompts as a share of the best
there is, KL to the start in nats an answer, length in tokens: mean and 95 % t interval over seeds. The last
column is the probability that a run scores higher than one of the usual setting, with its bootstrap
interval. The learning rate is {rate:g} throughout, which the search of
`experiments/studies/post_training/post_training.py` chose for DPO and PPO on this task (for
GRPO 0.01); it is not searched for each setting, so a setting that wants another rate is at a disadvantage."""


def page_text(done: Mapping[str, Mapping[str, Any]], remarks: str) -> str:
    """The page; `remarks` say in words what it shows."""
    parts = [HEAD.format(rate=_RATE), remarks]
    for study in STUDIES:
        if study.name in done:
            parts += [f"## {study.setting[0].upper()}{study.setting[1:]}", _table(study, done[study.name])]
            parts.append(f"![{study.setting}](study_{study.name}.svg)")
    first = next(iter(done.values()))
    how = (
        f"{when_and_with(done.values())}; {first['seeds']} seeds, {first['steps']} steps of 64 answers, "
        f"{first['base_steps']} supervised steps before, width {first['width']}."
    )
    return "\n\n".join([*parts, "## Made", how, commands(done.values())]) + "\n"


def _table(study: Study, summary: Mapping[str, Any]) -> str:
    usual = summary["settings"].index(study.usual)
    score = np.asarray(summary["sampled_score"])
    lines = [
        f"| {study.setting} | score, % | KL | length | better than {study.usual} |",
        "|---|---|---|---|---|",
    ]
    for number, label in enumerate(summary["settings"]):
        cells = [f"{mean_interval(100 * score[number]):.1f}"]
        cells += [f"{mean_interval(summary[name][number]):.2f}" for name in ("kl", "length")]
        sides = score[number][:, None], score[usual][:, None]
        wins = stratified_bootstrap_interval(*sides, statistic_fn=probability_of_improvement)
        lines.append(f"| {label} | {' | '.join(cells)} | {'-' if number == usual else f'{wins:.2f}'} |")
    return "\n".join(lines)


def draw(path: Path, setting: str, labels: Sequence[str], found: Mapping[str, Sequence[Interval]]) -> None:
    """Score, KL and length against the setting: mean and interval over seeds.

    Args:
      found: by metric, an interval for each of the labels.
    """
    places = np.arange(len(labels))
    with picture(path, 1, len(METRICS), height=2.0) as panels:
        for axes, (name, title) in zip(panels, METRICS.items(), strict=True):
            middle = [i.mean for i in found[name]]
            errors = [[i.mean - i.low for i in found[name]], [i.high - i.mean for i in found[name]]]
            axes.errorbar(places, middle, errors, marker="o", markersize=4, linewidth=1.2, capsize=2)
            axes.set_xticks(places, labels)
            axes.set(title=title, xlabel=setting, xlim=(-0.4, len(labels) - 0.6))


def write_page(page: Path, out: Path) -> None:
    """The page of all studies that are done, and their pictures beside it.

    Raises:
      UserError: the disk is full or read-only.
    """
    paths = {study.name: out / study.name / SUMMARY for study in STUDIES}
    done = {name: files.read_json(p) for name, p in paths.items() if files.exists(p)}
    files.write_text(page, page_text(done, kept_remarks(page)))
    for study in STUDIES:
        if study.name in done:
            summary = done[study.name]
            found = {name: [mean_interval(row) for row in np.asarray(summary[name])] for name in METRICS}
            draw(page.with_name(f"study_{study.name}.svg"), study.setting, summary["settings"], found)


def run(options: Options) -> None:
    """The studies asked for, then the page of all that are done."""
    if options.out is None:
        raise UserError("--out is missing: name the folder of the studies")
    for name in ("seeds", "steps", "base_steps", "width", "chunk"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    studies = post_training.chosen("studies", options.studies, STUDIES)
    files.hold(options.out, "--out")
    task_setup, starts = make_starts(options, options.out)
    page = options.page or options.out / "STUDIES.md"
    for number, study in enumerate(studies, 1):
        if not options.quiet:
            print(f"[{number}/{len(studies)}] {study.name}", flush=True)
        run_study(study, options, task_setup, starts, options.out / study.name)
        write_page(page, options.out)
    print(f"Page: {page}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
