"""From descriptions of parts to layers: the one place that knows which class builds which.

(Norms, which layers themselves contain, are built by `layers.norm_layer`.)
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.axes import constrain
from rlhf_jax.core.types import Array, Int
from rlhf_jax.models.attention.modules import LayerCache, MultiHeadLatentAttention, SelfAttention, append
from rlhf_jax.models.config import (
    Attention,
    Block,
    FeedForward,
    GatedFeedForward,
    LatentAttention,
    MixtureOfExperts,
    Recurrence,
)
from rlhf_jax.models.mlp import MLP, GatedMLP, MoE
from rlhf_jax.models.recurrent import RecurrentLayer


def mixing_layer(spec: Attention | LatentAttention | Recurrence, **options: Any) -> nn.Module:
    """`layer(inputs, context, cache) -> (outputs, what the cache is to keep)`; see `keep`."""
    match spec:
        case Attention():
            return SelfAttention(spec, **options)
        case LatentAttention():
            return MultiHeadLatentAttention(spec, **options)
        case Recurrence():
            return RecurrentLayer(spec, **options)


def feed_forward_layer(spec: GatedFeedForward | FeedForward | MixtureOfExperts, **options: Any) -> nn.Module:
    """`layer(inputs) -> outputs`."""
    match spec:
        case GatedFeedForward():
            return GatedMLP(spec, **options)
        case FeedForward():
            return MLP(spec, **options)
        case MixtureOfExperts():
            return MoE(spec, **options)


def empty_cache(block: Block, shape: tuple[int, ...], dtype: Any) -> LayerCache:
    """The cache of one block, whose arrays begin with `shape` ([B, S], stacked layers before it)."""
    rows = (*(None,) * (len(shape) - 2), "batch")
    match block.attention:
        case Attention(num_kv_heads=heads, head_dim=width):
            empty = constrain(jnp.zeros((*shape, heads, width), dtype), *rows, None, "heads", None)
            return empty, empty
        case LatentAttention(kv_lora_rank=latent, qk_rope_head_dim=rotated):
            latents, keys = jnp.zeros((*shape, latent), dtype), jnp.zeros((*shape, rotated), dtype)
            return constrain(latents, *rows, None, None), constrain(keys, *rows, None, None)
        case Recurrence(cell=cell, hidden_size=hidden):
            state = constrain(jnp.zeros((*shape[:-1], hidden), dtype), *rows, None)
            return (state, state) if cell == "lstm" else (state,)


def keep(
    block: Block, cache: LayerCache, new: LayerCache, start: Int[Array, "*B"], *, stacked: bool
) -> LayerCache:
    """The cache of one block with what its layer kept of new tokens: columns at `start`, or its new state.

    Args:
      stacked: arrays of the same block of every repeat, stacked.
    """
    return new if isinstance(block.attention, Recurrence) else append(cache, new, start, stacked=stacked)
