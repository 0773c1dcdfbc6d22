"""GPT-2 and GPT-1: learned positions, LayerNorm, biases, matrices that stand as [in, out] already.

GPT-1 norms what was added up, where GPT-2 norms what goes in.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_jax.models.config import Activation, Attention, Block, FeedForward, LayerNorm, ModelConfig
from rlhf_jax.models.hf import common
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import SAME, Family, Layout, Tensor, linear, named_blocks, norm

THREE = Layout(lambda tensor: np.split(tensor, 3, axis=-1), lambda params: np.concatenate(params, axis=-1))
MASK_BUFFERS = re.compile(r".*\bh\.\d+\.attn\.(masked_)?bias")


def read(fields: Fields) -> ModelConfig:
    """config.json of a GPT-2."""
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("scale_attn_weights", True)
    activation = common.read_activation(fields, "activation_function", default="gelu_new")
    norm = LayerNorm(fields.number("layer_norm_epsilon", default=1e-5))
    return _config(
        fields,
        _block(fields, activation, fields.integer("n_inner", default=4 * fields.integer("n_embd")), norm),
        positions=1024,
        final_norm=norm,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """config.json of a GPT-2."""
    feed_forward = common.part(common.same_blocks(config).feed_forward, FeedForward)
    return {
        **_written(config),
        "n_inner": feed_forward.intermediate_size,
        "activation_function": common.ACTIVATION_NAMES[feed_forward.activation],
    }


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint of a GPT-2."""
    yield Tensor("transformer.wte.weight", ("embedding",), SAME)
    yield Tensor("transformer.wpe.weight", ("position_embedding",), SAME)
    yield from norm("transformer.ln_f", "final_norm", bias=True)
    yield from _layers(config, "norm")


def read_first(fields: Fields) -> ModelConfig:
    """config.json of a GPT-1, whose `gelu` is the approximation by tanh."""
    if fields.get("afn") not in (None, "gelu"):
        raise fields.error("afn", f"is {fields.get('afn')!r}, and only gelu is supported")
    norm = LayerNorm(fields.number("layer_norm_epsilon", default=1e-5))
    block = _block(fields, "gelu_tanh", 4 * fields.integer("n_embd"), norm, pre_norm=False, sum_norm=True)
    return _config(fields, block, positions=512, final_norm=None)


def write_first(config: ModelConfig) -> dict[str, Any]:
    """config.json of a GPT-1."""
    return _written(config)


def tensors_first(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint of a GPT-1."""
    yield Tensor("transformer.tokens_embed.weight", ("embedding",), SAME)
    yield Tensor("transformer.positions_embed.weight", ("position_embedding",), SAME)
    yield from _layers(config, "sum_norm")


def _block(
    fields: Fields, activation: Activation, intermediate_size: int, norm: LayerNorm, **norms: bool
) -> Block:
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    attention = Attention(heads, heads, width // heads, None, bias=True, output_bias=True)
    return Block(attention, FeedForward(intermediate_size, activation), norm, **norms)


def _config(fields: Fields, block: Block, *, positions: int, final_norm: LayerNorm | None) -> ModelConfig:
    positions = fields.integer("n_positions", default=positions)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("n_embd"),
        num_layers=fields.integer("n_layer"),
        pattern=(block,),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=True),
        final_norm=final_norm,
        learned_positions=positions,
        context_length=positions,
    )


def _written(config: ModelConfig) -> dict[str, Any]:
    block = common.same_blocks(config)
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": common.part(block.attention, Attention).num_heads,
        "n_positions": config.learned_positions,
        "layer_norm_epsilon": common.part(block.norm, LayerNorm).epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _layers(config: ModelConfig, kind: str) -> Iterator[Tensor]:
    """Tensors of the layers, whose norms are of this kind, and of an output matrix that is not tied."""
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("unembedding",), SAME)
    for index, (ours, _) in enumerate(named_blocks(config)):
        theirs = f"transformer.h.{index}"
        yield from norm(f"{theirs}.ln_1", f"{ours}attention_{kind}", bias=True)
        yield from norm(f"{theirs}.ln_2", f"{ours}feed_forward_{kind}", bias=True)
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            ours_three = tuple(f"{ours}attention/{part}/{leaf}" for part in ("query", "key", "value"))
            yield Tensor(f"{theirs}.attn.c_attn.{name}", ours_three, THREE)
        yield from linear(f"{theirs}.attn.c_proj", f"{ours}attention/output", bias=True, layout=SAME)
        yield from linear(f"{theirs}.mlp.c_fc", f"{ours}feed_forward/up", bias=True, layout=SAME)
        yield from linear(f"{theirs}.mlp.c_proj", f"{ours}feed_forward/down", bias=True, layout=SAME)


def _is_mask_buffer(name: str, config: ModelConfig) -> bool:
    del config
    return MASK_BUFFERS.fullmatch(name) is not None


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    read,
    write,
    tensors,
    optional_prefix="transformer.",
    ignores=_is_mask_buffer,
)
GPT1 = Family(
    "OpenAIGPTLMHeadModel",
    "openai-gpt",
    read_first,
    write_first,
    tensors_first,
    optional_prefix="transformer.",
    ignores=_is_mask_buffer,
)
