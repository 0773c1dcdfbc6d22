"""Iterated RLHF: the newest policy answers, an annotator compares, reward model and PPO are trained again.

    python experiments/pipelines/iterated_rlhf.py --out runs/iterated --rounds 3 --prompts-per-round 512
    python experiments/pipelines/iterated_rlhf.py --out runs/at_once --rounds 1 --prompts-per-round 1536
    python experiments/pipelines/iterated_rlhf.py --out runs/mine --model runs/sft --prompts prompts.jsonl \\
        --annotator my_rewards:helpful

In each round the newest policy answers prompts that were not labelled before, several times each; the
annotator, a reward function that stands for people, says which answer is the best and which the worst; a
reward model is trained from the start policy on the pairs of all rounds, and PPO from the same start by that
reward model. Rounds and one round with as many labels differ only in whose answers were labelled. Without
--model the task is the embedded arithmetic of the main job. A run that was stopped goes on with --resume.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pipeline_stages

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Length, PositiveInt
from rlhf_jax.data.sources import read_rows
from rlhf_jax.metrics import final_table
from rlhf_jax.rollout.sampler import Evaluation
from rlhf_jax.stages import (
    adapting,
    embedded,
    inputs,
    option_checks,
    option_groups,
    ppo,
    preferences,
    reward_model,
    sft,
)
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer, widest_completion
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run

EXACT_MATCH = "rlhf_jax.rewards.verifiers:exact_answer_reward"
# Of the recipe for the embedded task; its demonstrators are those of the main job.
DEMONSTRATORS = {"slip_rate": 0.3, "late_slip_rate": 0.7}
STEPS = {"sft_steps": 900, "reward_steps": 160, "ppo_steps": 25}
ANSWERED_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of iterated RLHF.

    Attributes:
      out: the run folder.
      seeds: how many independent runs.
      first_seed: the first seed; the others follow it.
      resume: go on with the run in the folder where it stopped.
      model: the policy to start from, as of `rlhf ppo --model`; empty for the embedded task, which makes it.
      prompts: rows with `prompt`, `question` or `messages`, of which every round takes its own.
      eval_data: held-out prompts; empty for a tenth of `prompts`.
      annotator: the reward function (`module:function`) that compares answers, and is the measure.
      rounds: how often answers are labelled.
      prompts_per_round: prompts of a round.
      samples_per_prompt: answers to each, of which the best and the worst become a pair.
      continue_policy: PPO goes on from the policy of the round before, instead of from the start.
      level: difficulty of the embedded task.
      sft_steps: optimizer steps of the embedded task's supervised fine-tuning; None for 900.
      reward_steps: optimizer steps of the reward model; None for 160, with --model one pass over the pairs.
      ppo_steps: rollouts of PPO; None for 25, with --model one pass over the prompts.
      max_new_tokens: of an answer; the embedded task has its own.
      batch_size: rows, pairs and answers a step with --model; the embedded task has the recipe's.
      eval_prompts: held-out prompts on which every policy is measured.
      quiet: show no progress.
      adapter: what is trained of the model.
    """

    out: Path = Path("runs/iterated_rlhf")
    seeds: PositiveInt = 1
    first_seed: int = 0
    resume: bool = False
    model: str = ""
    prompts: str = ""
    eval_data: str = ""
    annotator: str = EXACT_MATCH
    rounds: PositiveInt = 3
    prompts_per_round: PositiveInt = 512
    samples_per_prompt: PositiveInt = 4
    continue_policy: bool = False
    level: int = 1
    sft_steps: PositiveInt | None = None
    reward_steps: PositiveInt | None = None
    ppo_steps: PositiveInt | None = None
    max_new_tokens: Length = 256
    batch_size: PositiveInt = 32
    eval_prompts: PositiveInt = 512
    quiet: bool = False
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other."""
    option_checks.check_numbers(options)
    pipeline_stages.check(options, ())
    if bool(options.model) != bool(options.prompts):
        raise UserError("--model and --prompts go together: give both, or neither for the embedded task")
    if options.samples_per_prompt < 2:
        raise UserError("--samples-per-prompt 1 leaves nothing to compare: give 2 or more")


# Data --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Prompts of a seed, in files.

    Attributes:
      prompts: all that are trained on.
      held_out: those that policies are measured on.
      of_rounds: those of each round.
      max_new_tokens: of an answer.
    """

    prompts: Path
    held_out: Path
    of_rounds: tuple[Path, ...]
    max_new_tokens: int


def write_prompts(options: Options, folder: Path, seed: int) -> Data:
    """The prompts of each round, none in two of them, and the held-out ones; drawn once and written."""
    count = options.rounds * options.prompts_per_round
    trained, held_out = folder / "data" / "prompts.jsonl", folder / "data" / "held_out.jsonl"
    of_rounds = tuple(folder / "data" / f"round_{number + 1}.jsonl" for number in range(options.rounds))
    longest = options.max_new_tokens
    if not options.model:
        longest = len(arithmetic_tokenizer().encode(widest_completion(level_of(options)))) + 1
    if not all(files.exists(path) for path in (trained, held_out, *of_rounds)):
        rows, kept = rows_of(options, seed, count)
        if len(rows) < count:
            raise UserError(
                f"{options.rounds} rounds of {options.prompts_per_round} prompts need {count}, and there are "
                f"{len(rows)}: give more with --prompts, or ask for fewer"
            )
        for number, path in enumerate(of_rounds):
            files.write_lines(path, rows[number * options.prompts_per_round :][: options.prompts_per_round])
        files.write_lines(held_out, kept)
        files.write_lines(trained, rows)
    return Data(trained, held_out, of_rounds, longest)


def level_of(options: Options) -> embedded.Level:
    """The embedded task."""
    level = embedded.find_level(f"{embedded.PREFIX}{options.level}")
    assert level is not None
    return level


def rows_of(options: Options, seed: int, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(prompts in an order of the seed's, held-out ones)."""
    if not options.model:
        level = level_of(options)
        drawn = embedded.prompt_rows(level, "train", max(count, 8_000), seed)
        kept = embedded.prompt_rows(level, "heldout", options.eval_prompts, 0)
        return list(map(dict, drawn)), list(map(dict, kept))
    rows = [dict(row.fields) for row in read_rows(options.prompts)]
    rows = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
    if options.eval_data:
        return rows, [dict(row.fields) for row in read_rows(options.eval_data)][: options.eval_prompts]
    kept = min(max(round(own_data.HELD_OUT_SHARE * len(rows)), 1), options.eval_prompts)
    return rows[kept:], rows[:kept]


def gather_labels(folder: Path, number: int) -> tuple[str, str]:
    """(file of the pairs of all rounds so far, file of those held out of them, or nothing where none are)."""
    paths = []
    for name in ("pairs", "held_out"):
        rounds = [folder / f"pairs_{past + 1}" / f"{name}.jsonl" for past in range(number + 1)]
        rows = [row for path in rounds for row in files.read_lines(path)]
        path = folder / "data" / f"{name}_until_{number + 1}.jsonl"
        files.write_lines(path, rows)
        paths.append(str(path) if rows else "")
    return paths[0], paths[1]


# Stages ------------------------------------------------------------------------------------------------


def stage_runs(options: Options, folder: Path, seed: int, data: Data) -> dict[str, Callable[[], Any]]:
    """The stages of a seed, in order; each reads the folders of those before it."""
    start = options.model or str(folder / "sft")
    recipe = not options.model

    def run(name: str, steps: int | None) -> option_groups.RunOptions:
        return pipeline_stages.run_options(options, folder / name, seed, steps)

    def steps(name: str) -> int | None:
        return getattr(options, name) or (STEPS[name] if recipe else None)

    def prompts(path: Path, *rewards: str) -> option_groups.PromptOptions:
        return option_groups.PromptOptions(
            str(path),
            str(data.held_out),
            rewards,
            eval_reward=options.annotator,
            eval_count=options.eval_prompts,
            max_new_tokens=data.max_new_tokens,
        )

    shared: dict[str, Any] = {"adapter": options.adapter, "model": start}
    shared |= {} if recipe else {"batch_size": options.batch_size}

    def train_sft() -> None:
        source = {"data": f"{embedded.PREFIX}{options.level}", **DEMONSTRATORS, **pipeline_stages.SFT}
        sft.run(option_checks.brief(sft.Options(run=run("sft", steps("sft_steps")), **source)))

    def label(number: int) -> None:
        settings = preferences.Options(
            out=folder / f"pairs_{number + 1}",
            model=policy_after(options, folder, number),
            prompts=dataclasses.replace(prompts(data.of_rounds[number], options.annotator), eval_data=""),
            samples_per_prompt=options.samples_per_prompt,
            batch_size=min(ANSWERED_AT_ONCE, options.prompts_per_round),
            seed=seed,
            quiet=options.quiet,
        )
        preferences.run(settings)

    def train_reward_model(number: int) -> None:
        name = f"reward_model_{number + 1}"
        pairs = option_groups.PairOptions(*gather_labels(folder, number))
        toy = pipeline_stages.REWARD_MODEL if recipe else {}
        size = min(shared.get("batch_size", 64), len(files.read_lines(Path(pairs.data))))
        settings = {**shared, "batch_size": size, **toy}
        made = reward_model.Options(run=run(name, steps("reward_steps")), pairs=pairs, **settings)
        reward_model.run(option_checks.brief(made))

    def train_ppo(number: int) -> None:
        name, toy = f"ppo_{number + 1}", pipeline_stages.PPO if recipe else {}
        model = policy_after(options, folder, number) if options.continue_policy else start
        made = ppo.Options(
            run=run(name, steps("ppo_steps")),
            prompts=prompts(data.prompts),
            reward_model=(str(folder / f"reward_model_{number + 1}"),),
            **{**shared, "model": model},
            **toy,
        )
        ppo.run(option_checks.brief(made))

    stages: dict[str, Callable[[], Any]] = {"sft": train_sft} if recipe else {"start": lambda: None}
    for number in range(options.rounds):
        stages[f"pairs_{number + 1}"] = functools.partial(label, number)
        stages[f"reward_model_{number + 1}"] = functools.partial(train_reward_model, number)
        stages[f"ppo_{number + 1}"] = functools.partial(train_ppo, number)
    return stages


def policy_after(options: Options, folder: Path, rounds: int) -> str:
    """The newest policy after so many rounds."""
    return str(folder / f"ppo_{rounds}") if rounds else options.model or str(folder / "sft")


# Running and measuring -----------------------------------------------------------------------------


def run_seed(options: Options, seed: int) -> pipeline_stages.Results:
    """Trains and measures all rounds of one seed."""
    folder = options.out / f"seed_{seed}"
    data = write_prompts(options, folder, seed)
    start = policy_after(options, folder, 0)
    evaluate = functools.cache(lambda reward: held_out_evaluation(options, load(start), data, reward))
    reference = functools.cache(lambda: load(start).params)

    def measure(name: str) -> dict[str, Any]:
        kind, _, number = name.rpartition("_")
        if kind == "pairs":
            return files.read_json(folder / name / "counts.json", keys=("pairs",))
        if kind == "reward_model":
            is_measured = gather_labels(folder, int(number) - 1)[1]
            accuracy = "eval/pair_accuracy" if is_measured else "accuracy"
            return {"pair_accuracy": pipeline_stages.last_metric(folder / name, accuracy)}
        params = load(start if kind != "ppo" else str(folder / name)).params
        known = reference() if kind == "ppo" else None
        found = own_data.numbers_of(evaluate(options.annotator)(params, known))
        if kind == "ppo":
            learnt = evaluate(str(folder / f"reward_model_{number}"))(params, None)
            found["learnt_reward"] = learnt.score
        return found

    return pipeline_stages.run_seed(folder, stage_runs(options, folder, seed, data), measure)


def held_out_evaluation(options: Options, policy: Any, data: Data, reward: str) -> Callable[..., Evaluation]:
    """The same held-out prompts for every policy, scored by the annotator or by a reward model."""
    asked = option_groups.PromptOptions(
        str(data.held_out),
        str(data.held_out),
        eval_reward=reward,
        eval_count=options.eval_prompts,
        max_new_tokens=data.max_new_tokens,
    )
    evaluate = inputs.load_prompts(asked, policy, options.first_seed).evaluate
    assert evaluate is not None
    return evaluate


def show(options: Options, results: list[pipeline_stages.Results]) -> None:
    """Prints the table over rounds."""
    names = [name for name in results[0] if name.startswith(("ppo", "sft", "start"))]
    rows = []
    for number, name in enumerate(names):
        labels = [sum(seed[f"pairs_{past + 1}"]["pairs"] for past in range(number)) for seed in results]
        said = [seed[f"reward_model_{number}"]["pair_accuracy"] for seed in results] if number else []
        learnt = [seed[name]["learnt_reward"] for seed in results] if number else []
        rows.append(
            [
                number,
                f"{np.mean(labels):.0f}",
                f"{np.mean(said):.1%}" if said else "-",
                *own_data.numbers(name, results),
                f"{np.mean(learnt):.2f}" if learnt else "-",
            ]
        )
    over = "seeds" if len(results) > 1 else "prompts"
    of_scores = ["score", "95 % interval", "sampled", "KL, nats", "tokens"]
    final_table(
        f"Held-out prompts, greedy answers; score by {options.annotator}, interval over {over}",
        ["rounds", "pairs", "reward model right", *of_scores, "learnt reward"],
        rows,
    )
    folder = options.out / f"seed_{options.first_seed}"
    print(f"Talk to the last: rlhf generate --model {policy_after(options, folder, options.rounds)}")


def run(options: Options) -> None:
    """All seeds, then the table."""
    check(options)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    describe_run(options.out, option_checks.to_json(options), stage="iterated_rlhf", seeds=seeds)
    results = pipeline_stages.run_seeds(options, lambda seed: run_seed(options, seed))
    files.write_json(options.out / "summary.json", pipeline_stages.summarise(results))
    if not options.quiet:
        show(options, results)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
