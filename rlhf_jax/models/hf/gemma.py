"""Gemma 2 and the text models of Gemma 3: local and global layers, norms on both sides, scaled embeddings."""

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_jax.models.config import Attention, Block, GatedFeedForward, ModelConfig
from rlhf_jax.models.hf import common
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import Family, Tensor, named_blocks, norm
from rlhf_jax.models.positions import Rope

LOCAL, GLOBAL = "sliding_attention", "full_attention"
NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}


def read_gemma2(fields: Fields) -> ModelConfig:
    """config.json of a Gemma 2: every other layer is local."""
    rope = common.read_rope(fields)
    return _read(fields, {LOCAL: rope, GLOBAL: rope}, every=2, normed=False)


def read_gemma3(fields: Fields) -> ModelConfig:
    """config.json of a Gemma 3 text model: one layer in six is global, with slower rotations."""
    fields.expect("use_bidirectional_attention", False)
    local = Rope(fields.number("rope_local_base_freq", default=10_000.0))
    if LOCAL in (fields.get("rope_parameters") or {}):
        local = common.read_rope(fields, kind=LOCAL)
    ropes = {LOCAL: local, GLOBAL: common.read_rope(fields, theta=1_000_000.0, kind=GLOBAL)}
    every = fields.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return _read(fields, ropes, every=every, normed=True)


def _read(fields: Fields, ropes: dict[str, Rope], *, every: int, normed: bool) -> ModelConfig:
    count = fields.integer("num_hidden_layers")
    default = [GLOBAL if (index + 1) % every == 0 else LOCAL for index in range(count)]
    types: Sequence[str] = fields.get("layer_types") or default
    if len(types) != count or not all(kind in list(ropes) for kind in types):
        raise fields.error("layer_types", f"is not {count} times {LOCAL} or {GLOBAL}")
    scale_norm, bias = common.read_norm(fields, offset=True), fields.flag("attention_bias", default=False)
    activation = common.read_activation(fields, "hidden_activation", default="gelu_pytorch_tanh")
    feed_forward = GatedFeedForward(fields.integer("intermediate_size"), activation)
    window = common.read_window(fields) or 4096

    def block(kind: str) -> Block:
        attention = common.read_attention(
            fields,
            position=ropes[kind],
            bias=bias,
            output_bias=bias,
            qk_norm=scale_norm if normed else None,
            window=window if kind == LOCAL else None,
            scale=fields.number("query_pre_attn_scalar", default=256.0) ** -0.5,
            softcap=fields.get("attn_logit_softcapping"),
        )
        return Block(attention, feed_forward, scale_norm, post_norm=True)

    return common.read_model(
        fields,
        [block(kind) for kind in types],
        tie_word_embeddings=True,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        logit_softcap=fields.get("final_logit_softcapping"),
    )


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Gemma 2."""
    attentions = [common.part(block.attention, Attention) for block in config.blocks]
    attention = attentions[0]
    feed_forward = common.part(config.blocks[0].feed_forward, GatedFeedForward)
    activation = common.ACTIVATION_NAMES[feed_forward.activation]
    return {
        **common.write_model(config),
        **common.write_attention(attention),
        "attention_bias": attention.bias,
        "intermediate_size": feed_forward.intermediate_size,
        "hidden_activation": activation,
        "hidden_act": activation,
        "query_pre_attn_scalar": _inverse_square(attention.scale or attention.head_dim**-0.5),
        "sliding_window": next((spec.window for spec in attentions if spec.window), 4096),
        "layer_types": [LOCAL if spec.window else GLOBAL for spec in attentions],
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _inverse_square(scale: float) -> float:
    """1 / scale^2, without the rounding of the two roots."""
    rounded = round(scale**-2)
    return rounded if rounded**-0.5 == scale else scale**-2


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Gemma 3 text model."""
    positions = {
        common.part(block.attention, Attention).window is None: common.part(
            block.attention, Attention
        ).position
        for block in config.blocks
    }
    every, local = positions.get(True, Rope()), positions.get(False, Rope())
    written = {**write_gemma2(config), **common.write_rope(common.part(every, Rope))}
    return {**written, "rope_local_base_freq": common.part(local, Rope).theta}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    yield from common.outer_tensors(config)
    for index, (ours, block) in enumerate(named_blocks(config)):
        theirs = f"model.layers.{index}"
        attention = common.part(block.attention, Attention)
        for their_norm, our_norm in NORMS.items():
            yield from norm(f"{theirs}.{their_norm}", f"{ours}{our_norm}")
        yield from common.attention_tensors(f"{theirs}.self_attn", f"{ours}attention", attention)
        feed_forward = common.part(block.feed_forward, GatedFeedForward)
        yield from common.gated_tensors(f"{theirs}.mlp", f"{ours}feed_forward", feed_forward)


GEMMA2 = Family("Gemma2ForCausalLM", "gemma2", read_gemma2, write_gemma2, tensors)
GEMMA3 = Family("Gemma3ForCausalLM", "gemma3_text", read_gemma3, write_gemma3, tensors)
