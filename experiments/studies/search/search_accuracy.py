"""Accuracy against the number of samples, in one figure: chains of thought, direct answers, published models.

    rlhf search --out runs/search --model runs/sft --data arithmetic:1 \\
        --process-reward runs/prm --outcome-reward runs/orm
    python experiments/studies/search/search_accuracy.py --out runs/search_accuracy --search runs/search \\
        --solutions gsm8k/model_solutions.jsonl

The first panel shows the samples of `search.py` on the embedded task, and beside them those of a policy that
learnt the answers of the same demonstrators without their steps; it is trained here, in a minute, unless the
folder has it. The second votes among the solutions that others have published, a model each. The run folder
gets `search_accuracy.svg` and `results.json`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import read_rows
from rlhf_jax.evaluation import pass_at_k
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.rewards.verifiers import final_number, gsm8k_answer
from rlhf_jax.stages import embedded, option_checks, option_groups, search as search_script, sft
from rlhf_jax.stages.search_methods import Judges
from rlhf_jax.tasks.arithmetic import demonstration_rows
from rlhf_jax.training.run_folder import load_policy

Curves = dict[str, list[float]]
"""Accuracy for n = 1 ... N, by what it is of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the figure shows.

    Attributes:
      out: the run folder.
      search: run folder of `search.py` on the embedded task; empty to leave its panel out.
      solutions: rows with `ground_truth` and objects of `solution`, a model each; empty for no such panel.
      steps: that the policy of direct answers is trained for.
      resamples: orders of the published solutions that the votes' accuracy is a mean of.
      seed: decides the orders, and the policy of direct answers.
      quiet: show no progress.
    """

    out: Path = Path("runs/search_accuracy")
    search: str = ""
    solutions: str = ""
    steps: int = 500
    resamples: int = 100
    seed: int = 0
    quiet: bool = False


# The embedded task ---------------------------------------------------------------------------------


def read_search(folder: Path) -> tuple[search_script.Options, Curves]:
    """What `search.py` was run with, and the accuracy of its samples.

    Raises:
      UserError: the folder holds no finished comparison on the embedded task.
    """
    remedy = f"--search {folder} holds no finished run of search.py: run it first"
    results = files.read_json(folder / "results.json", keys=("config", "accuracy_against_n"), remedy=remedy)
    curves = results["accuracy_against_n"]
    names = {field.name for field in dataclasses.fields(search_script.Options)} - {"search"}
    held = {name: value for name, value in results["config"].items() if name in names}
    options = search_script.Options(**{**held, "out": folder})
    if not embedded.find_level(options.data):
        raise UserError(
            f"--search {folder}: it is of {options.data}, and direct answers are of the embedded task"
        )
    return options, curves


def train_direct(options: Options, searched: search_script.Options) -> Path:
    """The folder of a policy that learnt the demonstrators' answers without their steps."""
    folder, rows_path = options.out / "direct", options.out / "direct.jsonl"
    level, theirs = embedded.find_level(searched.data), sft.Options(data=searched.data)
    assert level is not None
    config = files.read_json(Path(searched.model) / "config.json", keys=("config",))["config"]
    rates = {name: config.get(name, getattr(theirs, name)) for name in ("slip_rate", "late_slip_rate")}
    rows = demonstration_rows(level, theirs.demonstrations, options.seed, **rates)
    for row in rows:
        row["messages"][1]["content"] = row["messages"][1]["content"].split("\n")[-1]
    files.write_lines(rows_path, rows)
    run = option_groups.RunOptions(
        folder, seed=options.seed, resume=True, steps=options.steps, quiet=options.quiet, report=False
    )
    tokenizer = str(Path(searched.model) / "tokenizer")
    sft.run(sft.Options(run=run, data=str(rows_path), tokenizer=tokenizer, **embedded.FROM_SCRATCH))
    return folder


def direct_curves(options: Options, searched: search_script.Options) -> tuple[Curves, float]:
    """Accuracy of direct answers to the problems that were searched, and the tokens of one."""
    policy, judges = load_policy(train_direct(options, searched)), Judges(None, None)
    problems = search_script.load_problems(searched, policy)
    chosen = dataclasses.replace(searched, quiet=options.quiet)
    pool, _, _ = search_script.sample_pool(chosen, policy, judges, problems)
    curves = search_script.accuracy_curves(chosen, pool, judges)
    named = {label: curves[name] for label, name in search_script.CURVES.items() if name in curves}
    return {label: curve.mean(axis=0).tolist() for label, curve in named.items()}, float(pool.tokens.mean())


# Published solutions -------------------------------------------------------------------------------


def read_published(path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(ids of the answers, -1 where there is none; whether they are right; writers): [questions, writers].

    Raises:
      UserError: a row without a reference, or without the solutions of the others.
    """
    answers, correct, writers = [], [], []
    for row in read_rows(path):
        reference, values = row.fields.get("ground_truth"), row.fields.items()
        found = {name: x["solution"] for name, x in values if isinstance(x, dict) and "solution" in x}
        writers = writers or list(found)
        if not isinstance(reference, str) or list(found) != writers or not found:
            raise UserError(f"{row.where}: gives no `ground_truth`, or not a solution of each of {writers}")
        known: dict[Any, int] = {None: -1}
        answers.append([known.setdefault(final_number(text), len(known)) for text in found.values()])
        correct.append([gsm8k_answer(text, reference) for text in found.values()])
    if len(correct) < 2:
        raise UserError(f"{path}: has {len(correct)} questions: give at least two")
    return np.array(answers), np.array(correct), writers


def published_curves(options: Options) -> tuple[Curves, dict[str, float]]:
    """Accuracy of n published solutions, drawn without replacement; and of each writer alone.

    A writer's weight is the share of the other questions that it answers right.
    """
    answers, correct, writers = read_published(options.solutions)
    others = jnp.asarray((correct.sum(axis=0) - correct) / (len(correct) - 1), jnp.float32)

    def vote(weights: jax.Array | None) -> jax.Array:
        return pass_at_k.vote_accuracy(
            jnp.asarray(answers),
            jnp.asarray(correct),
            jax.random.key(options.seed),
            weights=weights,
            mask=jnp.asarray(answers >= 0),
            resamples=options.resamples,
        )

    curves = {
        "pass@k (some sample is right)": pass_at_k.pass_at_k(jnp.asarray(correct)),
        "majority vote": vote(None),
        "vote weighted by the writer's accuracy": vote(others),
        "the best writer's": pass_at_k.best_of_n_accuracy(others, jnp.asarray(correct)),
    }
    means = {name: np.asarray(curve).mean(axis=0).tolist() for name, curve in curves.items()}
    return means, dict(zip(writers, correct.mean(axis=0).tolist(), strict=True))


# What comes out ------------------------------------------------------------------------------------


def plot(path: Path, panels: dict[str, dict[str, Curves]]) -> None:
    """A panel each: title -> {"" or what the dashed lines are of -> curves}."""
    every = [name for panel in panels.values() for curves in panel.values() for name in curves]
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(every))}
    with picture(path, len(panels), 1, height=3.4) as grid:
        for axes, (title, panel) in zip(grid, panels.items(), strict=True):
            lines = {}
            for kind, curves in panel.items():
                for name, curve in curves.items():
                    style = {"linestyle": "--" if kind else "-", "marker": "." if len(curve) < 8 else ""}
                    (line,) = axes.plot(range(1, len(curve) + 1), curve, color=colours[name], **style)
                    lines[f"{name}, {kind}" if kind else name] = line
            axes.set(xlabel="samples, n", ylabel="accuracy", ylim=(0, 1.02), title=title)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            name_ends(axes, lines)


def run(options: Options) -> None:
    """Trains what is missing, counts, and draws."""
    if not (options.search or options.solutions):
        raise UserError("there is nothing to show: give --search, --solutions or both")
    panels: dict[str, dict[str, Curves]] = {}
    results: dict[str, Any] = {"config": option_checks.to_json(options)}
    if options.search:
        searched, chains = read_search(Path(options.search))
        direct, tokens = direct_curves(options, searched)
        title = f"{searched.data}, {searched.prompts} held-out problems"
        panels[title] = {"": chains, "direct answers": direct}
        results |= {"chains_of_thought": chains, "direct_answers": direct, "tokens_a_direct_answer": tokens}
    if options.solutions:
        published, writers = published_curves(options)
        panels["GSM8K, published solutions of several models"] = {"": published}
        results |= {"published": published, "published_writers": writers}
    files.hold(options.out, "--out")
    files.write_json(options.out / "results.json", results)
    plot(options.out / "search_accuracy.svg", panels)
    if not options.quiet:
        print(f"Figure: {options.out / 'search_accuracy.svg'}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
