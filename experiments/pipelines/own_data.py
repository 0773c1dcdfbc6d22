"""The main job on a model and data of one's own: the stages that the data allow, and one table.

Conversations teach supervised fine-tuning; pairs teach a reward model, by which PPO learns, and DPO; rewards
teach GRPO, and PPO where there are no pairs. All of them start from the fine-tuned policy, or from the model
as it is where there are no conversations. A tenth of the pairs and of the prompts is held out, unless other
prompts are given: every policy answers them, greedily, and what its answers are worth stands in the table.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pipeline_stages

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import LearningRate, Length, Positive, PositiveInt, Weight
from rlhf_jax.data.sources import read_rows
from rlhf_jax.evaluation.statistics import mean_interval
from rlhf_jax.metrics import METRICS_FILE, final_table, format_seconds, write_comparison
from rlhf_jax.rollout.sampler import Evaluation
from rlhf_jax.stages import dpo, grpo, inputs, option_checks, option_groups, ppo, reward_model, sft
from rlhf_jax.training.loading import load

if TYPE_CHECKING:
    from rlhf import Options as Job

SAMPLES = 8
HELD_OUT_SHARE = 0.1
LEARNT_REWARD = "reward_model"

FolderFn = Callable[[Any, Path, str], str]
"""(job, folder of a seed, stage) -> where the policy is that it left; empty where it left none."""


@dataclasses.dataclass(frozen=True)
class OwnData:
    """A model and data of one's own, in the place of the embedded task.

    Attributes:
      model: the policy to start from: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache; empty for the embedded task.
      sft_data: rows with `messages`, or `prompt` and `completion`, for supervised fine-tuning; empty for none
        of it.
      preference_data: rows with `prompt`, `chosen` and `rejected`, for the reward model, PPO and DPO; empty
        for none of them.
      prompts: rows with `prompt`, `question` or `messages`, which PPO and GRPO answer.
      eval_data: held-out prompts; empty for a tenth of `prompts`.
      rewards: functions by path (`module:function`), for GRPO, for PPO without pairs, and for the table, in
        which else stands what the reward model says.
      max_new_tokens: of an answer.
      batch_size: rows, pairs and answers a step.
      group_size: answers to each prompt of GRPO.
      sft_learning_rate: of supervised fine-tuning; here and below None is the published one.
      reward_learning_rate: of the reward model.
      dpo_learning_rate: of DPO.
      ppo_learning_rate: of PPO.
      grpo_learning_rate: of GRPO.
      beta: strength of DPO's constraint, per nat.
      kl_coef: weight of the KL to the start in PPO and GRPO.
    """

    model: str = ""
    sft_data: str = ""
    preference_data: str = ""
    prompts: str = ""
    eval_data: str = ""
    rewards: tuple[str, ...] = ()
    max_new_tokens: Length = 256
    batch_size: PositiveInt = 32
    group_size: PositiveInt = 8
    sft_learning_rate: LearningRate | None = None
    reward_learning_rate: LearningRate | None = None
    dpo_learning_rate: LearningRate | None = None
    ppo_learning_rate: LearningRate | None = None
    grpo_learning_rate: LearningRate | None = None
    beta: Positive | None = None
    kl_coef: Weight | None = None


def check(job: "Job") -> None:
    """Raises: UserError where the data do not go together."""
    own = job.own
    if not is_given(own):
        return
    if not (own.sft_data or own.preference_data or own.rewards):
        raise UserError("nothing says what to learn: give --sft-data, --preference-data or --rewards")
    if own.rewards and not own.prompts:
        raise UserError("--rewards are of answers: give the --prompts that are answered")
    option_checks.check_divides("--group-size", own.group_size, "--batch-size", own.batch_size)


def is_given(own: Any) -> bool:
    """True if there is a model of one's own, whose options are then in their ranges.

    Raises:
      UserError: they are not, or there are such options without the model.
    """
    given = [field.name for field in dataclasses.fields(own) if getattr(own, field.name) != field.default]
    if given and not own.model:
        flag = given[0].replace("_", "-")
        raise UserError(f"--{flag} is of a model of your own: give --model, or leave it out")
    option_checks.check_numbers(own)
    return bool(own.model)


def split_prompts(job: Any) -> tuple[str, str]:
    """(file of prompts to train on, file of held-out ones)."""
    own = job.own
    return (own.prompts, own.eval_data) if own.eval_data or not own.prompts else split(job, "prompts")


def split(job: Any, name: str) -> tuple[str, str]:
    """(file of the rows to train on, file of a held-out tenth), drawn once and written."""
    source, folder = getattr(job.own, name), job.out / "data"
    paths = folder / f"{name}.jsonl", folder / f"{name}_held_out.jsonl"
    if not all(files.exists(path) for path in paths):
        rows = [dict(row.fields) for row in read_rows(source)]
        if len(rows) < 2:
            raise UserError(f"{source} has one row: give more, of which some are held out")
        count = min(max(round(HELD_OUT_SHARE * len(rows)), 1), job.eval_prompts)
        order = np.random.default_rng(job.first_seed).permutation(len(rows))
        files.write_lines(paths[1], [rows[place] for place in order[:count]])
        files.write_lines(paths[0], [rows[place] for place in order[count:]])
    return str(paths[0]), str(paths[1])


def stage_runs(job: "Job", folder: Path, seed: int) -> dict[str, Callable[[], Any]]:
    """The stages that the data allow, in order; each reads the folders of those before it."""
    own = job.own
    prompts_file, held_out = split_prompts(job)
    start = str(folder / "sft") if own.sft_data else own.model

    def run(name: str, steps: int | None) -> option_groups.RunOptions:
        return dataclasses.replace(pipeline_stages.run_options(job, folder / name, seed, steps), report=True)

    def prompts(*rewards: str) -> option_groups.PromptOptions:
        return option_groups.PromptOptions(
            prompts_file,
            held_out,
            rewards,
            eval_reward=reward_of(job, folder),
            eval_count=job.eval_prompts,
            max_new_tokens=own.max_new_tokens,
        )

    learnt = (str(folder / LEARNT_REWARD),) if own.preference_data else ()
    kl = {} if own.kl_coef is None else {"kl_coef": own.kl_coef}
    stages: dict[str, Any] = {}

    def add(name: str, stage: Any, steps: int | None, learning_rate: float | None, **more: Any) -> None:
        settings = {"learning_rate": learning_rate, "batch_size": own.batch_size, "model": start, **more}
        stages[name] = stage, stage.Options(run=run(name, steps), adapter=job.adapter, **settings)

    if own.sft_data:
        add("sft", sft, job.sft_steps, own.sft_learning_rate, model=own.model, data=own.sft_data)
    if own.preference_data:
        pairs = option_groups.PairOptions(*split(job, "preference_data"), eval_count=job.eval_prompts)
        add(LEARNT_REWARD, reward_model, job.reward_steps, own.reward_learning_rate, pairs=pairs)
        add("dpo", dpo, job.dpo_steps, own.dpo_learning_rate, pairs=pairs, beta=own.beta)
    if own.prompts and (learnt or own.rewards):
        asked = prompts() if learnt else prompts(*own.rewards)
        add("ppo", ppo, job.ppo_steps, own.ppo_learning_rate, prompts=asked, reward_model=learnt, **kl)
    if own.rewards:
        sizes = {"batch_size": own.batch_size // own.group_size, "group_size": own.group_size}
        asked = prompts(*own.rewards)
        add("grpo", grpo, job.grpo_steps, own.grpo_learning_rate, prompts=asked, **sizes, **kl)
    commands = {
        name: functools.partial(stage.run, option_checks.brief(options))
        for name, (stage, options) in stages.items()
    }
    return {"start": lambda: None, **commands}


def reward_of(job: Any, folder: Path) -> str:
    """What the table measures by: the first reward, or the reward model; empty for nothing."""
    if job.own.rewards:
        return job.own.rewards[0]
    return str(folder / LEARNT_REWARD) if job.own.preference_data else ""


# Running and measuring -----------------------------------------------------------------------------


def policy_folder(job: "Job", folder: Path, name: str) -> str:
    """Where a policy is."""
    return job.own.model if name == "start" else str(folder / name)


def run_seed(job: "Job", seed: int) -> pipeline_stages.Results:
    """Trains and measures the stages of one seed."""
    folder = job.out / f"seed_{seed}"
    start = "sft" if job.own.sft_data else "start"
    return run_and_measure(job, folder, stage_runs(job, folder, seed), start, policy_folder)


def run_and_measure(
    job: Any, folder: Path, stages: Mapping[str, Callable[[], Any]], start: str, folder_of: FolderFn
) -> pipeline_stages.Results:
    """Runs the stages, then measures all policies, as the reward model may be the measure.

    Args:
      start: the policy that the KL is to.
    """
    trained = pipeline_stages.run_seed(folder, stages, lambda _: {})
    path = folder / "measured.json"
    measured: dict[str, Any] = files.read_json(path, otherwise={}, keys=())
    evaluate = functools.cache(lambda: held_out_evaluation(job, folder))
    reference = functools.cache(lambda: load(folder_of(job, folder, start)).params)
    for name in stages:
        if name == LEARNT_REWARD:
            accuracy = pipeline_stages.last_metric(folder / name, "eval/pair_accuracy")
            measured[name] = {"pair_accuracy": accuracy}
        elif name in measured or not (where := folder_of(job, folder, name)):
            continue
        elif (score := evaluate()) is not None:
            params = load(where).params
            measured[name] = numbers_of(score(params, None if name == start else reference()))
        files.write_json(path, measured)
    return {name: {**trained[name], **measured.get(name, {})} for name in stages}


def held_out_evaluation(job: Any, folder: Path) -> Callable[..., Evaluation] | None:
    """The same held-out prompts for every policy; None where there are none."""
    prompts_file, held_out = split_prompts(job)
    if not held_out:
        return None
    asked = option_groups.PromptOptions(
        prompts_file or held_out,
        held_out,
        eval_reward=reward_of(job, folder),
        eval_count=job.eval_prompts,
        max_new_tokens=job.own.max_new_tokens,
    )
    return inputs.load_prompts(asked, load(job.own.model), job.first_seed).evaluate


def numbers_of(found: Evaluation) -> dict[str, Any]:
    """What is kept of an evaluation."""
    interval = mean_interval(found.rewards)
    return {
        "score": found.score,
        "score_low": interval.low,
        "score_high": interval.high,
        "sampled_score": found.sampled_score,
        "kl": found.kl,
        "length": found.length,
        "completions": found.completions[:SAMPLES],
    }


# What comes out ------------------------------------------------------------------------------------


def show(job: Any, results: list[pipeline_stages.Results], folder_of: FolderFn = policy_folder) -> None:
    """Prints the table, where the report is, and how to talk to each policy."""
    folder = job.out / f"seed_{job.first_seed}"
    policies = [name for name in results[0] if name != LEARNT_REWARD and folder_of(job, folder, name)]
    scored = "score" in results[0][policies[0]]
    rows = [[name, *(numbers(name, results) if scored else ()), seconds(name, results)] for name in policies]
    of_scores = ["score", "95 % interval", "sampled", "KL, nats", "tokens"] if scored else []
    measure = reward_of(job, Path("reward model")).rpartition("/")[2]
    over = "seeds" if len(results) > 1 else "prompts"
    final_table(
        f"Held-out prompts, greedy answers; score by {measure}, interval over {over}"
        if scored
        else "Stages (no held-out prompts: give --prompts)",
        ["policy", *of_scores, "wall time"],
        rows,
    )
    for name in policies:
        print(f"Talk to {name}: rlhf generate --model {folder_of(job, folder, name)}")
    trained = [name for name in results[0] if name != "start" and name in (*policies, LEARNT_REWARD)]
    runs = [
        # Of a stage of several parts, the part that left the policy.
        folder / name if files.exists(folder / name / METRICS_FILE) else Path(folder_of(job, folder, name))
        for name in trained
    ]
    if len(runs) > 1:
        print(f"Report: {write_comparison(runs, job.out / 'report.html')}")


def numbers(name: str, results: list[pipeline_stages.Results]) -> list[str]:
    """Cells of a policy's row."""
    of_seeds = [seed[name] for seed in results]
    mean = {
        key: float(np.mean([seed[key] for seed in of_seeds])) for key in ("sampled_score", "kl", "length")
    }
    score = mean_interval([seed["score"] for seed in of_seeds])
    low, high = (
        (score.low, score.high) if len(results) > 1 else (of_seeds[0]["score_low"], of_seeds[0]["score_high"])
    )
    return [
        f"{score.mean:.3f}",
        f"[{low:.3f}, {high:.3f}]",
        f"{mean['sampled_score']:.3f}",
        f"{mean['kl']:.2f}",
        f"{mean['length']:.1f}",
    ]


def seconds(name: str, results: list[pipeline_stages.Results]) -> str:
    """Wall time of a stage, the mean over seeds."""
    return format_seconds(pipeline_stages.mean([seed[name]["seconds"] for seed in results]))
