"""What `import rlhf_jax as rj` offers: each stage as a function of a policy, rows and callables.

Every function takes the options of its command as keywords (`rlhf grpo --help`; dashes become underscores):
`steps`, `learning_rate`, `batch_size`, `seed`, `max_new_tokens`, ... What is a name on the command line
(data, rewards, losses, variants) is an object here. All of them return a `Trained`: `.policy`, `.folder`,
`.metrics`, `.state`.

To go a floor down, copy the body of the stage's `run`: it is made of public pieces.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import releasing_locks
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.rollout.rewards import make_reward_fn
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
from rlhf_jax.stages.adapting import AdapterOptions
from rlhf_jax.stages.entry import Given, Rows, Trained, options_of, parameters_named
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


def lora(rank: int = 8, alpha: float = 16.0, *, targets: str = "", kind: str = "lora", **more: Any) -> Any:
    """A low-rank adapter (LoRA; Hu et al. 2021) as the `adapter` of a stage.

    Args:
      rank: of the two factors.
      alpha: their product is multiplied with alpha / rank.
      targets: which linear layers, a regular expression for their whole path; empty for all.
      kind: lora, rslora, dora, pissa or adalora.
      more: other options of `--adapter`, such as `quantize="nf4"`.
    """
    return AdapterOptions(kind=kind, rank=rank, alpha=alpha, targets=targets, **more)  # type: ignore[arg-type]


def sft(policy: Policy, rows: Rows, *, eval_rows: Rows = None, out: Any = None, **settings: Any) -> Trained:
    """Supervised fine-tuning: cross-entropy on the assistant's tokens.

    Args:
      rows: with `messages`, or `prompt` and `completion`.
      eval_rows: held out; their loss is logged.
      out: the run folder; a temporary one by default.
      settings: `adapter`, `loggers`, `on_step`, `eval_fn`, and every option of `rlhf sft`.
    """
    return _run(sft_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows)


def reward_model(
    policy: Policy,
    rows: Rows,
    *,
    loss: str | Callable[..., Any] = "bradley_terry",
    eval_rows: Rows = None,
    out: Any = None,
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


def process_reward(
    policy: Policy, rows: Rows, *, eval_rows: Rows = None, out: Any = None, **settings: Any
) -> Trained:
    """Process reward modelling on solutions whose steps are judged; the result has a `reward_model`.

    Args:
      rows: with `prompt`, `completions` (steps) and `labels`.
      settings: as of `sft`, with the options of `rlhf process-reward`.
    """
    return _run(process_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows)


def dpo(
    policy: Policy,
    rows: Rows,
    *,
    loss: str | Callable[..., Any] = "dpo",
    eval_rows: Rows = None,
    out: Any = None,
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


def grpo(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Sequence[Any] = (),
    process_reward: str | ScalarModel = "",
    eval_rows: Rows = None,
    out: Any = None,
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


def ppo(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Sequence[Any] = (),
    process_reward: str | ScalarModel = "",
    ptx_rows: Rows = None,
    eval_rows: Rows = None,
    out: Any = None,
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
    objects = _with_process_reward(process_reward, settings, rewards)
    objects |= {"rows": rows, "eval_rows": eval_rows, "ptx_rows": ptx_rows}
    return _run(ppo_stage, out, settings, policy=policy, **objects)


def online_dpo(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Sequence[Any],
    eval_rows: Rows = None,
    out: Any = None,
    **settings: Any,
) -> Trained:
    """Online DPO, XPO or Nash-MD on pairs that the policy writes and the rewards compare.

    Args:
      rows: as of `grpo`.
      rewards: as of `grpo`.
      settings: as of `sft`, with the options of `rlhf online-dpo`.
    """
    return _run(online_stage, out, settings, policy=policy, rows=rows, eval_rows=eval_rows, rewards=rewards)


def rounds(
    policy: Policy,
    rows: Rows,
    *,
    rewards: Sequence[Any],
    eval_rows: Rows = None,
    out: Any = None,
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


def distill(
    policy: Policy,
    teacher: Policy | Sequence[Policy] | None,
    rows: Rows,
    *,
    rewards: Sequence[Any] = (),
    eval_rows: Rows = None,
    out: Any = None,
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


def evaluate(
    policy: Policy, rows: Rows, *, rewards: Sequence[Any], max_new_tokens: int, batch_size: int = 64
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
    settings["process_reward"] = str(model)
    return {"rewards": rewards}


_OBJECTS = ("loggers", "on_step", "eval_fn")


def _run(stage: Any, out: Any, settings: dict[str, Any], **objects: Any) -> Trained:
    _check_policy(objects["policy"])
    objects |= {name: settings.pop(name) for name in _OBJECTS if name in settings}
    if isinstance(settings.get("adapter", AdapterOptions()), AdapterOptions):
        with parameters_named(), releasing_locks():
            return stage.run(options_of(stage.Options, out, settings), Given(**objects))
    raise UserError(f"adapter is {settings['adapter']!r}: give one such as rlhf_jax.lora(rank=16)")


def _check_policy(policy: Any) -> None:
    if not isinstance(policy, Policy):
        raise UserError(
            f"policy is a {type(policy).__name__}: give what rlhf_jax.load(path) or rlhf_jax.wrap() returns"
        )
