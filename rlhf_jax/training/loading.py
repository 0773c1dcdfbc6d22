"""Loading a policy from wherever it is: a run folder, a Hugging Face folder, a GGUF file, a name."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax import models
from rlhf_jax.core import files
from rlhf_jax.core.arguments import checked
from rlhf_jax.core.types import Params
from rlhf_jax.models import Policy
from rlhf_jax.models.config import AttentionBackend, Remat
from rlhf_jax.models.loading import kind_of_checkpoint, load_checkpoint, local_checkpoint
from rlhf_jax.models.policy import Source
from rlhf_jax.training.run_folder import load_policy

_SAMPLE = 1 << 20


@checked
def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: Remat | None = None,
    scan_layers: bool | None = None,
    attention_backend: AttentionBackend | None = None,
    shapes_only: bool = False,
) -> Policy:
    """A policy, ready to answer and to be trained.

    Args:
      path: a run folder, a Hugging Face folder, a GGUF file, a name of `models.named.NAMED_MODELS`, or a name
        such as `org/model` in the local hub cache.
      dtype: of computation. None for that of a run; of a published checkpoint for bfloat16 on GPUs and TPUs
        and float32 on CPUs.
      param_dtype: of parameters. None for that of a run, and for float32 of a published checkpoint.
      remat: what the backward pass computes again. None for that of a run, and for nothing.
      scan_layers: whether layers run as one scan. None for as in a run, and for deep published checkpoints
        whose pattern repeats.
      attention_backend: how attention is computed (`ModelConfig`). None for that of a run, and for `auto`.
      shapes_only: `params` are `jax.ShapeDtypeStruct`s, and no weight is read: for plans.

    Raises:
      UserError: there is no such model, it is not supported, or a file is damaged.
    """
    choices: dict[str, Any] = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "remat": remat,
        "scan_layers": scan_layers,
        "attention_backend": attention_backend,
    }
    if files.is_remote(path) or kind_of_checkpoint(path) == "run":
        policy = load_policy(files.as_path(path), shapes_only=shapes_only)
        if all(choice is None for choice in choices.values()):
            return policy
        assert policy.config is not None
        if shapes_only:
            config, params = _reconfigured_shapes(policy.config, policy.params, choices)
        else:
            config, params = models.reconfigure(policy.config, policy.params, **choices)
        return models.make_policy(config, params, policy.tokenizer, source=policy.source)
    config, params, tokenizer = load_checkpoint(path, **choices, shapes_only=shapes_only)
    return models.make_policy(config, params, tokenizer, source=_published(path))


def _reconfigured_shapes(
    config: models.ModelConfig, params: Params, choices: Mapping[str, Any]
) -> tuple[models.ModelConfig, Params]:
    """`models.reconfigure` of shapes."""
    found: list[models.ModelConfig] = []

    def change(params: Params) -> Params:
        new, params = models.reconfigure(config, params, **choices)
        found.append(new)
        return params

    shapes = jax.eval_shape(change, params)
    return found[0], shapes


def _published(path: str | os.PathLike[str]) -> Source:
    """Where a published checkpoint was read; of its large files the digest sees both ends and the size."""
    place = local_checkpoint(path)
    digest = hashlib.sha256()
    parts = [place] if place.is_file() else [*sorted(place.glob("*.safetensors")), place / "config.json"]
    for part in parts:
        digest.update(f"{part.name} {part.stat().st_size}".encode())
        with part.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(part.stat().st_size - _SAMPLE, 0))
            digest.update(file.read(_SAMPLE))
    return Source(place, 0, digest.hexdigest())
