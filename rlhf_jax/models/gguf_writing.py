"""Decoders into GGUF files, for llama.cpp and what is built on it (Ollama, LM Studio).

What `gguf.py` reads is written: before a byte is, the metadata are read as it would read them, and a model
that would come back as another function is refused. Matrices get the type that is asked for, vectors stay
float32, as in llama.cpp's own files.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.config import Attention, ModelConfig
from rlhf_jax.models.gguf import (
    ARCHITECTURES,
    ROPE_FACTORS,
    as_config_json,
    as_meant,
    import_gguf,
    numbers_of,
    rope_factors,
    rotated_heads,
    side_by_side,
    stored_transposed,
    tensor_names,
)
from rlhf_jax.models.gguf_vocabulary import metadata_of
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family
from rlhf_jax.models.positions import Llama3Scaling, Rope

Outtype = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
"""Type of the matrices; the name is that of llama.cpp's converter."""

FLOATS = (
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_local_base_freq",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Fields whose numbers are no counts."""
FILE_TYPES = {"f32": "ALL_F32"}  # all others are MOSTLY_ something
QUANTIZATION_VERSION = 2
LARGEST_F16 = 65504.0
CONTEXT_LENGTH = 2048
"""Of a model that names none; llama.cpp asks for one, and it bounds what a user may ask for by default."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor as the file has it.

    Attributes:
      name: in GGUF.
      shape: the longest stride first.
      kind: member of `gguf.GGMLQuantizationType`.
      read: its content in float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], np.ndarray]


def save(
    path: files.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    outtype: Outtype = "f16",
) -> None:
    """Writes a model with its tokenizer and chat template as one GGUF file, whole or not at all.

    Args:
      path: of the file, which is replaced where it is there.
      outtype: of the matrices. With `q4_0` and `q4_1` the embedding and the output matrix are Q8_0; a matrix
        whose rows are no whole number of blocks is F16 in a quantized file.

    Raises:
      UserError: GGUF has no place for a part of the model or its tokenizer, the package `gguf` is not
        installed, or the file cannot be written.
    """
    gguf = import_gguf(path)
    where = files.as_local(path, "a GGUF file is written")
    if outtype not in get_args(Outtype):
        raise UserError(f"outtype={outtype!r} is unknown: choose one of {', '.join(get_args(Outtype))}")
    hf.check_whole(params)
    config = dataclasses.replace(config, context_length=config.context_length or CONTEXT_LENGTH)
    architecture, family = _architecture(config, where)
    fields = family.write(config)
    parts = list(_parts(gguf, architecture, family, config, params, fields, outtype))
    metadata = _metadata(architecture, fields)
    _check_read_back(architecture, family, config, metadata, parts, where)
    vocabulary = metadata_of(tokenizer, config.vocab_size, str(where))
    with files.writing(where) as local:
        writer = gguf.GGUFWriter(local, architecture)
        try:
            _describe(gguf, writer, where, outtype)
            _add_values(gguf, writer, metadata)
            _add_values(gguf, writer, {f"tokenizer.{name}": value for name, value in vocabulary.items()})
            _write_tensors(gguf, writer, parts, where)
        finally:
            writer.close()


def _architecture(config: ModelConfig, where: Path) -> tuple[str, Family]:
    """GGUF's architecture of a model, and its family of names; or those of one that computes the same."""
    families = {family.architecture: family for family in hf.FAMILIES}
    found = {theirs: families[name] for theirs, name in ARCHITECTURES.items()}
    own = {theirs: family for theirs, family in found.items() if family.architecture == config.architecture}
    for theirs, family in (own or found).items():
        if hf.expresses(family, config):
            return theirs, family
    raise UserError(
        f"{where}: {config.architecture or 'the model'} has parts that no GGUF file of {', '.join(found)} "
        "has a place for: save a Hugging Face folder, whose path does not end in .gguf"
    )


# Metadata ------------------------------------------------------------------------------------------


def _metadata(architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of config.json by their names in GGUF."""
    values: dict[str, Any] = {}
    for ours, theirs in numbers_of(architecture).items():
        if fields.get(ours) is not None:
            number = fields[ours]
            values[theirs] = float(number) if ours in FLOATS else int(number)
    if head_dim := fields.get("head_dim"):
        values["attention.value_length"] = head_dim
        values["rope.dimension_count"] = round(head_dim * fields.get("partial_rotary_factor", 1))
    values["vocab_size"] = fields["vocab_size"]
    scaling = fields.get("rope_scaling") or {}
    if scaling.get("rope_type") not in (None, "llama3"):
        values["rope.scaling.type"] = scaling["rope_type"]
        values["rope.scaling.factor"] = float(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        values["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _check_read_back(
    architecture: str,
    family: Family,
    config: ModelConfig,
    metadata: Mapping[str, Any],
    parts: Sequence[Part],
    where: Path,
) -> None:
    """Raises: UserError where the file would be read as another function."""
    factors = [part.read() for part in parts if part.name == ROPE_FACTORS]
    data = as_config_json(
        architecture,
        lambda name: as_meant(metadata.get(name)),
        {part.name: part.shape for part in parts},
        factors[0] if factors else None,
        where,
    )
    read = hf.function_of(family.read(Fields(data, where)))
    if difference := next(_differences(hf.function_of(config), read), None):
        raise UserError(
            f"{where}: GGUF's {architecture} has no place for {difference}: save a Hugging Face folder, "
            "whose path does not end in .gguf"
        )


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """What of a config is another: its path, and its value here and there."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            pair = getattr(ours, field.name), getattr(theirs, field.name)
            yield from _differences(*pair, f"{name}.{field.name}".lstrip("."))
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{name}[{index}]")
    elif ours != theirs:
        yield f"{name}={ours!r} (a reader would take {theirs!r})"


def _describe(gguf: Any, writer: Any, where: Path, outtype: Outtype) -> None:
    writer.add_type("model")
    writer.add_name(where.stem)
    kind = FILE_TYPES.get(outtype) or f"MOSTLY_{outtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _add_values(gguf: Any, writer: Any, values: Mapping[str, Any]) -> None:
    """Numbers in the types that llama.cpp asks for: counts and ids as uint32, the others as float32."""
    kinds = gguf.GGUFValueType
    for name, value in values.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case str():
                writer.add_string(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case [float(), *_]:
                writer.add_key_value(name, value, kinds.ARRAY, sub_type=kinds.FLOAT32)
            case _:
                writer.add_array(name, value)


# Tensors -------------------------------------------------------------------------------------------


def _parts(
    gguf: Any,
    architecture: str,
    family: Family,
    config: ModelConfig,
    params: Params,
    fields: Mapping[str, Any],
    outtype: Outtype,
) -> Iterator[Part]:
    kinds = gguf.GGMLQuantizationType
    attention = config.blocks[0].attention
    assert isinstance(attention, Attention)
    position = attention.position
    if isinstance(position, Rope) and isinstance(position.scaling, Llama3Scaling):
        factors = rope_factors(position, attention.head_dim)
        yield Part(ROPE_FACTORS, factors.shape, kinds.F32, lambda: factors)
    theirs = tensor_names(gguf, architecture, family, config)
    for packed in hf.packed_tensors(family, config, params):
        name = theirs[packed.name]
        heads = fields.get(rotated_heads(architecture, packed.name) or "")
        shape = packed.shape[::-1] if stored_transposed(architecture, packed.name) else packed.shape
        kind = kinds[_kind(gguf, name, shape, outtype)]
        yield Part(name, shape, kind, _reader(architecture, packed, heads))


def _reader(architecture: str, packed: hf.Packed, heads: int | None) -> Callable[[], np.ndarray]:
    """The tensor as llama.cpp has it."""
    offset = architecture.startswith("gemma") and packed.name.endswith("norm.weight")
    transposed = stored_transposed(architecture, packed.name)

    def read() -> np.ndarray:
        tensor = packed.read().astype(np.float32)
        if heads is not None:
            tensor = side_by_side(tensor, heads)
        if transposed:
            tensor = tensor.T
        return np.ascontiguousarray(tensor + 1 if offset else tensor)

    return read


def _kind(gguf: Any, name: str, shape: Sequence[int], outtype: Outtype) -> str:
    if len(shape) == 1:
        return "F32"
    kind = outtype.upper()
    if kind.startswith("Q4") and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return kind if shape[-1] % block == 0 else "F16"


def _write_tensors(gguf: Any, writer: Any, parts: Sequence[Part], where: Path) -> None:
    """Tensors one after the other, so that one of them at most is in memory."""
    for part in parts:
        shape = gguf.quants.quant_shape_to_byte_shape(part.shape, part.kind)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), int(np.prod(shape)), part.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        tensor = part.read()
        if part.kind == gguf.GGMLQuantizationType.F16 and not np.abs(tensor).max() <= LARGEST_F16:
            raise UserError(
                f"{where}: tensor `{part.name}` holds numbers that F16 cannot ({np.abs(tensor).max():.3g}): "
                "choose outtype='bf16' or 'f32'"
            )
        writer.write_tensor_data(gguf.quantize(tensor, part.kind))
