"""A named model, post-trained: SmolLM2-135M-Instruct on eight kinds of tasks with verifiers, on two cores.

    bash tools/run.sh smollm2
    python experiments/pipelines/smollm2.py --out runs/smollm2
    python experiments/pipelines/smollm2.py --out runs/long --methods all --seeds 3 --abilities
    python experiments/pipelines/smollm2.py --out runs/trial --steps 5 --eval-prompts 25

A short SFT on demonstrations teaches the form of the answers; from that policy starts every method, with as
many sampled answers: DPO, GRPO and PPO by default, with `--methods all` all of `smollm2_methods.py`. Every
policy, the published one too, is asked the same held-out prompts, greedily; with `--abilities` it is also
looked at what training cost (`smollm2_abilities.py`). The run folder holds one for each stage of each
seed, `summary.json`, `report.html`, and the best policy as `best.gguf` for llama.cpp and Ollama. A run that
was stopped goes on with `--resume`, and takes more methods and seeds into the same folder. `--steps` makes
all stages that short.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_stages
import smollm2_abilities
import smollm2_methods
import smollm2_tasks as tasks
from smollm2_methods import METHODS, PROMPTS_OF_PAIRS, REWARD

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.metrics import TableRow, final_table, format_seconds, write_report
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import Evaluation, make_evaluate_fn
from rlhf_jax.stages import option_checks, option_groups
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run

MODEL = "smollm2-135m-instruct"
SAMPLES = 10
EVAL_BATCH = 50
COUNTS = (
    "sft_steps",
    "dpo_steps",
    "rollouts",
    "demonstrations",
    "prompt_count",
    "eval_prompts",
    "max_new_tokens",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of post-training the named model.

    Attributes:
      out: the run folder.
      methods: of `smollm2_methods.METHODS`, or all.
      seeds: how many; each decides the data, order and sampling.
      first_seed: the first seed; the others follow it.
      resume: go on with the run in the folder where it stopped.
      model: the policy to start from: a name, a run folder, a Hugging Face folder or a GGUF file.
      abilities: measure as well what training cost.
      steps: of every stage, instead of what follows; None for that.
      sft_steps: optimizer steps of supervised fine-tuning, 4 rows of 256 tokens each.
      dpo_steps: optimizer steps on pairs, 8 each: of DPO, and of a reward model.
      rollouts: of every method that samples, 32 answers each.
      demonstrations: rows of supervised fine-tuning.
      prompt_count: prompts that are answered in training.
      eval_prompts: held-out prompts on which every policy is measured, of eight kinds in turn.
      max_new_tokens: of an answer.
      quiet: show no progress.
    """

    out: Path = Path("runs/smollm2")
    methods: tuple[str, ...] = ("dpo", "grpo", "ppo")
    seeds: int = 1
    first_seed: int = 0
    resume: bool = False
    model: str = MODEL
    abilities: bool = False
    steps: int | None = None
    sft_steps: int = 60
    dpo_steps: int = 20
    rollouts: int = 20
    demonstrations: int = 1_000
    prompt_count: int = 1_000
    eval_prompts: int = 200
    max_new_tokens: int = 40
    quiet: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the policies that are trained, in order."""
        wanted = METHODS if "all" in self.methods else self.methods
        return ("sft", *(name for name in smollm2_methods.stages_of(tuple(wanted)) if name in METHODS))

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that are measured."""
        return ("published", *self.trained)


# Data and stages -----------------------------------------------------------------------------------


def write_data(options: Options, seed: int) -> dict[str, Path]:
    """Files of demonstrations, prompts, prompts of pairs, and held-out rows."""
    held_out = tasks.held_out_rows(options.eval_prompts, seed)
    prompts = tasks.training_rows(options.prompt_count, seed, held_out)
    rows = {
        "demonstrations": tasks.training_rows(options.demonstrations, seed + 1, held_out),
        "prompts": prompts,
        "pair_prompts": prompts[: PROMPTS_OF_PAIRS * (options.steps or options.rollouts)],
        "held_out": held_out,
    }
    paths = {name: options.out / f"seed_{seed}" / "data" / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        fields = ("prompt", "completion") if name == "demonstrations" else tasks.PROBLEM
        files.write_lines(path, [{field: row[field] for field in fields} for row in rows[name]])
    return paths


def stage_runs(
    options: Options, seed: int, folder: Path, data: Mapping[str, Path]
) -> dict[str, Callable[[], Any]]:
    """The stages in order; each reads the folders of those before it."""

    def run_options(name: str, steps: int) -> option_groups.RunOptions:
        made = pipeline_stages.run_options(options, folder / name, seed, options.steps or steps)
        return dataclasses.replace(made, eval_every=0, save_every=10)

    start = smollm2_methods.Start(
        folder=folder,
        data=data,
        rollouts=options.steps or options.rollouts,
        dpo_steps=options.dpo_steps,
        max_new_tokens=options.max_new_tokens,
        run_options=run_options,
    )
    stages: dict[str, Callable[[], Any]] = {
        "published": lambda: None,
        "sft": lambda: smollm2_methods.train_sft(start, options.model, options.sft_steps),
    }
    every = {**smollm2_methods.AHEAD, **METHODS}
    for name in smollm2_methods.stages_of(options.trained[1:]):
        stages[name] = functools.partial(every[name].train, start, name)
    return stages


# Running and measuring -----------------------------------------------------------------------------


def place_of(options: Options, seed: int, name: str) -> str:
    """Where a policy is."""
    if name == "published":
        return options.model
    return str(smollm2_methods.policy_folder(options.out / f"seed_{seed}", name))


def held_out_evaluation(
    options: Options, policy: Policy, data: Mapping[str, Path]
) -> Callable[..., Evaluation]:
    """The same held-out prompts for every policy of a seed, compiled once."""
    rows = files.read_lines(data["held_out"])
    return make_evaluate_fn(
        policy,
        prompt_examples(as_rows(rows), policy.tokenizer, max_length=1 << 30),
        make_reward_fn([REWARD], policy.tokenizer),
        max_new_tokens=options.max_new_tokens,
        batch_size=EVAL_BATCH,
    )


def run_seed(options: Options, seed: int) -> pipeline_stages.Results:
    """Trains what is missing and measures it."""
    folder, data = options.out / f"seed_{seed}", write_data(options, seed)
    held = files.read_json(folder / "results.json", otherwise={}, keys=())
    if options.abilities and any("exact_match" in found and "chat" not in found for found in held.values()):
        raise UserError(
            f"--abilities: policies in {folder} were measured without: leave it out, or choose another --out"
        )
    kinds = np.array([row["kind"] for row in files.read_lines(data["held_out"])])
    evaluate = functools.cache(lambda: held_out_evaluation(options, load(options.model), data))
    reference = functools.cache(lambda: load(place_of(options, seed, "sft")).params)

    def measure(name: str) -> dict[str, Any]:
        if name == "pairs":
            return {"pairs": len(files.read_lines(folder / name / "pairs.jsonl"))}
        if name == "reward_model":
            return {"accuracy": pipeline_stages.last_metric(folder / name, "accuracy")}
        policy = load(place_of(options, seed, name))
        found = evaluate()(policy.params, None if name == "published" else reference(), SAMPLES)
        return {
            "exact_match": found.score,
            "sampled_exact_match": found.sampled_score,
            "kl": found.kl,
            "length": found.length,
            "finished": found.finished,
            **{kind: float(found.rewards[kinds == kind].mean()) for kind in tasks.TASKS},
            **(smollm2_abilities.measure(policy) if options.abilities else {}),
            "completions": found.completions[:SAMPLES],
            "correct": [bool(reward) for reward in found.rewards[:SAMPLES]],
            "numbers": found.numbers,
        }

    return pipeline_stages.run_seed(folder, stage_runs(options, seed, folder, data), measure)


# What comes out ------------------------------------------------------------------------------------


def share(values: list[float], trials: int) -> str:
    """A share with its 95 % interval: over seeds, or of one seed over its trials."""
    found = pipeline_stages.share_interval(values, trials)
    return f"{found.mean:.0%} [{found.low:.0%}, {found.high:.0%}]"


def show(options: Options, summary: Mapping[str, Mapping[str, list[float]]], rows: list[TableRow]) -> None:
    """Prints the tables, and how to talk to each policy."""
    counts = {
        kind: len(range(place, options.eval_prompts, len(tasks.TASKS)))
        for place, kind in enumerate(tasks.TASKS)
    }
    final_table(
        f"{options.eval_prompts} held-out prompts, {options.seeds} seeds, greedy answers; 95 % intervals",
        ["policy", "all", *tasks.TASKS, "KL to SFT, nats", "tokens", "wall time"],
        [
            [
                row.method,
                share(summary[row.method]["exact_match"], options.eval_prompts),
                *(share(summary[row.method][kind], count) for kind, count in counts.items()),
                "-" if row.method == "published" else f"{row.kl:.2f}",
                f"{row.length:.1f}",
                format_seconds(row.seconds),
            ]
            for row in rows
        ],
    )
    if options.abilities:
        names = ("chat", "prose", "panel", "instructions")
        final_table(
            "What training cost: nats a token of general answers and prose; shares of facts and instructions",
            ["policy", *names],
            [[name, *(f"{np.mean(summary[name][each]):.2f}" for each in names)] for name in options.policies],
        )
    for name in options.policies:
        print(f"Talk to {name}: rlhf generate --model {place_of(options, options.first_seed, name)}")


def check(options: Options) -> None:
    """Raises: UserError where the options make no sense, or the folder holds another run."""
    for name in options.methods:
        if name not in (*METHODS, "all"):
            raise UserError(f"--methods {name}: choose among all, {', '.join(METHODS)}")
    pipeline_stages.check(options, COUNTS if options.steps is None else (*COUNTS, "steps"))


def run(options: Options) -> None:
    """All stages of all seeds, the table, the report, and the best policy as a GGUF file."""
    check(options)
    began, seeds = time.perf_counter(), range(options.first_seed, options.first_seed + options.seeds)
    describe_run(options.out, option_checks.to_json(options), stage="smollm2", seeds=list(seeds))
    results = pipeline_stages.run_seeds(options, functools.partial(run_seed, options))
    summary = pipeline_stages.summarise(results)
    shares = {kind: kind for kind in tasks.TASKS}
    rows = pipeline_stages.table_rows(summary, options.policies, options.eval_prompts, shares=shares)
    files.write_json(options.out / "summary.json", summary)
    held_out = options.out / f"seed_{seeds[0]}" / "data" / "held_out.jsonl"
    prompts = [{**row, "answer": str(row["answer"])} for row in files.read_lines(held_out)[:SAMPLES]]
    cards = pipeline_stages.sample_cards(prompts, results[0], options.policies)
    files.write_json(options.out / "samples.json", cards)
    over = "seeds" if options.seeds > 1 else "prompts"
    report = write_report(options.out, rows, interval=f"95 % interval over {over}")
    best = max(options.trained, key=lambda name: np.mean(summary[name]["exact_match"]))
    load(place_of(options, seeds[0], best)).save(options.out / "best.gguf", outtype="q8_0")
    if not options.quiet:
        show(options, summary, rows)
        print(f"Wall time: {format_seconds(time.perf_counter() - began)}")
        print(f"Best, {best}, for llama.cpp and Ollama: {options.out / 'best.gguf'}")
        print(f"Report: {report}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
