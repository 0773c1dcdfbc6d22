"""Llama 2 and 3, Qwen 2, 2.5 and 3, Mistral: one shape with small differences."""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.models.config import Attention, Block, GatedFeedForward, ModelConfig
from rlhf_jax.models.hf import common
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family, Tensor, named_blocks


def read_llama(fields: Fields) -> ModelConfig:
    """config.json of a Llama."""
    bias = fields.flag("attention_bias", default=False)
    attention = common.read_attention(fields, bias=bias, output_bias=bias)
    feed_forward = common.read_gated(fields, bias=fields.flag("mlp_bias", default=False))
    return common.read_model(
        fields, Block(attention, feed_forward, common.read_norm(fields)), tie_word_embeddings=False
    )


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Fields that all of them have, and Llama's flags for biases."""
    block = common.same_blocks(config)
    attention = common.part(block.attention, Attention)
    feed_forward = common.part(block.feed_forward, GatedFeedForward)
    return {
        **common.write_model(config),
        **common.write_attention(attention),
        "intermediate_size": feed_forward.intermediate_size,
        "hidden_act": common.ACTIVATION_NAMES[feed_forward.activation],
        "attention_bias": attention.bias,
        "mlp_bias": feed_forward.bias,
    }


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"model.layers.{index}"
        attention = common.part(block.attention, Attention)
        feed_forward = common.part(block.feed_forward, GatedFeedForward)
        yield from common.pre_norms(theirs, ours)
        yield from common.attention_tensors(f"{theirs}.self_attn", f"{ours}attention", attention)
        yield from common.gated_tensors(f"{theirs}.mlp", f"{ours}feed_forward", feed_forward)


LLAMA = Family("LlamaForCausalLM", "llama", read_llama, write_llama, tensors)
