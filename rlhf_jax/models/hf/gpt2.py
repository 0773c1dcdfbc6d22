"""GPT-2: learned positions, LayerNorm, biases, matrices that stand as [in, out] already."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_jax.models.config import Attention, Block, FeedForward, LayerNorm, ModelConfig
from rlhf_jax.models.hf import common
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import SAME, Family, Layout, Tensor, linear, named_blocks, norm

THREE = Layout(lambda tensor: np.split(tensor, 3, axis=-1), lambda params: np.concatenate(params, axis=-1))
MASK_BUFFERS = re.compile(r".*\bh\.\d+\.attn\.(masked_)?bias")


def read(fields: Fields) -> ModelConfig:
    """config.json of a GPT-2."""
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("scale_attn_weights", True)
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    activation = common.read_activation(fields, "activation_function", default="gelu_new")
    norm = LayerNorm(fields.number("layer_norm_epsilon", default=1e-5))
    attention = Attention(heads, heads, width // heads, None, bias=True, output_bias=True)
    feed_forward = FeedForward(fields.integer("n_inner", default=4 * width), activation)
    positions = fields.integer("n_positions", default=1024)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=fields.integer("n_layer"),
        pattern=(Block(attention, feed_forward, norm),),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=True),
        final_norm=norm,
        learned_positions=positions,
        context_length=positions,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """config.json of a GPT-2."""
    block = common.same_blocks(config)
    feed_forward = common.part(block.feed_forward, FeedForward)
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": common.part(block.attention, Attention).num_heads,
        "n_inner": feed_forward.intermediate_size,
        "n_positions": config.learned_positions,
        "activation_function": common.ACTIVATION_NAMES[feed_forward.activation],
        "layer_norm_epsilon": common.part(block.norm, LayerNorm).epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield Tensor("transformer.wte.weight", ("embedding",), SAME)
    yield Tensor("transformer.wpe.weight", ("position_embedding",), SAME)
    yield from norm("transformer.ln_f", "final_norm", bias=True)
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("unembedding",), SAME)
    for index, (ours, _) in enumerate(named_blocks(config)):
        theirs = f"transformer.h.{index}"
        yield from norm(f"{theirs}.ln_1", f"{ours}attention_norm", bias=True)
        yield from norm(f"{theirs}.ln_2", f"{ours}feed_forward_norm", bias=True)
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            ours_three = tuple(f"{ours}attention/{part}/{leaf}" for part in ("query", "key", "value"))
            yield Tensor(f"{theirs}.attn.c_attn.{name}", ours_three, THREE)
        yield from linear(f"{theirs}.attn.c_proj", f"{ours}attention/output", bias=True, layout=SAME)
        yield from linear(f"{theirs}.mlp.c_fc", f"{ours}feed_forward/up", bias=True, layout=SAME)
        yield from linear(f"{theirs}.mlp.c_proj", f"{ours}feed_forward/down", bias=True, layout=SAME)


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    read,
    write,
    tensors,
    optional_prefix="transformer.",
    ignores=lambda name, config: MASK_BUFFERS.fullmatch(name) is not None,
)
