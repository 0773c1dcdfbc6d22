"""Patch encoder, pooling and projector: from images to features of the decoder's width."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Int, Shaped, UInt8
from rlhf_jax.models.attention.backends import AttentionContext, plain_attention
from rlhf_jax.models.blocks import ResidualBlocks
from rlhf_jax.models.config import Attention, Block, FeedForward, LayerNorm, ModelConfig, Remat
from rlhf_jax.models.layers import Linear, norm_layer, normal_init
from rlhf_jax.models.mlp import MLP
from rlhf_jax.models.vision.config import LinearProjector, MLPProjector, PixelShuffle, VisionConfig


def to_patches(grid: Shaped[Array, "N H W C"], size: int) -> Shaped[Array, "N h w F"]:
    """Squares of `size` x `size` entries of a grid, each flattened row by row with its channels innermost."""
    count, height, width, channels = grid.shape
    squares = grid.reshape(count, height // size, size, width // size, size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(count, height // size, width // size, -1)


def bidirectional_context(rows: int, length: int) -> AttentionContext:
    """Attention context in which everything sees everything, which no causal kernel can serve."""
    places = jnp.broadcast_to(jnp.arange(length), (rows, length))
    present = jnp.ones((rows, length), bool)
    mask = jnp.ones((rows, length, length), bool)
    return AttentionContext(places, places, mask, jnp.int32(0), None, present)


def encoder_config(vision: VisionConfig, *, param_dtype: str, compute_dtype: str) -> ModelConfig:
    """The blocks of the encoder, described as those of a decoder are."""
    head_dim = vision.width // vision.num_heads
    attention = Attention(
        vision.num_heads, vision.num_heads, head_dim, position=None, bias=True, output_bias=True
    )
    feed_forward = FeedForward(vision.intermediate_size, vision.activation)
    block = Block(attention, feed_forward, LayerNorm(vision.norm_epsilon))
    dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    return ModelConfig(1, vision.width, vision.num_layers, (block,), **dtypes)


class AttentionPool(nn.Module):
    """One learned query that attends to all patches, then y + MLP(norm(y)) (SigLIP's attention pooling;
    Zhai et al. 2022).
    """

    config: VisionConfig
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, patches: Float[Array, "N L D"]) -> Float[Array, "N 1 D"]:
        """Pools the patches of each image."""
        config = self.config
        dtypes: dict[str, Any] = {"param_dtype": self.param_dtype, "dtype": self.dtype}
        heads, head_dim = config.num_heads, config.width // config.num_heads
        probe = self.param("probe", normal_init, (1, config.width), self.param_dtype)
        queries = jnp.broadcast_to(probe.astype(self.dtype), (len(patches), 1, config.width))

        def project(inputs: Array, name: str) -> Float[Array, "N T H d"]:
            flat = Linear(config.width, use_bias=True, name=name, **dtypes)(inputs)
            return flat.reshape(*inputs.shape[:2], heads, head_dim)

        query = project(queries, "query")
        key, value = (project(patches, name) for name in ("key", "value"))
        mask = jnp.ones((len(patches), 1, patches.shape[1]), bool)
        attended = plain_attention(query, key, value, mask, scale=head_dim**-0.5)
        output = Linear(config.width, use_bias=True, name="output", **dtypes)
        pooled = output(attended.reshape(queries.shape))
        normed = norm_layer(LayerNorm(config.norm_epsilon), self.param_dtype, name="norm")(pooled)
        spec = FeedForward(config.intermediate_size, config.activation)
        return pooled + MLP(spec, config.width, 0.02, name="feed_forward", **dtypes)(normed)


class VisionTower(nn.Module):
    """Encoder, pooling and projector.

    Attributes:
      config: of all three.
      features: the decoder's width.
      remat: as of the decoder's layers.
    """

    config: VisionConfig
    features: int
    param_dtype: str
    compute_dtype: str
    remat: Remat = "none"

    @nn.compact
    def __call__(self, pixels: UInt8[Array, "N H W 3"]) -> Float[Array, "N L D"]:
        """Features of each image, `config.tokens_per_image` of them."""
        config = self.config
        param_dtype, dtype = jnp.dtype(self.param_dtype), jnp.dtype(self.compute_dtype)
        hidden = self._encoded(pixels, param_dtype, dtype)
        if config.pooling == "mean":
            hidden = jnp.mean(hidden, axis=1, keepdims=True)
        elif config.pooling == "attention":
            hidden = AttentionPool(config, param_dtype, dtype, name="pool")(hidden)
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "dtype": dtype}
        match config.projector:
            case LinearProjector(bias):
                return Linear(self.features, use_bias=bias, name="projector", **dtypes)(hidden)
            case MLPProjector(intermediate_size, activation):
                spec = FeedForward(intermediate_size, activation)
                return MLP(spec, self.features, 0.02, name="projector", **dtypes)(hidden)
            case PixelShuffle(factor):
                grid = hidden.reshape(len(hidden), config.side, config.side, -1)
                joined = to_patches(grid, factor)
                joined = joined.reshape(len(hidden), config.tokens_per_image, -1)
                return Linear(self.features, name="projector", **dtypes)(joined)

    def _encoded(self, pixels: UInt8[Array, "N H W 3"], param_dtype: Any, dtype: Any) -> Array:
        """Patches after the encoder's last norm."""
        config = self.config
        mean, std = (jnp.asarray(numbers, jnp.float32) for numbers in (config.mean, config.std))
        scaled = (pixels.astype(jnp.float32) / 255 - mean) / std
        patches = to_patches(scaled, config.patch_size).reshape(len(pixels), config.side**2, -1)
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "dtype": dtype}
        # Patches and positions come in with like weight, as in SigLIP: smaller positions are seen late.
        stds = patches.shape[-1] ** -0.5, config.width**-0.5
        embed = Linear(config.width, use_bias=True, init_std=stds[0], name="patches", **dtypes)
        init, shape = nn.initializers.normal(stds[1]), (config.side**2, config.width)
        positions = self.param("position_embedding", init, shape, param_dtype)
        hidden = embed(patches) + positions.astype(dtype)
        context = bidirectional_context(*hidden.shape[:2])
        spec = encoder_config(config, param_dtype=self.param_dtype, compute_dtype=self.compute_dtype)
        body = ResidualBlocks if self.remat == "none" else nn.remat(ResidualBlocks)
        for index in range(config.num_layers):
            hidden, _ = body(spec, spec.pattern, name=f"layer_{index}")(hidden, (None,), context)
        return norm_layer(LayerNorm(config.norm_epsilon), param_dtype, name="final_norm")(hidden)


def place_features(
    embeddings: Float[Array, "B T D"],
    places: Shaped[Array, "B T"],
    features: Float[Array, "B M D"],
    count: Int[Array, " B"],
) -> Float[Array, "B T D"]:
    """Image features in the place of embeddings: the k-th of a row's features in the k-th of its `places`.

    Args:
      places: True where the image token stands; those beyond the last feature keep their embedding, such as
        image tokens that a sampler has drawn.
      features: of all images of a row, one after the other.
      count: how many of them there are in each row; the others are padding.
    """
    order = jnp.cumsum(places, axis=1) - 1
    own = places & (order < count[:, None])
    chosen = jnp.take_along_axis(features, jnp.clip(order, 0, features.shape[1] - 1)[..., None], axis=1)
    return jnp.where(own[..., None], chosen.astype(embeddings.dtype), embeddings)
