"""Residual blocks: what decoders and patch encoders are stacks of."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.core.axes import constrain
from rlhf_jax.core.types import Array, Float
from rlhf_jax.models.attention.backends import AttentionContext
from rlhf_jax.models.attention.modules import LayerCache
from rlhf_jax.models.builders import feed_forward_layer, mixing_layer
from rlhf_jax.models.config import Block, ModelConfig, Recurrence
from rlhf_jax.models.layers import norm_layer


class ResidualBlocks(nn.Module):
    """The prefix, or the blocks of one repeat of the pattern."""

    config: ModelConfig
    blocks: tuple[Block, ...]

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], caches: tuple[LayerCache | None, ...], context: AttentionContext
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, ...]]:
        """Runs the blocks in order; `caches` has one entry for each, and so has what they are to keep."""
        config = self.config
        dtypes = {"param_dtype": jnp.dtype(config.param_dtype), "dtype": jnp.dtype(config.compute_dtype)}
        # Outputs that are added to the residual stream start smaller, by the number of additions.
        common = {"width": config.width, "output_std": 0.02 / (2 * config.num_layers) ** 0.5, **dtypes}
        new_caches = []
        for index, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            prefix = f"block_{index}_" if len(self.blocks) > 1 else ""
            dtype = dtypes["param_dtype"]
            name = f"{prefix}recurrence" if isinstance(block.attention, Recurrence) else f"{prefix}attention"
            mixer = mixing_layer(block.attention, name=name, backend=config.attention_backend, **common)
            normed = _normed(block, block.pre_norm, f"{name}_norm", hidden, dtype)
            mixed, cache = mixer(normed, context, cache)
            hidden = _added(block, name, hidden, normed, mixed, dtype)
            new_caches.append(cache)
            if block.feed_forward is None:
                continue
            hidden = checkpoint_name(hidden, "feed_forward_input")
            name = f"{prefix}feed_forward"
            feed_forward = feed_forward_layer(block.feed_forward, name=name, **common)
            normed = _normed(block, block.pre_norm, f"{name}_norm", hidden, dtype)
            hidden = _added(block, name, hidden, normed, feed_forward(normed), dtype)
        return hidden, tuple(new_caches)


def _normed(block: Block, wanted: bool, name: str, inputs: Array, dtype: Any) -> Array:
    """`inputs`, normed as the block norms where it does."""
    return norm_layer(block.norm, dtype, name=name)(inputs) if wanted else inputs


def _added(block: Block, name: str, inputs: Array, normed: Array, outputs: Array, dtype: Any) -> Array:
    """The residual stream behind attention or a feed-forward: inputs and outputs, with their norms."""
    outputs = _normed(block, block.post_norm, f"{name}_post_norm", outputs, dtype)
    if block.residual:
        outputs = (normed if block.residual_from_norm else inputs) + outputs
    return laid_out(_normed(block, block.sum_norm, f"{name}_sum_norm", outputs, dtype))


def laid_out(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream on a mesh: rows and columns split, every token whole."""
    return constrain(hidden, "batch", "time", None)
