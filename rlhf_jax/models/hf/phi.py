"""Phi-3: queries, keys and values in one tensor, gate and up in another; split on the way in."""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.models.config import Attention, Block, GatedFeedForward, ModelConfig
from rlhf_jax.models.hf import common, mistral
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family, Tensor, linear, named_blocks, rows


def read(fields: Fields) -> ModelConfig:
    """config.json of a Phi-3."""
    attention = common.read_attention(fields, window=common.read_window(fields))
    block = Block(attention, common.read_gated(fields), common.read_norm(fields, default=1e-5))
    return common.read_model(fields, block, tie_word_embeddings=False)


def write(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Phi-3."""
    return mistral.write_mistral(config)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"model.layers.{index}"
        attention = common.part(block.attention, Attention)
        hidden = common.part(block.feed_forward, GatedFeedForward).intermediate_size
        widths = [
            heads * attention.head_dim for heads in (attention.num_heads, *[attention.num_kv_heads] * 2)
        ]
        yield from common.pre_norms(theirs, ours)
        kernels = tuple(f"{ours}attention/{name}/kernel" for name in ("query", "key", "value"))
        yield Tensor(f"{theirs}.self_attn.qkv_proj.weight", kernels, rows(*widths))
        yield from linear(f"{theirs}.self_attn.o_proj", f"{ours}attention/output")
        kernels = tuple(f"{ours}feed_forward/{name}/kernel" for name in ("gate", "up"))
        yield Tensor(f"{theirs}.mlp.gate_up_proj.weight", kernels, rows(hidden, hidden))
        yield from linear(f"{theirs}.mlp.down_proj", f"{ours}feed_forward/down")


PHI3 = Family("Phi3ForCausalLM", "phi3", read, write, tensors)
