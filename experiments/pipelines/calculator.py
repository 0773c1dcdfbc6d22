"""GRPO with a calculator: sums too large for the head, and a policy that learns to call a tool for them.

    python experiments/pipelines/calculator.py --out runs/calculator
    python experiments/pipelines/calculator.py --out runs/turns --max-turns 4 --constrained

A small decoder learns from demonstrations, in two thirds of which the writer guesses instead of calling the
calculator (`rlhf sft`); then GRPO finds out what pays (`rlhf tool-use`): before, the most likely conversation
never calls and solves none of the held-out problems; after, it always calls and solves most of them, all on
some seeds (docs/results/tools_and_rag.md). Ten minutes on one core. The run folder holds both stages' own.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pipeline_stages

from rlhf_jax.cli import command_line
from rlhf_jax.metrics import final_table
from rlhf_jax.stages import option_checks, option_groups, sft, tool_use
from rlhf_jax.stages.entry import Given, Trained
from rlhf_jax.tasks.arithmetic import prompt_rows
from rlhf_jax.tasks.arithmetic_tools import TOOL_LEVEL, tool_demonstration_rows, tool_tokenizer
from rlhf_jax.tool_use import calculator
from rlhf_jax.training.run_folder import describe_run

EXACT_MATCH = "rlhf_jax.rewards.verifiers:exact_answer_reward"
COUNTS = ("sft_steps", "demonstrations", "steps", "prompt_count", "eval_prompts")
GRPO: dict[str, Any] = {
    "optimizer": dataclasses.replace(pipeline_stages.SAMPLED, warmup_steps=3),
    "learning_rate": 3e-4,
    "kl_coef": 0.01,
}


@dataclasses.dataclass(frozen=True)
class Options(pipeline_stages.OneSeed):
    """Options of GRPO with a calculator.

    Attributes:
      out: the run folder.
      seed: decides the data, initial weights, order and sampling.
      resume: go on with the run in the folder where it stopped.
      arch: the decoder.
      sft_steps: optimizer steps of supervised fine-tuning.
      demonstrations: how many conversations it learns from.
      call_rate: share of the demonstrators who call the calculator; the others guess.
      steps: rollouts of GRPO.
      prompt_count: problems to train on.
      eval_prompts: held-out problems.
      batch_size: problems a step.
      group_size: conversations about each.
      max_turns: the policy's turns in a conversation.
      max_new_tokens: of a turn.
      response_length: tokens of all turns, what the calculator says included.
      constrained: let the policy write no call that cannot be run.
      quiet: show no progress.
    """

    out: Path = Path("runs/calculator")
    seed: int = 0
    resume: bool = False
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    sft_steps: int = 1_000
    demonstrations: int = 8_000
    call_rate: float = 0.35
    steps: int = 60
    prompt_count: int = 4_000
    eval_prompts: int = 128
    batch_size: int = 16
    group_size: int = 8
    max_turns: int = 3
    max_new_tokens: int = 24
    response_length: int = 72
    constrained: bool = False
    quiet: bool = False


def train_sft(options: Options) -> Trained:
    """A policy that has learnt from demonstrations."""
    rows = tool_demonstration_rows(
        TOOL_LEVEL, options.demonstrations, options.seed, call_rate=options.call_rate
    )
    tool_tokenizer().save(options.out / "tokenizer")
    run = pipeline_stages.run_options(options, options.out / "sft", options.seed, options.sft_steps)
    stage = sft.Options(
        run=run,
        arch=options.arch,
        data="demonstrations",
        tokenizer=str(options.out / "tokenizer"),
        **pipeline_stages.SFT,
    )
    return sft.run(option_checks.brief(stage), Given(rows=rows))


def train_grpo(options: Options, start: Path) -> Trained:
    """The same policy, after GRPO with the calculator."""
    rows = prompt_rows(TOOL_LEVEL, "train", options.prompt_count, options.seed)
    held_out = prompt_rows(TOOL_LEVEL, "heldout", options.eval_prompts, options.seed)
    run = pipeline_stages.run_options(options, options.out / "grpo", options.seed, options.steps)
    stage = tool_use.Options(
        run=run,
        model=str(start),
        prompts=option_groups.PromptOptions(
            data="problems", rewards=(EXACT_MATCH,), max_new_tokens=options.max_new_tokens
        ),
        tools=("calculator",),
        batch_size=options.batch_size,
        group_size=options.group_size,
        max_turns=options.max_turns,
        response_length=options.response_length,
        constrained=options.constrained,
        **GRPO,
    )
    return tool_use.run(
        option_checks.brief(stage), Given(rows=rows, eval_rows=held_out, tools=[calculator()])
    )


def run(options: Options) -> None:
    """Both stages."""
    pipeline_stages.check(options, COUNTS)
    describe_run(options.out, option_checks.to_json(options), stage="calculator")
    trained = train_grpo(options, train_sft(options).folder)
    if not options.quiet:
        last = trained.metrics[-1]
        rows = [
            ("held-out problems right", f"{last['eval/score']:.1%}"),
            ("with a call", f"{last['eval/tool_use']:.1%}"),
        ]
        final_table(f"calculator: {trained.folder}", ["most likely conversations", "share"], rows)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
