"""Hugging Face checkpoints in and out. A family is one file here, of a config's fields and tensors' names."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
import safetensors
from jax.sharding import Mesh

from rlhf_jax.core.errors import UserError, error_summary
from rlhf_jax.core.files import as_local, disk_errors
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.core.types import Params
from rlhf_jax.models.adapters import is_adapter_leaf
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import unstack_layers
from rlhf_jax.models.hf import bloom, deepseek, gemma, gpt2, idefics3, llama, mistral, olmo, phi, qwen
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.files import CONFIG, Checkpoint, Writer, read_json
from rlhf_jax.models.hf.mapping import Family, InexpressibleError, Tensor, packed_shape
from rlhf_jax.models.hf.reading import read_params, stored_name
from rlhf_jax.models.reconfiguring import check_dtype

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
    gpt2.GPT1,
    olmo.OLMO2,
    phi.PHI3,
    bloom.BLOOM,
    deepseek.V2,
    deepseek.V3,
    idefics3.IDEFICS3,
    idefics3.SMOLVLM,
)


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
    return _read_config(as_local(path, "a Hugging Face folder is read"))[1]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
) -> tuple[ModelConfig, Params]:
    """A model from a Hugging Face folder: config.json and safetensors, in one file or many with an index.

    Tensors are read one at a time and go straight to where they will live, so that the host holds one
    of them at most (and a copy of it where it is transposed).

    Args:
      dtype: of parameters and computation; that of the embedding in the files by default.
      mesh: every parameter goes to where `distributed.tree_shardings` puts it; the default device holds
        everything by default.
      scan_layers: whether layers are stacked; they are read straight into their places.

    Returns:
      (config, params)

    Raises:
      UserError: the architecture is not supported, or a file or tensor is missing, superfluous, of another
        shape or dtype, malformed or truncated.
    """
    folder = as_local(path, "a Hugging Face folder is read")
    check_dtype("dtype", dtype)
    family, config = _read_config(folder)
    checkpoint = Checkpoint(folder)
    if dtype is None:
        dtype = checkpoint.dtype(stored_name(family, config, checkpoint, "embedding"))
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype, scan_layers=scan_layers)
    return config, read_params(family, config, checkpoint, mesh=mesh)


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    path = folder / CONFIG
    data = read_json(path)
    if data.get("quantization_config") is not None:
        raise UserError(f"{path}: the checkpoint is quantised: choose one in bfloat16 or float32.")
    names = data.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    for family in FAMILIES:
        if architecture == family.architecture:
            try:
                config = family.read(Fields(data, path))
            # Of a field that holds something else than every file of the family does.
            except (TypeError, ValueError, OverflowError, AttributeError, KeyError, IndexError) as error:
                raise UserError(
                    f"{path}: a field does not hold what the architecture needs ({error_summary(error)}): "
                    "download the file again"
                ) from error
            return family, dataclasses.replace(config, architecture=architecture)
    known = ", ".join(family.architecture for family in FAMILIES)
    if architecture is None:
        raise UserError(f"{path}: names no architecture: choose the folder of a published model.")
    raise UserError(f"{path}: architecture {architecture!r} is not supported: choose one of {known}.")


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
    folder = as_local(path, "a Hugging Face folder is written")
    check_whole(params)
    family = family_of(config)
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": config.param_dtype,
        **family.write(config),
        **_special_ids(tokenizer),
    }
    try:
        with disk_errors(folder):
            writer = Writer(folder, shard_bytes=shard_bytes)
            try:
                for packed in packed_tensors(family, config, params):
                    writer.add(packed.name, packed.read())
                total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
                writer.finish(fields, total_size=total)
            finally:
                writer.discard()
            if tokenizer is not None:
                tokenizer.save(folder)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{folder}: cannot be written ({error}): make room or choose another folder"
        ) from error


def check_whole(params: Params) -> None:
    """Raises: UserError where parameters have an adapter beside them."""
    if [name for name in named_leaves(params) if is_adapter_leaf(name)]:
        raise UserError(
            "The model has an adapter, for which no Hugging Face model has a place, nor a GGUF file: merge "
            "it first (`adapters.merge_adapter`), which prefixes, prompts and bottlenecks cannot be."
        )


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor of a checkpoint that is to be written.

    Attributes:
      name: as the family's files have it.
      shape: of it.
      read: its content, from the devices.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def packed_tensors(family: Family, config: ModelConfig, params: Params) -> Iterator[Packed]:
    """The tensors of a family's files that hold these parameters."""
    if config.scan_layers:
        params = unstack_layers(config, params)
    leaves = named_leaves(params)

    def read(rule: Tensor) -> np.ndarray:
        slot = () if rule.slot is None else rule.slot
        return rule.layout.pack([np.asarray(jax.device_get(leaves[param][slot])) for param in rule.params])

    for rule in family.tensors(config):
        shapes = [leaves[param].shape[rule.slot is not None :] for param in rule.params]
        yield Packed(rule.name, packed_shape(rule, shapes), functools.partial(read, rule))


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
        if expresses(family, config):
            return family
    what = f"{config.architecture} has" if named else "no supported Hugging Face family has"
    raise UserError(
        f"The model cannot be saved for others: {what} exactly these parts: save it with "
        "`rlhf_jax.checkpoint`, or change the config."
    )


def expresses(family: Family, config: ModelConfig) -> bool:
    """True where config.json would bring back the same function: all fields are tried, not only known."""
    try:
        read = family.read(Fields(family.write(config), Path(CONFIG)))
    except (InexpressibleError, UserError):
        return False
    return function_of(read) == function_of(config)


def function_of(config: ModelConfig) -> ModelConfig:
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
            "mtp_depth": 0,  # of training alone; their parameters are not written
        }
    )
