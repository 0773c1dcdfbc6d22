"""Flax Linen decoders, and the plain callables through which everything else knows them."""

from rlhf_jax.models.config import (
    Attention,
    Block,
    GatedFeedForward,
    ModelConfig,
    Remat,
    RMSNorm,
    Rope,
    config_from_dict,
    config_to_dict,
    dense_config,
)
from rlhf_jax.models.decoder import (
    Cache,
    hidden_states,
    init_cache,
    init_params,
    logits,
    stack_layers,
    unembedding,
    unstack_layers,
)
from rlhf_jax.models.heads import init_scalar_head, init_scalar_model
from rlhf_jax.models.scoring import (
    make_actor_critic_fn,
    make_decode_fns,
    make_reward_fn,
    make_score_fn,
    make_value_fn,
)

__all__ = [
    "Attention",
    "Block",
    "Cache",
    "GatedFeedForward",
    "ModelConfig",
    "RMSNorm",
    "Remat",
    "Rope",
    "config_from_dict",
    "config_to_dict",
    "dense_config",
    "hidden_states",
    "init_cache",
    "init_params",
    "init_scalar_head",
    "init_scalar_model",
    "logits",
    "make_actor_critic_fn",
    "make_decode_fns",
    "make_reward_fn",
    "make_score_fn",
    "make_value_fn",
    "stack_layers",
    "unembedding",
    "unstack_layers",
]
