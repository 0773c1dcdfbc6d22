"""Shapes of published decoders, for plans and benchmarks that need no weights."""

from typing import Any, Literal

from rlhf_jax.models.config import ModelConfig, dense_config

Preset = Literal["llama-1b", "llama-8b", "llama-70b"]

_LLAMA: dict[str, dict[str, Any]] = {
    "llama-1b": {"width": 2048, "num_layers": 16, "num_heads": 32, "intermediate_size": 8192},
    "llama-8b": {"width": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 14_336},
    "llama-70b": {"width": 8192, "num_layers": 80, "num_heads": 64, "intermediate_size": 28_672},
}


def preset_config(preset: Preset, **options: Any) -> ModelConfig:
    """Llama 3.2 1B, Llama 3.1 8B or 70B (Grattafiori et al. 2024, table 3), by shape.

    Args:
      options: further fields of `ModelConfig`.
    """
    shape = {"vocab_size": 128_256, "num_kv_heads": 8, "theta": 500_000.0, **_LLAMA[preset]}
    return dense_config(**shape, tie_word_embeddings=preset == "llama-1b", **options)
