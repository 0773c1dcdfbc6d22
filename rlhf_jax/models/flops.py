"""Floating-point operations that a model needs, by its description alone."""

import dataclasses

from rlhf_jax.models.config import (
    Attention,
    FeedForward,
    GatedFeedForward,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    Recurrence,
)


def matmul_params(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: those of its experts alone, the output matrix
    included, the look-up of embeddings not.
    """
    blocks = sum(
        _mixing_params(block.attention, config.width) + _feed_forward_params(block.feed_forward, config.width)
        for block in config.blocks
    )
    return blocks + config.vocab_size * config.width


def forward_flops(config: ModelConfig, *, rows: int, length: int, start: int = 0) -> float:
    """Operations of reading `rows` rows from column `start` to column `length`.

        2 N + 4 sum over layers of heads x head width x columns seen    a token

    (Kaplan et al. 2020, section 2.1, which counts the same; with half of a square for causal attention,
    and no more columns than a window has.)
    """
    tokens = length - start
    seen = 0.0
    for block in config.blocks:
        attention = block.attention
        if isinstance(attention, Recurrence):
            continue  # nothing but products with parameters
        if isinstance(attention, LatentAttention):
            width = (
                attention.num_heads
                * (attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim)
                / 2
            )
            window = None
        else:
            width, window = attention.num_heads * attention.head_dim, attention.window
        columns = (length * (length + 1) - start * (start + 1)) / 2  # of all tokens together
        seen += 4 * width * min(columns, tokens * window if window else columns)
    return rows * (2.0 * matmul_params(config) * tokens + seen)


def training_flops(config: ModelConfig, *, rows: int, length: int) -> float:
    """Operations of a gradient, twice those of a forward pass beside it (the 6 N D of scaling laws, with
    attention); what is computed again to save memory does not count. Modules for further tokens count, each
    as a block, its projection and the output matrix.
    """
    forward = forward_flops(config, rows=rows, length=length)
    if config.mtp_depth:
        module = dataclasses.replace(
            config, prefix=(), pattern=config.pattern[-1:], num_layers=1, mtp_depth=0
        )
        projection = 4.0 * config.width**2 * rows * length
        forward += config.mtp_depth * (projection + forward_flops(module, rows=rows, length=length))
    return 3 * forward


def _mixing_params(attention: Attention | LatentAttention | Recurrence, width: int) -> int:
    if isinstance(attention, Recurrence):
        hidden = attention.hidden_size
        projected = width * hidden if hidden != width else 0
        return {"rnn": 1, "gru": 3, "lstm": 4}[attention.cell] * hidden * (width + hidden) + projected
    if isinstance(attention, Attention):
        return 2 * width * attention.head_dim * (attention.num_heads + attention.num_kv_heads)
    heads = attention.num_heads
    query_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank = attention.q_lora_rank
    query = width * query_width if rank is None else rank * (width + query_width)
    latent = width * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    expanded = attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return query + latent + expanded + heads * attention.v_head_dim * width


def _feed_forward_params(part: GatedFeedForward | FeedForward | MixtureOfExperts | None, width: int) -> int:
    if part is None:
        return 0
    if isinstance(part, MixtureOfExperts):
        experts = part.experts_per_token * _feed_forward_params(part.expert, width)
        shared = _feed_forward_params(part.shared, width) if part.shared else 0
        return experts + shared + width * part.num_experts
    return (3 if isinstance(part, GatedFeedForward) else 2) * width * part.intermediate_size
