"""Low-rank adapters in the folder layout of PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params
from rlhf_jax.models.adapters import DoRA, LoRA, without_adapter
from rlhf_jax.models.adapters.linear import scaled_columns
from rlhf_jax.models.adapters.trees import map_linears
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import stack_layers, unstack_layers
from rlhf_jax.models.hf import family_of
from rlhf_jax.models.hf.files import opened, read_json
from rlhf_jax.models.hf.mapping import SAME

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    base: str = "",
    rank_stabilized: bool = False,
) -> None:
    """Writes the low-rank adapter among `params` as a folder that `peft` and vLLM load onto the base.

    What PEFT has no form of its own for becomes plain LoRA of the same function: AdaLoRA with its singular
    values in the first factor, PiSSA with twice the rank, its first factors with a minus.

    Args:
      base: name or folder of the base in the Hugging Face format, for whoever loads the adapter.
      rank_stabilized: say so with `use_rslora` rather than with an alpha that gives the same scale.

    Raises:
      UserError: there is no low-rank adapter, or one of a layer that has no tensor of its own there.
    """
    folder = files.as_local(path, "an adapter of PEFT is written")
    params = unstack_layers(config, params) if config.scan_layers else params
    modules = _modules(config)
    tensors: dict[str, np.ndarray] = {}
    scales, ranks, adapted = set[float](), set[int](), list[str]()

    def write(where: str, leaves: Params) -> Params:
        if "lora_a" in leaves:
            if where not in modules:
                raise UserError(
                    f"{where}: its adapter cannot be written for PEFT, where the layer is a part of a larger "
                    "tensor: merge the adapter, or leave that layer out of targets"
                )
            name = modules[where]
            adapted.append(name)
            a, b = _factors(leaves)
            scales.add(float(leaves["lora_scale"]))
            ranks.add(a.shape[1])
            tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
            if "lora_magnitude" in leaves:
                magnitude = np.asarray(leaves["lora_magnitude"])
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
        return leaves

    map_linears(write, params)
    if not adapted or len(scales) > 1 or len(ranks) > 1:
        raise UserError("there is no low-rank adapter to write for PEFT, or more than one: give one of them")
    rank, scale = ranks.pop(), scales.pop()
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": scale * (rank**0.5 if rank_stabilized else rank),
        "use_rslora": rank_stabilized,
        "use_dora": any(name.endswith("magnitude_vector") for name in tensors),
        "target_modules": _shortest(adapted, modules),
        "fan_in_fan_out": not _is_transposed(config),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }
    try:
        with files.writing(folder / WEIGHTS) as local:
            save_file(tensors, local, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{folder}: cannot be written ({error}): make room or choose another folder."
        ) from error
    files.write_text(folder / CONFIG, json.dumps(description, indent=2) + "\n")


def load(path: str | os.PathLike[str], config: ModelConfig, params: Params) -> tuple[LoRA | DoRA, Params]:
    """A LoRA or DoRA that `peft` saved, among the parameters of its base.

    Returns:
      (adapter, params)

    Raises:
      UserError: it is of another kind or for another base, or a file is missing or damaged.
    """
    folder = files.as_local(path, "an adapter of PEFT is read")
    description = _read_description(folder / CONFIG)
    stacked = config.scan_layers
    base = without_adapter(unstack_layers(config, params) if stacked else params)
    modules = _modules(config)
    with opened(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    used: set[str] = set()

    def take(module: str, suffix: str, shape: tuple[int, ...]) -> Any:
        name = f"{PREFIX}{module}.{suffix}"
        if name not in tensors or tensors[name].shape != shape:
            found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise UserError(
                f"{folder / WEIGHTS}: tensor `{name}` {found}, and the base asks for {list(shape)}: give the "
                "base that the adapter was trained on"
            )
        used.add(name)
        return jnp.asarray(tensors[name].T, jnp.float32)

    rank, targets = description["r"], []
    kind = DoRA if description.get("use_dora") else LoRA
    adapter = kind(rank, float(description["lora_alpha"]), ".*", bool(description.get("use_rslora")))

    def read(where: str, leaves: Params) -> Params:
        module = modules.get(where)
        if module is None or f"{PREFIX}{module}.lora_A.weight" not in tensors:
            return leaves
        targets.append(where)
        fan_in, fan_out = leaves["kernel"].shape
        added = {
            "lora_a": take(module, "lora_A.weight", (rank, fan_in)),
            "lora_b": take(module, "lora_B.weight", (fan_out, rank)),
            "lora_scale": jnp.float32(adapter.scale),
        }
        if isinstance(adapter, DoRA):
            added["lora_magnitude"] = take(module, "lora_magnitude_vector", (fan_out,))
        return {**leaves, **added}

    tree = map_linears(read, base)
    unused = sorted(tensors.keys() - used)
    if unused or not targets:
        what = f"tensor `{unused[0]}` has no place in the base" if unused else "no tensor of an adapter"
        raise UserError(f"{folder / WEIGHTS}: {what}: give the base that the adapter was trained on")
    pattern = "|".join(map(re.escape, targets))
    adapter = kind(rank, adapter.alpha, pattern, adapter.rank_stabilized)
    return adapter, stack_layers(config, tree) if stacked else tree


def _read_description(path: Path) -> dict[str, Any]:
    description = read_json(path)
    wanted = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "modules_to_save": (None, []),
        "rank_pattern": (None, {}),
        "alpha_pattern": (None, {}),
        # The others change the base as well, or are computed otherwise.
        "init_lora_weights": (True, None, False, "gaussian"),
        "fan_in_fan_out": (None, False),
        "layer_replication": (None,),
        "lora_bias": (None, False),
        "use_qalora": (None, False),
        "alora_invocation_tokens": (None,),
        "trainable_token_indices": (None,),
        "target_parameters": (None, []),
        "layers_to_transform": (None, []),
    }
    for field, values in wanted.items():
        if field in description and not any(
            description[field] is v or description[field] == v for v in values
        ):
            raise UserError(
                f"{path}: `{field}` is {description.get(field)!r}, and only {values[0]!r} is supported: "
                "merge the adapter in PEFT and load the whole model"
            )
    rank, alpha = description.get("r"), description.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: `r` {rank!r} or `lora_alpha` {alpha!r} is no number: copy it again")
    return description


def _modules(config: ModelConfig) -> dict[str, str]:
    """PEFT's names of the linear layers that have a tensor of their own, by our paths."""
    return {
        rule.params[0].removesuffix("/kernel"): rule.name.removesuffix(".weight")
        for rule in family_of(config).tensors(config)
        if len(rule.params) == 1 and rule.slot is None and rule.params[0].endswith("/kernel")
    }


def _is_transposed(config: ModelConfig) -> bool:
    """True where the family's kernels are [out, in]; GPT-2's are not."""
    rules = family_of(config).tensors(config)
    return not any(rule.params[0].endswith("/kernel") and rule.layout is SAME for rule in rules)


def _shortest(adapted: list[str], modules: dict[str, str]) -> list[str]:
    """Last words where these name all that is adapted and nothing else, else whole names."""
    words = {name.rpartition(".")[2] for name in adapted}
    meant = {name for name in modules.values() if name.rpartition(".")[2] in words}
    return sorted(words) if meant == set(adapted) else sorted(adapted)


def _factors(leaves: Params) -> tuple[np.ndarray, np.ndarray]:
    a, b = scaled_columns(leaves), leaves["lora_b"]
    if "lora_a0" in leaves:
        a = jnp.concatenate([a, leaves["lora_a0"]], axis=1)
        b = jnp.concatenate([b, -leaves["lora_b0"]])
    return np.asarray(a), np.asarray(b)
