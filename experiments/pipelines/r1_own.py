"""R1-Zero and R1 on a model and data of one's own.

R1-Zero is RL by rules alone from the model as it is. With traces of good reasoning there is a cold start,
and reasoning RL from it; then the model is fine-tuned anew on what that RL wrote and the rules accept, with
general conversations where they are given, and RL goes on from there. Without traces R1-Zero's answers are
those that are chosen from.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import own_data
import pipeline_stages

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Finite, LearningRate, Length, PositiveInt, Weight
from rlhf_jax.data.sources import read_rows
from rlhf_jax.stages import grpo, option_checks, option_groups, rounds, sft

if TYPE_CHECKING:
    from r1 import Options as Job


@dataclasses.dataclass(frozen=True)
class OwnReasoning:
    """A model and data of one's own, in the place of the embedded reasoning.

    Attributes:
      model: the base to start from: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache; empty for the embedded task.
      prompts: rows with `prompt`, `question` or `messages`; their other fields go to the rewards.
      eval_data: held-out prompts; empty for a tenth of `prompts`.
      rewards: functions by path (`module:function`), each with =WEIGHT behind it where that is not 1: a right
        answer, such as rlhf_jax.rewards.verifiers:gsm8k_reward, which the table measures, then format.
      traces: rows with `prompt` and `completion`, or `messages`, of the cold start; empty for none.
      general_data: conversations beside the chosen answers; empty for none.
      reward_threshold: reward of an answer that is chosen; None for more than the mean.
      max_new_tokens: of an answer.
      group_size: answers to each prompt of GRPO.
      sft_learning_rate: of cold start and SFT on chosen answers; None for the published one.
      grpo_learning_rate: of GRPO; None for the published one.
      kl_coef: weight of the KL to where each RL starts.
    """

    model: str = ""
    prompts: str = ""
    eval_data: str = ""
    rewards: tuple[str, ...] = ()
    traces: str = ""
    general_data: str = ""
    reward_threshold: Finite | None = None
    max_new_tokens: Length = 512
    group_size: PositiveInt = 8
    sft_learning_rate: LearningRate | None = None
    grpo_learning_rate: LearningRate | None = None
    kl_coef: Weight = 0.001


def check(job: "Job") -> None:
    """Raises: UserError where the data do not go together."""
    own = job.own
    if not own_data.is_given(own):
        return
    if not own.prompts or not own.rewards:
        raise UserError("--model reasons by rules: give --prompts, and the --rewards of their answers")
    option_checks.check_divides("--group-size", own.group_size, "--batch-size", job.batch_size)


def policy_folder(job: Any, folder: Path, name: str) -> str:
    """Where a policy is; the SFT on chosen answers has it in that of its only round."""
    if name == "start":
        return job.own.model
    return str(folder / name / "round_1" if name == "chosen_sft" else folder / name)


def stage_runs(job: "Job", folder: Path, seed: int) -> dict[str, Callable[[], Any]]:
    """The stages that the data allow, in order; each reads the folders of those before it."""
    own = job.own
    prompts = option_groups.PromptOptions(
        *own_data.split_prompts(job),
        own.rewards,
        eval_count=job.eval_prompts,
        max_new_tokens=own.max_new_tokens,
    )
    folder_of = functools.partial(policy_folder, job, folder)

    def run(name: str, steps: int) -> option_groups.RunOptions:
        return dataclasses.replace(pipeline_stages.run_options(job, folder / name, seed, steps), report=True)

    def reinforce(name: str, start: str, steps: int) -> Callable[[], Any]:
        made = grpo.Options(
            run=run(name, steps),
            model=folder_of(start),
            algorithm="dr_grpo",  # GRPO's division by the length of an answer loses the tags
            prompts=prompts,
            batch_size=job.batch_size // own.group_size,
            group_size=own.group_size,
            learning_rate=own.grpo_learning_rate,
            kl_coef=own.kl_coef,
            adapter=job.adapter,
        )
        return functools.partial(grpo.run, option_checks.brief(made))

    def imitate_traces() -> None:
        size = min(job.batch_size, len(read_rows(own.traces)))
        source = {"model": own.model, "data": own.traces, "batch_size": size}
        settings = {"learning_rate": own.sft_learning_rate, "adapter": job.adapter}
        sft.run(option_checks.brief(sft.Options(run=run("cold_start", job.cold_steps), **source, **settings)))

    def imitate_chosen(writer: str) -> Callable[[], Any]:
        made = rounds.Options(
            run=run("chosen_sft", job.chosen_steps),
            model=own.model,
            generator=folder_of(writer),
            prompts=prompts,
            method="expert_iteration",
            rounds=1,
            prompts_per_round=job.chosen_prompts,
            reward_threshold=own.reward_threshold,
            batch_size=job.batch_size,
            learning_rate=own.sft_learning_rate,
            extra_data=own.general_data,
            adapter=job.adapter,
        )
        return functools.partial(rounds.run, option_checks.brief(made))

    stages: dict[str, Callable[[], Any]] = {"start": lambda: None}
    stages["zero"] = reinforce("zero", "start", job.zero_steps)
    writer = "reasoning" if own.traces else "zero"
    if own.traces:
        stages["cold_start"] = imitate_traces
        stages["reasoning"] = reinforce("reasoning", "cold_start", job.reasoning_steps)
    stages["chosen_sft"] = imitate_chosen(writer)
    stages["r1"] = reinforce("r1", "chosen_sft", job.final_steps)
    return stages


def run_seed(job: "Job", seed: int) -> pipeline_stages.Results:
    """Trains and measures all stages of one seed."""
    folder = job.out / f"seed_{seed}"
    return own_data.run_and_measure(job, folder, stage_runs(job, folder, seed), "start", policy_folder)
