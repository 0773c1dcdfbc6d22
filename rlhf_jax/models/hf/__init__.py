"""Hugging Face checkpoints in and out. A family is one file here, of a config's fields and tensors' names."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import map_named, named_leaves
from rlhf_jax.core.types import Params
from rlhf_jax.distributed import tree_shardings
from rlhf_jax.models.adapters import is_adapter_leaf
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import init_params, unstack_layers
from rlhf_jax.models.hf import bloom, deepseek, gemma, gpt2, llama, mistral, olmo, phi, qwen
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.files import CONFIG, Checkpoint, Writer, read_json
from rlhf_jax.models.hf.mapping import Family, InexpressibleError, Tensor

FAMILIES = (
    llama.LLAMA,
    mistral.MISTRAL,
    mistral.MIXTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gpt2.GPT2,
    olmo.OLMO2,
    phi.PHI3,
    bloom.BLOOM,
    deepseek.V2,
    deepseek.V3,
)
DTYPES = ("float32", "bfloat16", "float16", "float64")


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer, as far as `save` knows one."""

    eos_id: int
    pad_id: int
    bos_id: int | None

    def save(self, folder: Path, /) -> None:
        """Writes its files into the folder."""
        ...


# In ------------------------------------------------------------------------------------------------


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The architecture that a folder's config.json describes, in float32.

    Raises:
      UserError: there is no such file, or it describes something unsupported.
    """
    return _read_config(Path(path))[1]


def load(
    path: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """A model from a Hugging Face folder: config.json and safetensors, in one file or many with an index.

    Tensors are read one at a time and go straight to where they will live, so that the host holds one
    of them at most (and a copy of it where it is transposed).

    Args:
      dtype: of parameters and computation; that of the embedding in the files by default.
      mesh: every parameter goes to where `distributed.tree_shardings` puts it; the default device holds
        everything by default.

    Returns:
      (config, params), layers unrolled (`models.stack_layers` stacks them).

    Raises:
      UserError: the architecture is not supported, or a file or tensor is missing, superfluous, of another
        shape or dtype, malformed or truncated.
    """
    folder = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}: choose one of them.")
    family, config = _read_config(folder)
    checkpoint = Checkpoint(folder)
    rules = _rules_by_stored_name(family, config, checkpoint)
    if dtype is None:
        embedding = next(name for name, rule in rules.items() if rule.params == ("embedding",))
        dtype = checkpoint.dtype(embedding)
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    wanted = named_leaves(shapes)
    shardings = named_leaves(tree_shardings(mesh, shapes)) if mesh is not None else {}
    placed: dict[str, jax.Array] = {}
    for name, tensor in checkpoint.read(set(rules)):
        rule = rules[name]
        for param, piece in _unpack(rule, tensor, wanted, f"{checkpoint.where(name)}: tensor `{name}`"):
            placed[param] = _place(piece, wanted[param], rule.slot, placed.get(param), shardings.get(param))
    return config, map_named(lambda name, _: placed[name], shapes)


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    path = folder / CONFIG
    data = read_json(path)
    if data.get("quantization_config") is not None:
        raise UserError(f"{path}: the checkpoint is quantised: choose one in bfloat16 or float32.")
    names = data.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    for family in FAMILIES:
        if architecture == family.architecture:
            config = family.read(Fields(data, path))
            return family, dataclasses.replace(config, architecture=architecture)
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{path}: architecture {architecture!r} is not supported: choose one of {known}.")


def _rules_by_stored_name(family: Family, config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The family's tensors by the name they have in this checkpoint; neither more nor fewer than it holds."""
    rules = {rule.name: rule for rule in family.tensors(config)}
    stored, prefix = checkpoint.names(), family.optional_prefix
    if not any(name.startswith(prefix) for name in stored):
        rules = {name.removeprefix(prefix): rule for name, rule in rules.items()}
    missing = sorted(rules.keys() - stored)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{checkpoint.folder}: tensor `{missing[0]}`{others} is in none of the safetensors files, though "
            f"{CONFIG} asks for it: download the folder again or mend {CONFIG}."
        )
    tied_copy = {"lm_head.weight"} if config.tied_embeddings else set()
    extra = sorted(n for n in stored - rules.keys() - tied_copy if not family.ignores(n, config))
    if extra:
        others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(
            f"{checkpoint.where(extra[0])}: tensor `{extra[0]}`{others} has no place in the architecture of "
            f"{CONFIG}: mend {CONFIG} or choose another checkpoint."
        )
    return rules


def _unpack(
    rule: Tensor, tensor: np.ndarray, wanted: Mapping[str, Any], where: str
) -> list[tuple[str, np.ndarray]]:
    """The parameters in a tensor, each of the right shape."""
    shapes = [wanted[param].shape[0 if rule.slot is None else 1 :] for param in rule.params]
    try:
        pieces = rule.layout.unpack(tensor)
    except (ValueError, IndexError):
        pieces = []
    if [piece.shape for piece in pieces] != shapes:
        # Broadcast zeros cost nothing, and packing them says what the tensor should have looked like.
        expected = rule.layout.pack([np.broadcast_to(np.zeros((), bool), shape) for shape in shapes]).shape
        raise UserError(
            f"{where} has shape {list(tensor.shape)}, and {CONFIG} asks for {list(expected)}: mend it or "
            "choose another checkpoint."
        )
    return list(zip(rule.params, pieces, strict=True))


def _place(
    piece: np.ndarray,
    wanted: jax.ShapeDtypeStruct,
    slot: int | None,
    stack: jax.Array | None,
    sharding: NamedSharding | None,
) -> jax.Array:
    """The parameter on its devices: the piece itself, or `stack` with the piece in its slot."""
    if slot is None:
        return _put(piece, wanted.dtype, sharding)
    if stack is None:
        stack = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    of_piece = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return _write_slot(stack, _put(piece, wanted.dtype, of_piece), slot, sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write_slot(stack: jax.Array, piece: jax.Array, slot: int, sharding: NamedSharding | None) -> jax.Array:
    stack = stack.at[slot].set(piece)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


def _put(piece: np.ndarray, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(piece).astype(dtype)
    return jax.make_array_from_callback(piece.shape, sharding, lambda index: piece[index].astype(dtype))


# Out -----------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: SavesItself | None = None,
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers and vLLM load, in the family `config.architecture`, or in the first
    that can express the config where it names none.

    Args:
      tokenizer: written beside the weights; its special ids go into config.json.
      shard_bytes: how large a file may be, a single tensor apart.

    Raises:
      UserError: no family has these parts, or the folder cannot be written.
    """
    folder = Path(path)
    if [name for name in named_leaves(params) if is_adapter_leaf(name)]:
        raise UserError(
            "The model has an adapter, for which no Hugging Face model has a place: merge it first "
            "(`adapters.merge_adapter`), which prefixes, prompts and bottlenecks cannot be."
        )
    family = family_of(config)
    if config.scan_layers:
        params = unstack_layers(config, params)
    leaves = named_leaves(params)
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": config.param_dtype,
        **family.write(config),
        **_special_ids(tokenizer),
    }
    try:
        writer = Writer(folder, shard_bytes=shard_bytes)
        try:
            for rule in family.tensors(config):
                slot = () if rule.slot is None else rule.slot
                pieces = [np.asarray(jax.device_get(leaves[param][slot])) for param in rule.params]
                writer.add(rule.name, rule.layout.pack(pieces))
            total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
            writer.finish(fields, total_size=total)
        finally:
            writer.discard()
        if tokenizer is not None:
            tokenizer.save(folder)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: cannot be written ({reason}): make room or choose another folder."
        ) from error


def _special_ids(tokenizer: SavesItself | None) -> dict[str, int | None]:
    if tokenizer is None:  # said outright: each family has defaults, which may lie outside the vocabulary
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def family_of(config: ModelConfig) -> Family:
    """The family that a model is saved in.

    Raises:
      UserError: there is none with its parts.
    """
    named = [family for family in FAMILIES if family.architecture == config.architecture]
    for family in named or FAMILIES:
        if _expresses(family, config):
            return family
    what = f"{config.architecture} has" if named else "no supported Hugging Face family has"
    raise UserError(
        f"The model cannot be saved for others: {what} exactly these parts: save it with "
        "`rlhf_jax.checkpoint`, or change the config."
    )


def _expresses(family: Family, config: ModelConfig) -> bool:
    """Whether config.json would bring back the same function: every field is tried, not only known ones."""
    try:
        read = family.read(Fields(family.write(config), Path(CONFIG)))
    except (InexpressibleError, UserError):
        return False
    return _function(read) == _function(config)


def _function(config: ModelConfig) -> ModelConfig:
    """The config without what changes only how the function is computed, trained or stored."""
    return ModelConfig(
        **{
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
            "prefix": (),
            "pattern": config.blocks,
            "param_dtype": "float32",
            "compute_dtype": "float32",
            "scan_layers": False,
            "remat": "none",
            "attention_backend": "auto",
            "architecture": "",
            "further_depth": 0,  # of training alone; their parameters are not written
        }
    )
