"""The run folder: what a stage leaves behind, and how the next one reads it.

run/
  config.json    what was run: command, options, versions, seed, start
  model.json     the architecture, and which kind of parameters the checkpoints hold
  tokenizer/     in the Hugging Face layout
  checkpoints/   see `rlhf_jax.checkpoint`
  metrics.jsonl  one line a step; tensorboard/ has the same
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from rlhf_jax import models
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer

Kind = Literal["policy", "actor_critic", "reward_model"]
"""Whether `learner/params` is a decoder, `{"policy": decoder, "value": scalar model}`, or a scalar model."""

PACKAGES = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture with its parameters and tokenizer."""

    config: models.ModelConfig
    params: Params
    tokenizer: Tokenizer


def write_json(path: Path, data: Any) -> None:
    """Writes JSON for people to read; the folder is made if missing.

    Raises:
      UserError: the disk is full or read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}): free or unlock the disk, or choose another --out"
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_run(folder: Path, config: Mapping[str, Any], **more: Any) -> None:
    """Writes `folder/config.json`."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = "python " + " ".join(sys.argv)
    write_json(
        folder / "config.json",
        {"command": command, "started": started, "config": config, "versions": versions(), **more},
    )


def write_model_files(folder: Path, config: models.ModelConfig, tokenizer: Tokenizer, kind: Kind) -> None:
    """Writes `folder/model.json` and `folder/tokenizer`, without which checkpoints are only numbers."""
    write_json(folder / "model.json", {"kind": kind, "config": models.config_to_dict(config)})
    try:
        tokenizer.save(folder / "tokenizer")
    except OSError as error:
        raise UserError(f"{folder / 'tokenizer'}: cannot be written ({error.strerror})") from error


def load_policy(folder: Path) -> Model:
    """The policy that a run ended with: of SFT, DPO, GRPO, or the actor of PPO.

    Raises:
      UserError: there is no such run, or it trained a reward model.
    """
    kind, config, tokenizer = _read_model_files(folder)
    if kind == "reward_model":
        raise UserError(f"{folder} holds a reward model, not a policy: give the run of another stage")
    name = "learner/params/policy" if kind == "actor_critic" else "learner/params"
    return Model(config, _restore(folder, name, functools.partial(models.init_params, config)), tokenizer)


def load_reward_model(folder: Path) -> Model:
    """The reward model that a run ended with.

    Raises:
      UserError: there is no such run, or it trained a policy.
    """
    kind, config, tokenizer = _read_model_files(folder)
    if kind != "reward_model":
        raise UserError(f"{folder} holds a policy, not a reward model: give a run of reward_model.py")
    init = functools.partial(models.init_scalar_model, config)
    return Model(config, _restore(folder, "learner/params", init), tokenizer)


def _restore(folder: Path, name: str, init: Any) -> Params:
    like = jax.eval_shape(init, jax.random.key(0))
    return restore_params(folder / "checkpoints", like, name=name)[1]


def _read_model_files(folder: Path) -> tuple[Kind, models.ModelConfig, Tokenizer]:
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, config = data["kind"], data["config"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: give the folder that a stage wrote with --out") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a model description ({error}): run the stage again") from error
    return kind, models.config_from_dict(config), load_tokenizer(folder / "tokenizer")
