"""Top-level Python API (`import rlhf_jax as rj`): each stage as a function of a policy, rows and callables.

Every function takes the options of its command as keywords (`rlhf grpo --help`; dashes become underscores):
`steps`, `learning_rate`, `batch_size`, `seed`, `max_new_tokens`, ... What is a name on the command line
(data, rewards, losses, variants) is an object here. All of them return a `Trained`: `.policy`, `.folder`,
`.metrics`, `.state`.

To go a floor down, copy the body of the stage's `run`: it is made of public pieces.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from rlhf_jax.core.arguments import checked, refuse_unknown, told, typed
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import releasing_locks
from rlhf_jax.core.ranges import Length, Positive, PositiveInt, Width
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.rollout.rewards import Rewards, make_reward_fn
from rlhf_jax.rollout.sampler import Evaluation, make_evaluate_fn
from rlhf_jax.stages import (
    distill as distilling,
    dpo as preference_stage,
    grpo as grpo_stage,
    online_dpo as online_stage,
    ppo as ppo_stage,
    process_reward as process_stage,
    reward_model as reward_stage,
    rounds as rounds_stage,
    sft as sft_stage,
)
from rlhf_jax.stages.adapting import AdapterOptions, Kind
from rlhf_jax.stages.entry import AS_OBJECTS, Given, Rows, Trained, options_of, parameters_named
from rlhf_jax.stages.inputs import UNBOUNDED

__all__ = [
    "distill",
    "dpo",
    "evaluate",
    "grpo",
    "lora",
    "online_dpo",
    "ppo",
    "process_reward",
    "reward_model",
    "rounds",
    "sft",
]


Folder = str | os.PathLike[str] | None
"""Where a run writes; None for a temporary folder."""
Teachers = Annotated[
    Policy | Sequence[Policy] | None,
    f"{Policy.MADE_BY}, a list of such, or None for the policy itself",
]


@checked
def lora(
    rank: Width = 8, alpha: Positive = 16.0, *, targets: str = "", kind: Kind = "lora", **more: Any
) -> Any:
    """A low-rank adapter (LoRA; Hu et al. 2021) as the `adapter` of a stage.

    Args:
      rank: of the two factors.
      alpha: their product is multiplied with alpha / rank.
      targets: which linear layers, a regular expression for their whole path; empty for all.
      kind: lora, rslora, dora, pissa or adalora.
      more: other options of `--adapter`, such as `quantize="nf4"`.
    """
    hints = get_type_hints(AdapterOptions, include_extras=True)
    names = [field.name for field in dataclasses.fields(AdapterOptions)]
    refuse_unknown(
        more,
        {f"{group}{name}": name for group in ("", "adapter.") for name in names},
        "lora() takes",
        "argument",
    )
    more = {name: typed(name, hints[name], value) for name, value in more.items()}
    return AdapterOptions(kind=kind, rank=rank, alpha=alpha, targets=targets, **more)


@checked
def sft(
    policy: Policy, rows: Rows, *, eval_rows: Rows = None, out: Folder = None, **settings: Any
) -> Trained:
    """Supervised fine-tuning: cross-entropy on the assistant's tokens.

    Args:
      rows: with `messages`, or `prompt` and `completion`.
      eval_rows: held out; their loss is logged.
      out: the run folder; a temporary one by default.
      settings: `adapter`, `loggers`, `on_step`, `eval_fn`, and every option of `rlhf sft`.
    """
    return _run(sft_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows)


@checked
def reward_model(
    policy: Policy,
    rows: Rows,
    *,
    loss: str | Callable[..., Any] = "bradley_terry",
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Reward modelling on preference pairs or rankings of K answers; the result has a `reward_model`.

    Args:
      rows: with `prompt`, `chosen` and `rejected`, or with `prompt`, `completions` and `ranks`, 0 the best.
      loss: a name of `rlhf reward-model --loss`, or a function `(rewards, ranks, mask, *, margin, centring,
        denominator) -> (loss, metrics)`, for which a pair is a ranking of two.
      settings: as of `sft`, with the options of `rlhf reward-model`.
    """
    own = None if isinstance(loss, str) else loss
    if isinstance(loss, str):
        settings["loss"] = loss
    return _run(reward_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows, loss=own)


@checked
def process_reward(
    policy: Policy, rows: Rows, *, eval_rows: Rows = None, out: Folder = None, **settings: Any
) -> Trained:
    """Process reward modelling on solutions whose steps are judged; the result has a `reward_model`.

    Args:
      rows: with `prompt`, `completions` (steps) and `labels`.
      settings: as of `sft`, with the options of `rlhf process-reward`.
    """
    return _run(process_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows)


@checked
def dpo(
    policy: Policy,
    rows: Rows,
    *,
    loss: str | Callable[..., Any] = "dpo",
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Direct preference optimization and its family.

    Args:
      rows: with `prompt`, `chosen` and `rejected` (KTO, BCO: single completions with `label`).
      loss: a name of `rlhf dpo --loss`, or a function `(pairs: PairLogps, *, beta, mask, denominator) ->
        (loss, metrics)`.
      settings: as of `sft`, with the options of `rlhf dpo`.
    """
    own = None if isinstance(loss, str) else loss
    if isinstance(loss, str):
        settings["loss"] = loss
    return _run(preference_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows, loss=own)


@checked
def grpo(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Rewards = (),
    process_reward: str | ScalarModel = "",
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Group relative policy optimization and its family (`algorithm="dapo"`, or a variant of your own).

    Args:
      rows: with `prompt`, `question` or `messages`; their other fields go to the rewards by name.
      rewards: functions `(prompts, completions, **fields) -> numbers`, with a weight as (function, weight);
        reward models too. They are summed.
      process_reward: a process reward model, whose word on each step is a reward beside them, or alone.
      settings: as of `sft`, with the options of `rlhf grpo`.
    """
    objects = _with_process_reward(process_reward, settings, rewards)
    return _run(grpo_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows, **objects)


@checked
def ppo(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Rewards = (),
    process_reward: str | ScalarModel = "",
    ptx_rows: Rows = None,
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Proximal policy optimization with a value model.

    Args:
      rows: as of `grpo`.
      rewards: as of `grpo`.
      process_reward: as of `grpo`.
      ptx_rows: text that is to stay likely (PPO-ptx): rows with `text`, or as of `sft`.
      settings: as of `sft`, with the options of `rlhf ppo`.
    """
    named = settings.get("reward_model", "")
    if not isinstance(named, (str, Path, list, tuple)):
        raise UserError(f"reward_model is {told(named)}: it names folders; give rewards=[run.reward_model]")
    objects = _with_process_reward(process_reward, settings, rewards)
    objects |= {"rows": rows, "eval_rows": eval_rows, "ptx_rows": ptx_rows}
    return _run(ppo_stage, out, settings, policy=policy, **objects)


@checked
def online_dpo(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Rewards,
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Online DPO, XPO or Nash-MD on pairs that the policy writes and the rewards compare.

    Args:
      rows: as of `grpo`.
      rewards: as of `grpo`.
      settings: as of `sft`, with the options of `rlhf online-dpo`.
    """
    return _run(online_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows, rewards=rewards)


@checked
def rounds(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Rewards,
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Rejection-sampling fine-tuning (RAFT), expert iteration, or iterated DPO, in rounds.

    Args:
      policy: of a folder: every round starts from what the one before wrote.
      rows: as of `grpo`.
      rewards: as of `grpo`.
      settings: as of `sft`, with the options of `rlhf rounds`.
    """
    return _run(rounds_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows, rewards=rewards)


@checked
def distill(
    policy: Policy,
    teacher: Teachers,
    rows: Rows,
    *,
    rewards: Rewards = (),
    eval_rows: Rows = None,
    out: Folder = None,
    **settings: Any,
) -> Trained:
    """Distillation of a teacher into a policy, off and on policy (GKD), or of the policy into itself (SDFT).

    Args:
      teacher: of the policy's vocabulary, or several, or with `loss="gold"` of another; None for the policy
        itself, with `self_teacher="ema"` (or current, initial) and `teacher_context="FIELD"`.
      rows: prompts, with that field.
      rewards: what answers are worth, which is only looked at; none for answers without a score.
      settings: as of `sft`, with the options of `rlhf distill`.
    """
    objects = {"policy": policy, "teacher": teacher, "rows": rows, "eval_rows": eval_rows}
    return _run(distilling, out, settings, **objects, rewards=rewards)


@checked
def evaluate(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Rewards,
    max_new_tokens: Length,
    batch_size: PositiveInt = 64,
) -> Evaluation:
    """Held-out evaluation: reward of greedy and of sampled completions, their length, and their texts.

    Args:
      rows: as of `grpo`.
      rewards: as of `grpo`.
    """
    prompts = prompt_examples(as_rows(rows), policy.tokenizer, max_length=UNBOUNDED)
    reward_fn = make_reward_fn(rewards, policy.tokenizer)
    evaluate_policy = make_evaluate_fn(
        policy, prompts, reward_fn, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return evaluate_policy(policy.params, None)


def _with_process_reward(
    model: str | ScalarModel, settings: dict[str, Any], rewards: Sequence[Any]
) -> dict[str, Any]:
    """Rewards as objects; a process reward model by its folder goes into the settings."""
    if isinstance(model, ScalarModel):
        return {"rewards": rewards, "process_reward": model}
    settings["process_reward"] = model
    return {"rewards": rewards}


_LOADED = "say it when the policy is loaded: rlhf_jax.load(path, {}=...)"
_ON_MESH = 'enter a mesh: jax.set_mesh(rlhf_jax.distributed.make_mesh("auto"))'
_JOINED = "join the other processes: rlhf_jax.distributed.init_distributed(...)"
_SAID_ELSEWHERE = {
    **dict.fromkeys(("dtype", "param_dtype", "remat", "scan_layers", "attention_backend"), _LOADED),
    **dict.fromkeys(("mesh", "all_gather_params"), _ON_MESH),
    "plan": "plan by the command: rlhf grpo --plan",
    **dict.fromkeys(("coordinator", "init_timeout", "heartbeat_timeout"), _JOINED),
}
"""Options that only the command line takes, and what does their work from Python."""
_OBJECTS = ("loggers", "on_step", "eval_fn")


def _run(stage: Any, out: Any, settings: dict[str, Any], **objects: Any) -> Trained:
    if objects["rows"] is None:
        raise UserError("rows is None: give a list of dicts, a table, or a path")
    for name, ours in AS_OBJECTS.items():
        if name in settings:
            raise UserError(f"there is no setting {name}: give {ours}")
    for name in _SAID_ELSEWHERE.keys() & settings.keys():
        raise UserError(f"{name} is no setting from Python: {_SAID_ELSEWHERE[name].format(name)}")
    objects |= {name: settings.pop(name) for name in _OBJECTS if name in settings}
    given = Given(**objects)
    with parameters_named(), releasing_locks():
        return stage.run(options_of(stage.Options, out, settings), given)
