"""A named model, post-trained: SmolLM2-135M-Instruct on eight kinds of tasks with verifiers, on two cores.

    bash tools/run.sh smollm2
    python experiments/pipelines/smollm2.py --out runs/smollm2
    python experiments/pipelines/smollm2.py --out runs/trial --steps 5 --eval-prompts 25 --pair-prompts 16

Every stage trains an adapter (LoRA). A short SFT on demonstrations teaches the form of the answers; from that
policy start DPO on pairs of its own answers, GRPO and PPO, whose reward is the verifiers' in all three. Every
policy, the published one too, is asked the same held-out prompts, greedily. The run folder holds a run folder
for each stage, `summary.json`, `report.html`, and the best policy as `best.gguf` for llama.cpp and Ollama.
A run that was stopped goes on with `--resume`. `--steps` makes all stages that short.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_stages
import smollm2_tasks as tasks

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.metrics import TableRow, final_table, format_seconds, write_report
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import Evaluation, make_evaluate_fn
from rlhf_jax.stages import adapting, dpo, grpo, option_checks, option_groups, ppo, preferences, sft
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run

MODEL = "smollm2-135m-instruct"
REWARD = "smollm2_tasks:mixture_reward"
TRAINED = ("sft", "dpo", "grpo", "ppo")
POLICIES = ("published", *TRAINED)
SAMPLES = 10
EVAL_BATCH = 50
ADAPTER = adapting.AdapterOptions("lora", rank=8, alpha=16.0)
WARM = OptimizerConfig(schedule="cosine", warmup_steps=5, end_lr_ratio=0.1)
# Chosen by rule of thumb for an adapter and some tens of steps, not searched.
PACKED = {"packing": True, "max_length": 256, "overlength": "drop", "batch_size": 4}
SFT: dict[str, Any] = {"optimizer": WARM, "learning_rate": 2e-4, **PACKED}
DPO: dict[str, Any] = {"optimizer": WARM, "learning_rate": 5e-5, "beta": 0.1}
ONLINE: dict[str, Any] = {"optimizer": pipeline_stages.SAMPLED, "learning_rate": 1e-4}
GRPO: dict[str, Any] = {**ONLINE, "kl_coef": 0.0}
PPO: dict[str, Any] = {
    **ONLINE,
    "kl_coef": 0.02,
    "num_ppo_epochs": 2,
    "value": "shared",
    "missing_eos_penalty": 0.0,  # the verifiers give nothing for it already
}
COUNTS = (
    "sft_steps",
    "dpo_steps",
    "grpo_steps",
    "ppo_steps",
    "demonstrations",
    "prompt_count",
    "pair_prompts",
    "eval_prompts",
    "max_new_tokens",
)


@dataclasses.dataclass(frozen=True)
class Options(pipeline_stages.OneSeed):
    """Options of post-training the named model.

    Attributes:
      out: the run folder.
      seed: decides the data, order and sampling.
      resume: go on with the run in the folder where it stopped.
      model: the policy to start from: a name, a run folder, a Hugging Face folder or a GGUF file.
      steps: of every stage, instead of what follows; None for that.
      sft_steps: optimizer steps of supervised fine-tuning, 4 rows of 256 tokens each.
      dpo_steps: optimizer steps of DPO, 8 pairs each.
      grpo_steps: rollouts of GRPO, 4 prompts with 8 answers each.
      ppo_steps: rollouts of PPO, 32 prompts each.
      demonstrations: rows of supervised fine-tuning.
      prompt_count: prompts that are answered in GRPO and PPO.
      pair_prompts: of them, those whose answers become pairs: the best and the worst of 8.
      eval_prompts: held-out prompts on which every policy is measured, of eight kinds in turn.
      max_new_tokens: of an answer.
      quiet: show no progress.
    """

    out: Path = Path("runs/smollm2")
    seed: int = 0
    resume: bool = False
    model: str = MODEL
    steps: int | None = None
    sft_steps: int = 60
    dpo_steps: int = 30
    grpo_steps: int = 20
    ppo_steps: int = 16
    demonstrations: int = 1_000
    prompt_count: int = 1_000
    pair_prompts: int = 150
    eval_prompts: int = 200
    max_new_tokens: int = 40
    quiet: bool = False

    def steps_of(self, stage: str) -> int:
        """How many steps a stage takes."""
        return self.steps or getattr(self, f"{stage}_steps")


# Data and stages -----------------------------------------------------------------------------------


def write_data(options: Options) -> dict[str, Path]:
    """Files of demonstrations, prompts, prompts of pairs, and held-out rows."""
    held_out = tasks.held_out_rows(options.eval_prompts, options.seed)
    prompts = tasks.training_rows(options.prompt_count, options.seed, held_out)
    rows = {
        "demonstrations": tasks.training_rows(options.demonstrations, options.seed + 1, held_out),
        "prompts": prompts,
        "pair_prompts": prompts[: options.pair_prompts],
        "held_out": held_out,
    }
    paths = {name: options.out / "data" / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        fields = ("prompt", "completion") if name == "demonstrations" else tasks.PROBLEM
        files.write_lines(path, [{field: row[field] for field in fields} for row in rows[name]])
    return paths


def stage_runs(options: Options, folder: Path, data: Mapping[str, Path]) -> dict[str, Callable[[], Any]]:
    """The stages in order; each reads the folders of those before it."""
    start = str(folder / "sft")

    def run(name: str) -> option_groups.RunOptions:
        made = pipeline_stages.run_options(options, folder / name, options.seed, options.steps_of(name))
        return dataclasses.replace(made, eval_every=0, save_every=10)

    def prompts(name: str) -> option_groups.PromptOptions:
        return option_groups.PromptOptions(
            data=str(data[name]), rewards=(REWARD,), max_new_tokens=options.max_new_tokens
        )

    def train_sft() -> None:
        source = {"model": options.model, "data": str(data["demonstrations"])}
        sft.run(option_checks.brief(sft.Options(run=run("sft"), adapter=ADAPTER, **source, **SFT)))

    def make_pairs() -> None:
        asked = {"samples_per_prompt": 8, "batch_size": 4, "held_out_share": 0.0, "seed": options.seed}
        settings = {"out": folder / "pairs", "model": start, "quiet": options.quiet, **asked}
        preferences.run(preferences.Options(prompts=prompts("pair_prompts"), **settings))

    def train_dpo() -> None:
        path = folder / "pairs" / "pairs.jsonl"
        size = min(8, len(files.read_lines(path)))
        stage = dpo.Options(
            run=run("dpo"),
            model=start,
            pairs=option_groups.PairOptions(data=str(path)),
            adapter=ADAPTER,
            batch_size=size,
            **DPO,
        )
        dpo.run(option_checks.brief(stage))

    def train_grpo() -> None:
        stage = grpo.Options(
            run=run("grpo"),
            model=start,
            prompts=prompts("prompts"),
            adapter=ADAPTER,
            batch_size=4,
            group_size=8,
            **GRPO,
        )
        grpo.run(option_checks.brief(stage))

    def train_ppo() -> None:
        stage = ppo.Options(
            run=run("ppo"), model=start, prompts=prompts("prompts"), adapter=ADAPTER, batch_size=32, **PPO
        )
        ppo.run(option_checks.brief(stage))

    return {
        "published": lambda: None,
        "sft": train_sft,
        "pairs": make_pairs,
        "dpo": train_dpo,
        "grpo": train_grpo,
        "ppo": train_ppo,
    }


# Running and measuring -----------------------------------------------------------------------------


def folder_of(options: Options, name: str) -> str:
    """Where a policy is."""
    return options.model if name == "published" else str(options.out / f"seed_{options.seed}" / name)


def held_out_evaluation(
    options: Options, policy: Policy, data: Mapping[str, Path]
) -> Callable[..., Evaluation]:
    """The same held-out prompts for every policy, compiled once."""
    rows = files.read_lines(data["held_out"])
    return make_evaluate_fn(
        policy,
        prompt_examples(as_rows(rows), policy.tokenizer, max_length=1 << 30),
        make_reward_fn([REWARD], policy.tokenizer),
        max_new_tokens=options.max_new_tokens,
        batch_size=EVAL_BATCH,
    )


def measure_all(options: Options, folder: Path, data: Mapping[str, Path]) -> pipeline_stages.Results:
    """Trains what is missing and measures it."""
    kinds = np.array([row["kind"] for row in files.read_lines(data["held_out"])])
    evaluate = functools.cache(lambda: held_out_evaluation(options, load(options.model), data))
    reference = functools.cache(lambda: load(folder_of(options, "sft")).params)

    def measure(name: str) -> dict[str, Any]:
        if name not in POLICIES:
            return {"pairs": len(files.read_lines(folder / name / "pairs.jsonl"))}
        known = None if name == "published" else reference()
        found = evaluate()(load(folder_of(options, name)).params, known, SAMPLES)
        return {
            "exact_match": found.score,
            "sampled_exact_match": found.sampled_score,
            "kl": found.kl,
            "length": found.length,
            "finished": found.finished,
            **{kind: float(found.rewards[kinds == kind].mean()) for kind in tasks.TASKS},
            "completions": found.completions[:SAMPLES],
            "correct": [bool(reward) for reward in found.rewards[:SAMPLES]],
            "numbers": found.numbers,
        }

    return pipeline_stages.run_seed(folder, stage_runs(options, folder, data), measure)


# What comes out ------------------------------------------------------------------------------------


def share(value: float, trials: int) -> str:
    """A share with its 95 % Wilson interval."""
    found = wilson_interval(round(value * trials), trials)
    return f"{found.mean:.0%} [{found.low:.0%}, {found.high:.0%}]"


def show(options: Options, results: pipeline_stages.Results, rows: list[TableRow], seconds: float) -> None:
    """Prints the table, and how to talk to each policy."""
    counts = {
        kind: len(range(place, options.eval_prompts, len(tasks.TASKS)))
        for place, kind in enumerate(tasks.TASKS)
    }
    final_table(
        f"{options.eval_prompts} held-out prompts, greedy answers; 95 % Wilson intervals",
        ["policy", "all", *tasks.TASKS, "KL to SFT, nats", "tokens", "wall time"],
        [
            [
                row.method,
                share(row.exact_match[0], options.eval_prompts),
                *(share(results[row.method][kind], count) for kind, count in counts.items()),
                "-" if row.method == "published" else f"{row.kl:.2f}",
                f"{row.length:.1f}",
                format_seconds(row.seconds),
            ]
            for row in rows
        ],
    )
    print(f"Wall time: {format_seconds(seconds)}")
    for name in POLICIES:
        print(f"Talk to {name}: rlhf generate --model {folder_of(options, name)}")


def run(options: Options) -> None:
    """All stages, the table, the report, and the best policy as a GGUF file."""
    began = time.perf_counter()
    pipeline_stages.check(options, COUNTS if options.steps is None else (*COUNTS, "steps"))
    describe_run(options.out, option_checks.to_json(options), stage="smollm2", seeds=[options.seed])
    folder, data = options.out / f"seed_{options.seed}", write_data(options)
    results = measure_all(options, folder, data)
    summary = pipeline_stages.summarise([results])
    shares = {kind: kind for kind in tasks.TASKS}
    rows = pipeline_stages.table_rows(summary, POLICIES, options.eval_prompts, shares=shares)
    files.write_json(options.out / "summary.json", summary)
    prompts = [{**row, "answer": str(row["answer"])} for row in files.read_lines(data["held_out"])[:SAMPLES]]
    cards = pipeline_stages.sample_cards(prompts, results, POLICIES)
    files.write_json(options.out / "samples.json", cards)
    report = write_report(options.out, rows, interval="95 % interval over prompts")
    best = max(TRAINED, key=lambda name: results[name]["exact_match"])
    load(folder_of(options, best)).save(options.out / "best.gguf", outtype="q8_0")
    if not options.quiet:
        show(options, results, rows, time.perf_counter() - began)
        print(f"Best, {best}, for llama.cpp and Ollama: {options.out / 'best.gguf'}")
        print(f"Report: {report}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
