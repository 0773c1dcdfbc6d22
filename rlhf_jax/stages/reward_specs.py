"""Rewards by name, as the command line has them: functions by import path, run folders, JSON files."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout, StepRewards
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.judges import load_reward_file
from rlhf_jax.models import ScalarModel
from rlhf_jax.rewards.calls import ALL_AT_ONCE, RewardCalls
from rlhf_jax.rewards.functions import Scored, load_reward
from rlhf_jax.rollout import rewards
from rlhf_jax.rollout.rewards import RewardTerm, RolloutReward, TermFn, function_term, model_term
from rlhf_jax.rollout.sampler import RolloutFns
from rlhf_jax.rollout.step_rewards import make_step_reward_fn
from rlhf_jax.stages.option_groups import ProcessOptions
from rlhf_jax.training.run_folder import load_reward_model


def make_reward_fn(
    specs: Sequence[Any],
    tokenizer: Tokenizer,
    rollout_fns: RolloutFns | None = None,
    *,
    calls: RewardCalls = ALL_AT_ONCE,
) -> RolloutReward:
    """The weighted sum of what `specs` name.

    Args:
      specs: each an object that `rollout.rewards.make_reward_fn` takes, or a name: `module:function`, the
        folder of a reward-model run, or a JSON file that describes a reward (`judges.load_reward_file`),
        with `@KIND` behind it where it counts only in rows whose field `kind` is this, and then `=WEIGHT`
        where the weight is not 1.
      rollout_fns: what is read of a rollout; None for the one completion that it is.
      calls: how functions are called. What a JSON file describes answers all rows at once: a model does.

    Raises:
      UserError: there is no such function or run, or a weight is no number.
    """
    terms = [
        _make_term(*_split_weight(spec), tokenizer, calls) if isinstance(spec, str) else spec
        for spec in specs
    ]
    summed = rewards.make_reward_fn(terms, tokenizer, calls=calls)
    if rollout_fns is None:
        return summed
    return dataclasses.replace(summed, texts_fn=rollout_fns.answer_texts_fn, fields_fn=rollout_fns.fields_fn)


def make_optional_reward_fn(
    specs: Sequence[Any],
    tokenizer: Tokenizer,
    rollout_fns: RolloutFns | None = None,
    *,
    calls: RewardCalls = ALL_AT_ONCE,
) -> RolloutReward:
    """`make_reward_fn`; of nothing, a reward that can score no row."""
    if not specs:
        return RolloutReward((), tokenizer)
    return make_reward_fn(specs, tokenizer, rollout_fns, calls=calls)


def make_ensemble_fn(
    folders: Sequence[Path], tokenizer: Tokenizer, combine_fn: Callable[[jax.Array], jax.Array]
) -> RolloutReward:
    """One reward from the scores of several reward models.

    Args:
      folders: of reward-model runs; their architectures may differ.
      combine_fn: scores [N, B] -> rewards [B], such as `rewards.ensembles.ensemble_worst_case`.
    """
    members = [_model_term(folder, tokenizer) for folder in folders]

    def ensemble(
        rollout: Rollout, prompts: Sequence[PromptExample], completions: Sequence[str], rows: np.ndarray
    ) -> Scored:
        scored = [member(rollout, prompts, completions, rows) for member in members]
        rewards = combine_fn(jnp.stack([part.rewards for part in scored]))
        return Scored(np.asarray(rewards), np.any([part.unscorable for part in scored], axis=0))

    return RolloutReward((RewardTerm("ensemble", ensemble),), tokenizer)


def _split_weight(spec: str) -> tuple[str, float]:
    name, equals, text = spec.rpartition("=")
    if not equals or files.is_folder(spec):
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"reward {spec!r}: {text!r} is no weight, write for example {name}=0.5")
    return name, weight


def _split_kind(spec: str) -> tuple[str, str, str]:
    return (spec, "", "") if files.is_folder(spec) else spec.partition("@")


def _names_model(name: str) -> bool:
    """True if it names the run folder of a reward model; a name that ends in .json may be of a file."""
    return ":" not in name or files.is_remote(name) or files.is_folder(name)


def model_folders(specs: Sequence[str]) -> list[Path]:
    """The run folders of reward models that are among the names of rewards."""
    names = [_split_kind(_split_weight(spec)[0])[0] for spec in specs]
    return [Path(n) for n in names if files.is_folder(n) or (_names_model(n) and not n.endswith(".json"))]


def _make_term(spec: str, weight: float, tokenizer: Tokenizer, calls: RewardCalls) -> RewardTerm:
    name, at, kind = _split_kind(spec)
    if name.endswith(".json") and not files.is_folder(name):
        short, term = Path(name).stem, function_term(load_reward_file(Path(name)))
    elif _names_model(name):
        short, term = Path(name).name, _model_term(Path(name), tokenizer)
    else:
        short, term = name.rpartition(":")[2], function_term(load_reward(name), calls)
    return RewardTerm(f"{short}{at}{kind}", term, weight, kind if at else None)


def _model_term(folder: Path, tokenizer: Tokenizer) -> TermFn:
    if not files.is_folder(folder):
        raise UserError(
            f"reward {str(folder)!r}: there is no such folder: name a function as module:function, or the "
            "folder of a reward-model run"
        )
    trained = _stage_of(folder)
    if trained.get("stage") == "process_reward" and not trained["config"].get("outcome"):
        raise UserError(
            f"{folder} holds a process reward model, which scores steps: give it to --process-reward"
        )
    model = load_reward_model(folder)
    check_same_vocabulary(model.tokenizer, tokenizer, folder, "reward model")
    return model_term(model)


def _stage_of(folder: Path) -> dict[str, Any]:
    """How a run describes itself; nothing where it does not."""
    return files.read_json(folder / "config.json", otherwise={}, keys=("stage", "config"))


def make_process_reward_fn(
    options: ProcessOptions, tokenizer: Tokenizer, given: ScalarModel | None = None
) -> Callable[[Rollout], StepRewards] | None:
    """`step_rewards(rollout)` by a process reward model; None where none is named.

    Args:
      given: a model that was given as an object, and takes the place of the run in `options`.

    Raises:
      UserError: there is no such run, or its tokenizer is not the policy's.
    """
    if given is None and not options.process_reward:
        return None
    folder = Path(options.process_reward or "process_reward")
    if given is None and _stage_of(folder).get("stage") == "reward_model":
        raise UserError(
            f"{folder} holds a reward model of whole answers: give it to --rewards, and to --process-reward "
            "a run of rlhf process-reward"
        )
    model = load_reward_model(folder) if given is None else given
    check_same_vocabulary(model.tokenizer, tokenizer, folder, "process reward model")
    return make_step_reward_fn(model, coef=options.process_reward_coef)


def check_same_vocabulary(
    theirs: Tokenizer, ours: Tokenizer, folder: Path, kind: str, *, remedy: str = ""
) -> None:
    """Compares the tokenizer of a model that another run trained with the policy's.

    Args:
      folder: of that run.
      kind: what it is to this one, such as "reward model".
      remedy: what to do where they differ; empty for training it from a policy with the same tokenizer.

    Raises:
      UserError: they differ.
    """
    vocabularies = [side.backend.get_vocab(with_added_tokens=True) for side in (theirs, ours)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"{folder}: the {kind}'s tokenizer ({theirs.vocab_size} tokens) is not the policy's "
            f"({ours.vocab_size}): {remedy or f'train the {kind} from a policy with the same tokenizer'}"
        )
