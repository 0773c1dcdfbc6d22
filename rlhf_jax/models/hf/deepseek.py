"""DeepSeek-V2 and V3: latent attention, dense layers first, then experts of which some are shared."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_jax.models.config import (
    Block,
    GatedFeedForward,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    SigmoidRouter,
    SoftmaxRouter,
)
from rlhf_jax.models.hf import common
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import (
    SAME,
    TRANSPOSED,
    Family,
    Tensor,
    linear,
    named_blocks,
    norm,
    permuted_rows,
)


def read_v2(fields: Fields) -> ModelConfig:
    """config.json of a DeepSeek-V2."""
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    fields.expect("scoring_func", "softmax")
    fields.expect("norm_topk_prob", False)
    limited = fields.get("topk_method") == "group_limited_greedy"
    groups = _groups(fields) if limited else {"groups": 1, "kept_groups": 1}
    scale = fields.number("routed_scaling_factor", default=1.0)
    return _read(fields, SoftmaxRouter(renormalize=False, scale=scale, **groups))


def read_v3(fields: Fields) -> ModelConfig:
    """config.json of a DeepSeek-V3."""
    fields.expect("topk_method", "noaux_tc")
    fields.expect("scoring_func", "sigmoid")
    fields.expect("rope_interleave", True)
    scale = fields.number("routed_scaling_factor", default=2.5)
    renormalize = fields.flag("norm_topk_prob", default=True)
    return _read(fields, SigmoidRouter(renormalize=renormalize, scale=scale, **_groups(fields)))


def _groups(fields: Fields) -> dict[str, int]:
    return {
        "groups": fields.integer("n_group", default=1),
        "kept_groups": fields.integer("topk_group", default=1),
    }


def _read(fields: Fields, router: SoftmaxRouter | SigmoidRouter) -> ModelConfig:
    fields.expect("moe_layer_freq", 1)
    fields.expect("mlp_bias", False)
    dense, rms = common.read_gated(fields), common.read_norm(fields)
    attention = LatentAttention(
        num_heads=fields.integer("num_attention_heads"),
        q_lora_rank=None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        position=common.read_rope(fields),
        bias=fields.flag("attention_bias", default=False),
    )
    hidden = fields.integer("moe_intermediate_size")
    shared = GatedFeedForward(hidden * fields.integer("n_shared_experts"), dense.activation)
    experts = MixtureOfExperts(
        fields.integer("n_routed_experts"),
        fields.integer("num_experts_per_tok"),
        GatedFeedForward(hidden, dense.activation),
        router,
        shared,
    )
    first = fields.get("first_k_dense_replace") or 0
    layers = range(fields.integer("num_hidden_layers"))
    blocks = [Block(attention, dense if index < first else experts, rms) for index in layers]
    return common.read_model(fields, blocks, tie_word_embeddings=False)


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = common.part(config.blocks[0].attention, LatentAttention)
    experts = common.part(config.blocks[-1].feed_forward, MixtureOfExperts)
    shared = common.part(experts.shared, GatedFeedForward)
    dense = [
        block.feed_forward for block in config.blocks if isinstance(block.feed_forward, GatedFeedForward)
    ]
    return {
        **common.write_model(config),
        **common.write_rope(attention.position),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": attention.bias,
        "hidden_act": common.ACTIVATION_NAMES[experts.expert.activation],
        "intermediate_size": dense[0].intermediate_size if dense else experts.expert.intermediate_size,
        "moe_intermediate_size": experts.expert.intermediate_size,
        "first_k_dense_replace": len(dense),
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": shared.intermediate_size // experts.expert.intermediate_size,
        "num_experts_per_tok": experts.experts_per_token,
        "n_group": experts.router.groups,
        "topk_group": experts.router.kept_groups,
        "norm_topk_prob": experts.router.renormalize,
        "routed_scaling_factor": experts.router.scale,
    }


def write_v2(config: ModelConfig) -> dict[str, Any]:
    """config.json of a DeepSeek-V2."""
    written = _write(config)
    method = "greedy" if written["n_group"] == 1 else "group_limited_greedy"
    return {**written, "topk_method": method, "scoring_func": "softmax"}


def write_v3(config: ModelConfig) -> dict[str, Any]:
    """config.json of a DeepSeek-V3; the heads that predict several tokens are not kept."""
    more = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}
    return {**_write(config), **more}


def _attention_tensors(theirs: str, ours: str, spec: LatentAttention) -> Iterator[Tensor]:
    # They rotate neighbouring rows; we rotate row i with row i + half: even rows first, then odd ones.
    halves = np.arange(spec.qk_rope_head_dim).reshape(-1, 2).T.reshape(-1)
    head = np.concatenate([np.arange(spec.qk_nope_head_dim), spec.qk_nope_head_dim + halves])
    heads = (np.arange(spec.num_heads)[:, None] * len(head) + head).reshape(-1)
    query = permuted_rows(heads, len(heads))
    if spec.q_lora_rank is None:
        yield from linear(f"{theirs}.q_proj", f"{ours}/query", layout=query)
    else:
        yield from linear(f"{theirs}.q_a_proj", f"{ours}/query_down", bias=spec.bias)
        yield from norm(f"{theirs}.q_a_layernorm", f"{ours}/query_norm")
        yield from linear(f"{theirs}.q_b_proj", f"{ours}/query", layout=query)
    sizes = (spec.kv_lora_rank, spec.qk_rope_head_dim)
    both = permuted_rows(np.concatenate([np.arange(spec.kv_lora_rank), spec.kv_lora_rank + halves]), *sizes)
    for leaf, name in (("kernel", "weight"), ("bias", "bias"))[: 1 + spec.bias]:
        latents = (f"{ours}/latent/{leaf}", f"{ours}/rotated_key/{leaf}")
        yield Tensor(f"{theirs}.kv_a_proj_with_mqa.{name}", latents, both)
    yield from norm(f"{theirs}.kv_a_layernorm", f"{ours}/latent_norm")
    yield Tensor(f"{theirs}.kv_b_proj.weight", (f"{ours}/expand",), TRANSPOSED)
    yield from linear(f"{theirs}.o_proj", f"{ours}/output", bias=spec.bias)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs, layer = f"model.layers.{index}", block.feed_forward
        attention = common.part(block.attention, LatentAttention)
        yield from common.pre_norms(theirs, ours)
        yield from _attention_tensors(f"{theirs}.self_attn", f"{ours}attention", attention)
        yield from common.gated_or_expert_tensors(f"{theirs}.mlp", f"{ours}feed_forward", layer)
        if isinstance(layer, MixtureOfExperts):
            shared = common.part(layer.shared, GatedFeedForward)
            yield from common.gated_tensors(
                f"{theirs}.mlp.shared_experts", f"{ours}feed_forward/shared", shared
            )
            if isinstance(layer.router, SigmoidRouter):
                bias = f"{ours}feed_forward/router/bias"
                yield Tensor(f"{theirs}.mlp.gate.e_score_correction_bias", (bias,), SAME)


def _ignores(name: str, config: ModelConfig) -> bool:
    """Layers behind the last one predict further tokens; they are no part of the model itself."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.endswith("rotary_emb.inv_freq") or (layer is not None and int(layer[1]) >= config.num_layers)


V2 = Family("DeepseekV2ForCausalLM", "deepseek_v2", read_v2, write_v2, tensors, ignores=_ignores)
V3 = Family("DeepseekV3ForCausalLM", "deepseek_v3", read_v3, write_v3, tensors, ignores=_ignores)
