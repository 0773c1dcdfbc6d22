"""GGUF files, quantised or not, into decoders: the families of `models.hf` under the names of llama.cpp.

Tensors come out of their blocks as float32. Two families are stored otherwise than Hugging Face has them:
rotated pairs of a Llama stand side by side rather than half a head apart, and the scales of Gemma's norms
include the 1 that is added to them.
"""

import dataclasses
from collections.abc import Iterator
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
}
"""GGUF's name of an architecture -> that of Hugging Face."""

ROPE_FACTORS = "rope_freqs.weight"
# Fields of config.json that are numbers of the metadata, by their name behind `ARCHITECTURE.`.
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
# Layers of the two Gemmas whose logits are scaled by the width of a head as if heads filled the model.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


class GgufFile:
    """The metadata and tensors of a GGUF file; tensors are read when they are asked for.

    Args:
      path: the file.

    Raises:
      UserError: it is missing or damaged, or the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UserError(f"{path}: GGUF needs the package `gguf`: pip install rlhf_jax[gguf].") from error
        self.folder = path = files.as_local(path, "a GGUF file is read")
        self._gguf = gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path}: not a whole GGUF file ({error}): download it again.") from error
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
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
        value = default if field is None else field.contents()
        # A float32, as the decimal that was meant by it: 1e-05 rather than 9.999999747378752e-06.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def config(self) -> ModelConfig:
        """The architecture that the metadata describes, in float32.

        Raises:
          UserError: something in it is missing or unsupported.
        """
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

    def _named(self, config: ModelConfig) -> ModelConfig:
        """Notes where the tensors of this architecture are."""
        index = next(k for k, v in self._gguf.MODEL_ARCH_NAMES.items() if v == self.architecture)
        names = self._gguf.get_tensor_name_map(index, config.num_layers)
        for rule in self.family.tensors(config):
            theirs = names.get_name(rule.name, try_suffixes=(".weight", ".bias"))
            if theirs is not None:
                self._theirs[rule.name] = theirs
        return config

    def _as_hugging_face(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return tensor - 1
        if self.architecture == "llama" and ".self_attn." in name:
            kind = name.split(".")[-2]
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(kind)
            return tensor if heads is None else halves_apart(tensor, self._described()[heads])
        return tensor

    def _described(self) -> dict[str, Any]:
        """Fields as config.json would have them."""

        def number(name: str) -> Any:
            return self.get(f"{self.architecture}.{name}")

        embedding = self._stored.get("token_embd.weight")
        data = {ours: number(theirs) for ours, theirs in NUMBERS.items()}
        data["num_key_value_heads"] = data["num_key_value_heads"] or data["num_attention_heads"]
        data["vocab_size"] = None if embedding is None else int(embedding.shape[-1])
        data["tie_word_embeddings"] = "output.weight" not in self._stored
        data["attention_bias"] = "blk.0.attn_q.bias" in self._stored
        data["rope_scaling"] = self._rope_scaling(data)
        if self.architecture in GEMMA_27B:
            whole = data["num_hidden_layers"] == GEMMA_27B[self.architecture]
            data["query_pre_attn_scalar"] = (
                data["hidden_size"] // data["num_attention_heads"] if whole else data["head_dim"]
            )
        return data

    def _rope_scaling(self, data: dict[str, Any]) -> dict[str, Any] | None:
        kind = self.get(f"{self.architecture}.rope.scaling.type")
        if ROPE_FACTORS in self._stored:
            return self._llama3_scaling(data)
        if kind in (None, "none"):
            return None
        length = self.get(f"{self.architecture}.rope.scaling.original_context_length")
        factor = self.get(f"{self.architecture}.rope.scaling.factor")
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": length}

    def _llama3_scaling(self, data: dict[str, Any]) -> dict[str, Any]:
        """The scaling of Llama 3.1 and later, of which a file keeps only what becomes of each frequency."""
        stored = np.asarray(self._stored[ROPE_FACTORS].data, np.float32)
        scaling = Llama3Scaling(float(f"{stored.max():.6g}"), 1.0, 4.0, 8192)
        plain, scaled = (
            rotary_frequencies(Rope(data["rope_theta"] or 10_000.0, each), 2 * len(stored))
            for each in (None, scaling)
        )
        if not np.allclose(plain / scaled, stored, rtol=1e-3):
            raise UserError(
                f"{self.folder}: `{ROPE_FACTORS}` is not the scaling of Llama 3.1, which alone is known: "
                "choose the Hugging Face folder of the model."
            )
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }


def halves_apart(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection whose rotated pairs stand side by side, with the pairs half a head apart."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
