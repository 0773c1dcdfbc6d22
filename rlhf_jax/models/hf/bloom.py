"""BLOOM: linear biases for positions, normed embeddings, queries, keys and values interleaved by head."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_jax.models.config import Attention, Block, FeedForward, LayerNorm, ModelConfig
from rlhf_jax.models.hf import common
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import SAME, Family, Tensor, linear, named_blocks, norm, permuted_rows
from rlhf_jax.models.positions import Alibi


def read(fields: Fields) -> ModelConfig:
    """config.json of a BLOOM."""
    from_norm = fields.flag("apply_residual_connection_post_layernorm", default=False)
    width, heads = fields.integer("hidden_size", "n_embed"), fields.integer("n_head", "num_attention_heads")
    norm = LayerNorm(fields.number("layer_norm_epsilon", default=1e-5))
    attention = Attention(heads, heads, width // heads, Alibi(), bias=True, output_bias=True)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=fields.integer("n_layer", "num_hidden_layers"),
        pattern=(Block(attention, FeedForward(4 * width, "gelu_tanh"), norm, residual_from_norm=from_norm),),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=True),
        final_norm=norm,
        embedding_norm=norm,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """config.json of a BLOOM."""
    block = common.same_blocks(config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "n_layer": config.num_layers,
        "n_head": common.part(block.attention, Attention).num_heads,
        "layer_norm_epsilon": common.part(block.norm, LayerNorm).epsilon,
        "apply_residual_connection_post_layernorm": block.residual_from_norm,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield Tensor("transformer.word_embeddings.weight", ("embedding",), SAME)
    yield from norm("transformer.word_embeddings_layernorm", "embedding_norm", bias=True)
    yield from norm("transformer.ln_f", "final_norm", bias=True)
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("unembedding",), SAME)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"transformer.h.{index}"
        heads = common.part(block.attention, Attention).num_heads
        # Their rows stand as [head, (query, key, value), dimension]; ours as [(query, key, value), ...].
        order = np.arange(3 * config.width).reshape(heads, 3, -1).transpose(1, 0, 2).reshape(-1)
        yield from norm(f"{theirs}.input_layernorm", f"{ours}attention_norm", bias=True)
        yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}feed_forward_norm", bias=True)
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            ours_three = tuple(f"{ours}attention/{part}/{leaf}" for part in ("query", "key", "value"))
            layout = permuted_rows(order, *[config.width] * 3)
            yield Tensor(f"{theirs}.self_attention.query_key_value.{name}", ours_three, layout)
        yield from linear(f"{theirs}.self_attention.dense", f"{ours}attention/output", bias=True)
        yield from linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}feed_forward/up", bias=True)
        yield from linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}feed_forward/down", bias=True)


BLOOM = Family("BloomForCausalLM", "bloom", read, write, tensors, optional_prefix="transformer.")
