"""GGUF files, quantised or not, into decoders: the families of `models.hf` under the names of llama.cpp.

Tensors come out of their blocks as float32. Three families are stored otherwise than Hugging Face has them:
rotated pairs of a Llama stand side by side rather than half a head apart, the scales of Gemma's norms include
the 1 that is added to them, and the matrices of GPT-2's layers are [out, in] as all others are.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf import FAMILIES
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family
from rlhf_jax.models.positions import Llama3Scaling, Rope, rotary_frequencies

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""GGUF's name of an architecture -> that of Hugging Face."""

ROPE_FACTORS = "rope_freqs.weight"
NUMBERS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GPT2_NUMBERS = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "n_positions": "context_length",
}
# Layers of the two Gemmas whose logits are scaled by the width of a head as if heads filled the model.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def import_gguf(path: files.PathLike) -> Any:
    """The package `gguf`, which is an extra; a `UserError` about `path` where it is not there."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: GGUF needs the package `gguf`: pip install rlhf_jax[gguf].") from error
    return gguf


@contextlib.contextmanager
def whole_gguf(path: files.PathLike) -> Iterator[None]:
    """Errors of reading a damaged file as a `UserError` about `path`.

    Lengths, types and texts stand in the file as they are: where a bit is wrong, the package raises a dozen
    kinds of exceptions, of NumPy's and of its own.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a whole GGUF file ({reason}): download it again.") from error


def bounded_reader(gguf: Any) -> Any:
    """The package's reader, which ends where the file does: it would read 2^40 elements of nothing."""

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, **order: Any) -> np.ndarray:
            needed = int(offset) + np.dtype(dtype).itemsize * int(count)
            if needed > len(self.data):
                raise ValueError(f"it has {len(self.data)} bytes and announces {needed}")
            return super()._get(offset, dtype, count, **order)

    return BoundedReader


class GgufFile:
    """The metadata and tensors of a GGUF file; tensors are read when they are asked for.

    Args:
      path: the file.

    Raises:
      UserError: it is missing or damaged, or the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        gguf = import_gguf(path)
        self.folder = path = files.as_local(path, "a GGUF file is read")
        self._gguf = gguf
        with whole_gguf(path):
            self._reader = bounded_reader(gguf)(path)
        self._stored: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {self.architecture!r} is not supported in GGUF: choose one of "
                f"{', '.join(ARCHITECTURES)}, or the Hugging Face folder of the model."
            )
        name = ARCHITECTURES[self.architecture]
        self.family: Family = next(family for family in FAMILIES if family.architecture == name)
        self._theirs: dict[str, str] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self._reader.get_field(name)
        return as_meant(default if field is None else field.contents())

    def config(self) -> ModelConfig:
        """The architecture that the metadata describes, in float32.

        Raises:
          UserError: something in it is missing or unsupported.
        """
        layers = self.get(f"{self.architecture}.block_count")
        if isinstance(layers, int) and layers > len(self._stored):
            raise UserError(
                f"{self.folder}: not a whole GGUF file (it announces {layers} layers and holds "
                f"{len(self._stored)} tensors): download it again."
            )
        config = self.family.read(Fields(self._described(), self.folder))
        return self._named(dataclasses.replace(config, architecture=self.family.architecture))

    def tokenizer_metadata(self) -> dict[str, Any]:
        """Metadata of the tokenizer: keys that begin with `tokenizer.`, by the name behind it."""
        names = [name for name in self._reader.fields if name.startswith("tokenizer.")]
        return {name.removeprefix("tokenizer."): self.get(name) for name in names}

    def names(self) -> set[str]:
        """The names of all tensors, as the family's files have them."""
        ours = {theirs: name for name, theirs in self._theirs.items()}
        return {ours.get(name, name) for name in self._stored if name != ROPE_FACTORS}

    def where(self, name: str) -> str:
        """File that holds the tensor, for messages."""
        return str(self.folder)

    def read(self, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These tensors, one at a time, as float32 and as Hugging Face has them.

        Raises:
          UserError: a tensor is quantised in a way that `gguf` cannot undo.
        """
        for name in sorted(names):
            stored = self._stored[self._theirs[name]]
            try:
                tensor = self._gguf.dequantize(stored.data, stored.tensor_type)
            except (NotImplementedError, ValueError, self._gguf.quants.QuantError) as error:
                raise UserError(
                    f"{self.folder}: tensor `{stored.name}` is {stored.tensor_type.name}, which cannot be "
                    f"read ({error}): choose a file in Q8_0, F16 or BF16."
                ) from error
            # A copy: what is read as it stands is a view of the file.
            yield name, self._as_hugging_face(name, np.array(tensor, np.float32))

    def stored(self, name: str) -> tuple[str, np.ndarray]:
        """(kind, content) of a tensor as the file has it, its rows in the order of Hugging Face."""
        stored = self._stored[self._theirs[name]]
        heads, content = rotated_heads(self.architecture, name), np.asarray(stored.data)
        rows = content if heads is None else halves_apart(content, self._described()[heads])
        return stored.tensor_type.name, rows

    def _named(self, config: ModelConfig) -> ModelConfig:
        """Notes where the tensors of this architecture are."""
        self._theirs = tensor_names(self._gguf, self.architecture, self.family, config)
        return config

    def _as_hugging_face(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return tensor - 1
        if stored_transposed(self.architecture, name):
            return tensor.T
        heads = rotated_heads(self.architecture, name)
        return tensor if heads is None else halves_apart(tensor, self._described()[heads])

    def _described(self) -> dict[str, Any]:
        factors = self._stored.get(ROPE_FACTORS)
        return as_config_json(
            self.architecture,
            self.get,
            {name: stored.shape[::-1] for name, stored in self._stored.items()},
            None if factors is None else np.asarray(factors.data, np.float32),
            self.folder,
        )


def as_meant(value: Any) -> Any:
    """A float32 as the decimal that was meant by it: 1e-05 rather than 9.999999747378752e-06."""
    return float(f"{np.float32(value):.7g}") if isinstance(value, float) else value


def tensor_names(gguf: Any, architecture: str, family: Family, config: ModelConfig) -> dict[str, str]:
    """Names of tensors in GGUF by those that the family's files have."""
    index = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(index, config.num_layers)
    found = {
        rule.name: names.get_name(rule.name, try_suffixes=(".weight", ".bias"))
        for rule in family.tensors(config)
    }
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def rotated_heads(architecture: str, name: str) -> str | None:
    """The field of config.json with the number of heads whose rows llama.cpp has in another order.

    Args:
      name: of a tensor, as Hugging Face has it; None is returned for those that stay as they are.
    """
    if architecture != "llama" or ".self_attn." not in name:
        return None
    return {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])


def stored_transposed(architecture: str, name: str) -> bool:
    """True for a tensor that stands as [out, in] in GGUF and as [in, out] with Hugging Face.

    Args:
      name: as Hugging Face has it.
    """
    return architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def numbers_of(architecture: str) -> dict[str, str]:
    """Fields of config.json that are numbers of the metadata, by their name behind `ARCHITECTURE.`."""
    return GPT2_NUMBERS if architecture == "gpt2" else NUMBERS


def as_config_json(
    architecture: str,
    get: Callable[[str], Any],
    shapes: Mapping[str, Sequence[int]],
    factors: np.ndarray | None,
    where: Path,
) -> dict[str, Any]:
    """The fields that config.json would have.

    Args:
      get: name -> value of the metadata, or None.
      shapes: of the tensors, the longest stride first.
      factors: by which frequencies are divided; None where no such tensor is there.
      where: the file, for messages.

    Raises:
      UserError: the rotary scaling is an unknown one.
    """
    data = {ours: get(f"{architecture}.{theirs}") for ours, theirs in numbers_of(architecture).items()}
    embedding = shapes.get("token_embd.weight")
    data["vocab_size"] = None if embedding is None else int(embedding[0])
    data["tie_word_embeddings"] = "output.weight" not in shapes
    if architecture == "gpt2":
        return data
    data["num_key_value_heads"] = data["num_key_value_heads"] or data["num_attention_heads"]
    data["attention_bias"] = "blk.0.attn_q.bias" in shapes
    data["sliding_window"] = data["sliding_window"] or None  # Phi-3 writes 0 for none
    data["partial_rotary_factor"] = _rotated_share(data, get(f"{architecture}.rope.dimension_count"))
    theta = data["rope_theta"] or 10_000.0
    if factors is not None:
        data["rope_scaling"] = _llama3_scaling(factors, theta, where)
    else:
        data["rope_scaling"] = _rope_scaling(lambda name: get(f"{architecture}.rope.scaling.{name}"))
    if architecture in GEMMA_27B:
        whole = data["num_hidden_layers"] == GEMMA_27B[architecture]
        data["query_pre_attn_scalar"] = (
            data["hidden_size"] // data["num_attention_heads"] if whole else data["head_dim"]
        )
    return data


def _rotated_share(data: Mapping[str, Any], rotated: Any) -> float | None:
    """Share of a head that rotary positions turn; None for all of it, or where the numbers are none."""
    width, heads, head_dim = (data[name] for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if not all(isinstance(number, int) and number > 0 for number in (width, heads, rotated)):
        return None
    head_dim = head_dim or width // heads
    return None if rotated == head_dim or not isinstance(head_dim, int) else rotated / head_dim


def _rope_scaling(get: Callable[[str], Any]) -> dict[str, Any] | None:
    if get("type") in (None, "none"):
        return None
    length = get("original_context_length")
    return {"rope_type": get("type"), "factor": get("factor"), "original_max_position_embeddings": length}


def _llama3_scaling(factors: np.ndarray, theta: float, where: Path) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, of which a file keeps only what becomes of each frequency."""
    scaling = Llama3Scaling(float(f"{factors.max():.6g}"), 1.0, 4.0, 8192)
    if not np.allclose(rope_factors(Rope(theta, scaling), 2 * len(factors)), factors, rtol=1e-3):
        raise UserError(
            f"{where}: `{ROPE_FACTORS}` is not the scaling of Llama 3.1, which alone is known: "
            "choose the Hugging Face folder of the model."
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def rope_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """[half] what the scaling divides each frequency by."""
    plain = rotary_frequencies(dataclasses.replace(rope, scaling=None), head_dim)
    return plain / rotary_frequencies(rope, head_dim)


def halves_apart(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection whose rotated pairs stand side by side, with the pairs half a head apart."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def side_by_side(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves_apart`."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
