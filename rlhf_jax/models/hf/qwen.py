"""Qwen 2 and 2.5 (biased queries, keys, values), Qwen 3 (normed queries and keys), Qwen 3 with experts."""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.models.config import (
    Attention,
    Block,
    GatedFeedForward,
    MixtureOfExperts,
    ModelConfig,
    SoftmaxRouter,
)
from rlhf_jax.models.hf import common, llama
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family, Tensor, named_blocks


def read_qwen2(fields: Fields) -> ModelConfig:
    """config.json of a Qwen 2 or 2.5."""
    fields.expect("use_sliding_window", False)
    attention = common.read_attention(fields, bias=True)
    block = Block(attention, common.read_gated(fields), common.read_norm(fields))
    return common.read_model(fields, block, tie_word_embeddings=False)


def read_qwen3(fields: Fields) -> ModelConfig:
    """config.json of a Qwen 3."""
    block = Block(_qwen3_attention(fields), common.read_gated(fields), common.read_norm(fields))
    return common.read_model(fields, block, tie_word_embeddings=False)


def _qwen3_attention(fields: Fields) -> Attention:
    fields.expect("use_sliding_window", False)
    bias = fields.flag("attention_bias", default=False)
    return common.read_attention(fields, bias=bias, output_bias=bias, qk_norm=common.read_norm(fields))


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    """config.json of a dense Qwen."""
    written = llama.write_llama(config)
    return {**written, "use_sliding_window": False, "sliding_window": None}


def read_qwen3_moe(fields: Fields) -> ModelConfig:
    """config.json of a Qwen 3 with experts, whose layers may be dense in part."""
    attention, norm, dense = _qwen3_attention(fields), common.read_norm(fields), common.read_gated(fields)
    experts = MixtureOfExperts(
        fields.integer("num_experts", "num_local_experts"),
        fields.integer("num_experts_per_tok"),
        GatedFeedForward(fields.integer("moe_intermediate_size"), dense.activation),
        SoftmaxRouter(renormalize=fields.flag("norm_topk_prob", default=False)),
    )
    every, plain = fields.integer("decoder_sparse_step", default=1), fields.get("mlp_only_layers") or []
    blocks = [
        Block(attention, dense if index in plain or (index + 1) % every else experts, norm)
        for index in range(fields.integer("num_hidden_layers"))
    ]
    return common.read_model(fields, blocks, tie_word_embeddings=False)


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen 3 with experts."""
    layers = [block.feed_forward for block in config.blocks]
    sparse = next((layer for layer in layers if isinstance(layer, MixtureOfExperts)), None)
    dense = next((layer for layer in layers if isinstance(layer, GatedFeedForward)), None)
    experts = common.part(sparse, MixtureOfExperts)
    attention = common.part(config.blocks[0].attention, Attention)
    return {
        **common.write_model(config),
        **common.write_attention(attention),
        "attention_bias": attention.bias,
        "hidden_act": common.ACTIVATION_NAMES[experts.expert.activation],
        "intermediate_size": (dense or experts.expert).intermediate_size,
        "moe_intermediate_size": experts.expert.intermediate_size,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": experts.router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, layer in enumerate(layers) if layer != experts],
    }


def qwen3_moe_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a Qwen 3 with experts."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"model.layers.{index}"
        attention = common.part(block.attention, Attention)
        yield from common.pre_norms(theirs, ours)
        yield from common.attention_tensors(f"{theirs}.self_attn", f"{ours}attention", attention)
        yield from common.gated_or_expert_tensors(f"{theirs}.mlp", f"{ours}feed_forward", block.feed_forward)


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", read_qwen2, write_qwen, llama.tensors)
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", read_qwen3, write_qwen, llama.tensors)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, write_qwen3_moe, qwen3_moe_tensors)
