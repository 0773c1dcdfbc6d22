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
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from rlhf_jax import distributed, models
from rlhf_jax.checkpoint import CheckpointManager, restore_params
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
    """Writes JSON for people to read, whole or not at all; the folder is made if missing.

    Raises:
      UserError: the disk is full or read-only.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(part, path)
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
    command = "python " + shlex.join(sys.argv)
    write_json(
        folder / "config.json",
        {"command": command, "started": started, "config": config, "versions": versions(), **more},
    )


def read_held_run(folder: Path, stage: str, *, resume: bool) -> Mapping[str, Any]:
    """The configuration of the run that `folder` holds; empty where it holds no checkpoint.

    Raises:
      UserError: it holds one and `resume` is False, or that of another stage.
    """
    latest = CheckpointManager(folder / "checkpoints").latest_step()
    path = folder / "config.json"
    if latest is None or (resume and not path.exists()):
        return {}
    if not resume:
        raise UserError(
            f"{folder} already holds a run at step {latest}: add --resume to go on with it, "
            "or choose another --out"
        )
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        held_stage, config = held.get("stage", stage), dict(held["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a run's description ({error}): remove it, or choose another --out"
        ) from error
    if held_stage != stage:
        raise UserError(f"{folder} holds a run of {held_stage}, not of {stage}: choose another --out")
    return config


def check_same_architecture(config: models.ModelConfig, other: models.ModelConfig, where: str) -> None:
    """Compares the architecture `other`, read from `where`, with that of this run.

    Raises:
      UserError: they differ; names the first field that does.
    """
    ours, theirs = models.config_to_dict(config), models.config_to_dict(other)
    for name, value in ours.items():
        if value != theirs.get(name):
            inner = f" {theirs.get(name)}, not {value}" if isinstance(value, str | int) else ""
            raise UserError(
                f"{where}: its model is of another architecture ({name}{inner}): "
                "give one with the architecture of this run, or this run the options of that"
            )


def write_model_files(folder: Path, config: models.ModelConfig, tokenizer: Tokenizer, kind: Kind) -> None:
    """Writes `folder/model.json` and `folder/tokenizer`, without which checkpoints are only numbers.

    Where there are checkpoints, what describes them stays as it is.

    Raises:
      UserError: the folder holds checkpoints of another architecture or tokenizer, or cannot be written.
    """
    path = folder / "model.json"
    if path.exists() and CheckpointManager(folder / "checkpoints").latest_step() is not None:
        _, held_config, held_tokenizer = _read_model_files(folder)
        check_same_architecture(config, held_config, f"{folder}")
        if held_tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise UserError(
                f"{folder}: its run used another tokenizer: give that one, or choose another --out"
            )
        return
    write_json(path, {"kind": kind, "config": models.config_to_dict(config)})
    try:
        tokenizer.save(folder / "tokenizer")
    except Exception as error:  # the tokenizers library raises bare Exception for a full disk
        raise UserError(
            f"{folder / 'tokenizer'}: cannot be written ({error}): free or unlock the disk, "
            "or choose another --out"
        ) from error


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
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = distributed.tree_shardings(distributed.current_mesh(), shapes)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
    return restore_params(folder / "checkpoints", like, name=name)[1]


def _read_model_files(folder: Path) -> tuple[Kind, models.ModelConfig, Tokenizer]:
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, config = data["kind"], models.config_from_dict(data["config"])
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(Kind))}")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: give the folder that a stage wrote with --out") from error
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: not a model description ({error}): run the stage again") from error
    return kind, config, load_tokenizer(folder / "tokenizer")
