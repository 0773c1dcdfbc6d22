"""Mistral (a sliding window in every layer) and Mixtral (experts)."""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.models.config import (
    Attention,
    Block,
    MixtureOfExperts,
    ModelConfig,
    SoftmaxRouter,
)
from rlhf_jax.models.hf import common, llama
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family, Tensor, named_blocks


def read_mistral(fields: Fields) -> ModelConfig:
    """config.json of a Mistral."""
    attention = common.read_attention(fields, window=common.read_window(fields))
    block = Block(attention, common.read_gated(fields), common.read_norm(fields))
    return common.read_model(fields, block, tie_word_embeddings=False)


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Mistral."""
    window = common.part(common.same_blocks(config).attention, Attention).window
    return {**llama.write_llama(config), "sliding_window": window}


def read_mixtral(fields: Fields) -> ModelConfig:
    """config.json of a Mixtral."""
    position = common.read_rope(fields, theta=1_000_000.0)
    attention = common.read_attention(fields, position=position, window=common.read_window(fields))
    experts = MixtureOfExperts(
        fields.integer("num_local_experts"),
        fields.integer("num_experts_per_tok"),
        common.read_gated(fields),
        SoftmaxRouter(),
    )
    block = Block(attention, experts, common.read_norm(fields, default=1e-5))
    return common.read_model(fields, block, tie_word_embeddings=False)


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Mixtral."""
    block = common.same_blocks(config)
    attention = common.part(block.attention, Attention)
    experts = common.part(block.feed_forward, MixtureOfExperts)
    return {
        **common.write_model(config),
        **common.write_attention(attention),
        "sliding_window": attention.window,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "intermediate_size": experts.expert.intermediate_size,
        "hidden_act": common.ACTIVATION_NAMES[experts.expert.activation],
    }


def mixtral_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a Mixtral."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"model.layers.{index}"
        experts = common.part(block.feed_forward, MixtureOfExperts)
        attention = common.part(block.attention, Attention)
        yield from common.pre_norms(theirs, ours)
        yield from common.attention_tensors(f"{theirs}.self_attn", f"{ours}attention", attention)
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        yield from common.expert_tensors(
            f"{theirs}.block_sparse_moe", f"{ours}feed_forward", experts, **names
        )


MISTRAL = Family("MistralForCausalLM", "mistral", read_mistral, write_mistral, llama.tensors)
MIXTRAL = Family("MixtralForCausalLM", "mixtral", read_mixtral, write_mixtral, mixtral_tensors)
