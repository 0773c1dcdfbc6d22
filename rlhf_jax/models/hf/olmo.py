"""OLMo 2: norms after attention and feed-forward, queries and keys normed over their whole width."""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.models.config import Attention, Block, GatedFeedForward, ModelConfig
from rlhf_jax.models.hf import common, llama
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family, Tensor, named_blocks, norm


def read(fields: Fields) -> ModelConfig:
    """config.json of an OLMo 2."""
    rms, bias = common.read_norm(fields, default=1e-5), fields.flag("attention_bias", default=False)
    attention = common.read_attention(fields, bias=bias, output_bias=bias, qk_norm=rms, qk_norm_whole=True)
    block = Block(attention, common.read_gated(fields), rms, pre_norm=False, post_norm=True)
    return common.read_model(fields, block, tie_word_embeddings=False)


def write(config: ModelConfig) -> dict[str, Any]:
    """config.json of an OLMo 2."""
    return llama.write_llama(config)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"model.layers.{index}"
        yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}attention_post_norm")
        yield from norm(f"{theirs}.post_feedforward_layernorm", f"{ours}feed_forward_post_norm")
        attention = common.part(block.attention, Attention)
        yield from common.attention_tensors(f"{theirs}.self_attn", f"{ours}attention", attention)
        feed_forward = common.part(block.feed_forward, GatedFeedForward)
        yield from common.gated_tensors(f"{theirs}.mlp", f"{ours}feed_forward", feed_forward)


OLMO2 = Family("Olmo2ForCausalLM", "olmo2", read, write, tensors)
