"""GRPO with tools: the policy calls your Python functions over several turns, and rewards judge its last one.

    rlhf tool-use --out runs/tools --model runs/sft --data problems.jsonl --tools my_tools:search \\
        --rewards my_rewards:exact --max-new-tokens 256
    rlhf tool-use --out runs/sums --model runs/sft --data gsm8k.jsonl --tools rlhf_jax.tool_use:calculator \\
        --rewards rlhf_jax.rewards.verifiers:gsm8k_reward --algorithm dapo --max-turns 4
    rlhf tool-use --out runs/lora --model ~/Qwen2.5-0.5B-Instruct --data problems.jsonl --constrained \\
        --tools my_tools:search my_tools:open_page --rewards my_rewards:exact --adapter.kind lora

A tool is a function that takes texts by name and returns a text: the chat template tells the policy its name,
the first paragraph of its docstring, and its parameters. A call is JSON in `<tool_call>` tags; it is run in
a process of its own under a limit of time, what the tool says is fed back as tokens without a gradient, and
generation goes on. --max-new-tokens are those of a turn. Reward functions get the last turn as the
completion, and the whole in the field `conversation`. Rows are those of `rlhf grpo`.
"""

import dataclasses
from pathlib import Path

import jax
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import LengthOrZero, Positive, PositiveInt
from rlhf_jax.models import Policy
from rlhf_jax.rollout.multi_turn import multi_turn
from rlhf_jax.rollout.sampler import RolloutFns
from rlhf_jax.stages import defaults, grpo, grpo_options, option_groups
from rlhf_jax.stages.entry import FROM_PYTHON, NOTHING, Given, Trained
from rlhf_jax.stages.session import Session
from rlhf_jax.tool_use import make_tools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(grpo_options.GroupOptions):
    """Options of GRPO with tools.

    Attributes:
      tools: functions by path (`module:function`) that the policy may call, or that return a `Tool`.
      tool_timeout: seconds that a call may take; a longer one is answered with an error.
      max_turns: the policy's turns in a conversation, of --max-new-tokens each.
      response_length: tokens of all turns, what the tools say included; 0 for twice what the turns may have.
      constrained: let the policy write no call that cannot be run.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/tool_use"))
    tools: tuple[str, ...]
    tool_timeout: Positive = 2.0
    max_turns: PositiveInt = 3
    response_length: LengthOrZero = 0
    constrained: bool = False

    @property
    def max_completion_length(self) -> int:
        """Tokens of all that follows a prompt."""
        return self.response_length or 2 * self.max_turns * self.prompts.max_new_tokens


def check(options: Options, given: Given) -> None:
    """Raises: UserError where the options do not fit each other."""
    grpo_options.check(options, "tool_use")
    grpo_options.check_rewards(options, given)
    if not given.tools and options.tools in ((), (FROM_PYTHON,)):
        raise UserError(
            "there is nothing to call: give --tools, such as --tools rlhf_jax.tool_use:calculator"
        )
    if options.max_completion_length < options.prompts.max_new_tokens:
        raise UserError(
            f"--response-length {options.response_length} is below --max-new-tokens "
            f"{options.prompts.max_new_tokens}: there is no room for a turn; raise it"
        )
    if jax.process_count() > 1:
        raise UserError("tools are called in one process only: run without --coordinator")


def rollouts_with_tools(options: Options, model: Policy, given: Given = NOTHING) -> RolloutFns:
    """Rollout functions of conversations with the tools of the options, or those given."""
    return multi_turn(
        model,
        make_tools(given.tools or options.tools, seconds=options.tool_timeout),
        max_new_tokens=options.prompts.max_new_tokens,
        max_turns=options.max_turns,
        response_length=options.max_completion_length,
        constrained=options.constrained,
    )


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "grpo")
    check(options, given)
    session = Session(options, given, "tool_use")
    fns = rollouts_with_tools(options, session.policy, given)
    prompts = session.load_prompts(fns)
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts, {len(fns.tools)} tools")
    return grpo.train(session, prompts)
