"""Attention layers. With a cache, new columns are written at `start` and all columns are attended to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.models.config import Attention, LatentAttention
from rlhf_jax.models.layers import Linear, Scale, norm_layer
from rlhf_jax.models.positions import Alibi, Rope, alibi_slopes, rotate

LayerCache = tuple[Array, ...]
"""(keys, values) [B, S, K, d], or (latents, rotated keys) [B, S, d]."""


@pytree_dataclass
class Context:
    """What every layer of a pass shares.

    Attributes:
      positions: of the tokens read now.
      key_positions: of every column that may be attended to.
      mask: who sees whom, windows apart.
      start: the column of the cache that the first token goes to.
    """

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    mask: Bool[Array, "B T S"]
    start: Int[Array, ""]

    def distance(self) -> Int[Array, "B T S"]:
        """How many tokens each column lies back."""
        return self.positions[:, :, None] - self.key_positions[:, None, :]


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K v"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H v"]:
    """softmax(softcap(scale q k^T) + bias) v over the unmasked columns.

    A row that sees no column gets something finite.
    """
    if softcap is None and key.shape[-1] == value.shape[-1] and query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value, bias, mask[:, None], scale=scale)
    batch, time, heads, width = query.shape
    kv_heads = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, width)
    logits = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += bias.reshape(batch, kv_heads, -1, *bias.shape[2:])
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskv->btkgv", weights, value).reshape(batch, time, heads, -1)


def append(cache: LayerCache, new: LayerCache, start: Int[Array, ""]) -> LayerCache:
    """The cache with new columns written at `start`."""
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(old, columns.astype(old.dtype), start, axis=1)
        for old, columns in zip(cache, new, strict=True)
    )


class SelfAttention(nn.Module):
    """Grouped-query attention."""

    spec: Attention
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output and the cache with the new columns."""
        spec = self.spec
        query = self._normed(self._project(inputs, "query", spec.num_heads), "query_norm")
        key = self._normed(self._project(inputs, "key", spec.num_kv_heads), "key_norm")
        value = self._project(inputs, "value", spec.num_kv_heads)
        if isinstance(spec.position, Rope):
            query, key = (rotate(heads, context.positions, spec.position) for heads in (query, key))
        if cache is not None:
            key, value = cache = append(cache, (key, value), context.start)
        mask, bias = context.mask, None
        if spec.window is not None:
            mask &= context.distance() < spec.window
        if isinstance(spec.position, Alibi):
            slopes = alibi_slopes(spec.num_heads)[:, None, None]
            bias = jnp.asarray(-slopes * context.distance()[:, None], query.dtype)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        attended = attend(query, key, value, mask, scale=scale, softcap=spec.softcap, bias=bias)
        output = self._linear(self.width, use_bias=spec.output_bias, init_std=self.output_std, name="output")
        return output(attended.reshape(*inputs.shape[:2], -1)), cache

    def _linear(self, features: int, **options: Any) -> Linear:
        return Linear(features, param_dtype=self.param_dtype, dtype=self.dtype, **options)

    def _project(self, inputs: Float[Array, "B T D"], name: str, heads: int) -> Float[Array, "B T H d"]:
        flat = self._linear(heads * self.spec.head_dim, use_bias=self.spec.bias, name=name)(inputs)
        return flat.reshape(*inputs.shape[:2], heads, self.spec.head_dim)

    def _normed(self, heads: Float[Array, "B T H d"], name: str) -> Float[Array, "B T H d"]:
        if self.spec.qk_norm is None:
            return heads
        norm = norm_layer(self.spec.qk_norm, self.param_dtype, name=name)
        if self.spec.qk_norm_whole:
            return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
        return norm(heads)


class MultiHeadLatentAttention(nn.Module):
    """Keys and values from one latent a token. With a cache, attention works on the latents themselves:
    the matrices that would expand them are applied to queries and outputs instead (DeepSeek-V2 report,
    section 2.1.2).
    """

    spec: LatentAttention
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output and the cache with the new columns."""
        spec = self.spec
        linear = functools.partial(Linear, param_dtype=self.param_dtype, dtype=self.dtype)
        norm = functools.partial(Scale, spec.norm, self.param_dtype)
        hidden = inputs
        if spec.query_rank is not None:
            hidden = linear(spec.query_rank, use_bias=spec.bias, name="query_down")(hidden)
            hidden = norm(name="query_norm")(hidden)
        query = linear(spec.num_heads * (spec.nope_dim + spec.rope_dim), name="query")(hidden)
        query = query.reshape(*inputs.shape[:2], spec.num_heads, -1)
        plain, turned = query[..., : spec.nope_dim], query[..., spec.nope_dim :]
        turned = rotate(turned, context.positions, spec.position)
        latent = linear(spec.latent_dim, use_bias=spec.bias, name="latent")(inputs)
        latent = norm(name="latent_norm")(latent)
        turned_key = linear(spec.rope_dim, use_bias=spec.bias, name="rotated_key")(inputs)
        turned_key = rotate(turned_key[:, :, None], context.positions, spec.position)[:, :, 0]
        expand = self._expansion()
        if cache is None:
            attended = self._expanded(plain, turned, latent, turned_key, expand, context.mask)
        else:
            latent, turned_key = cache = append(cache, (latent, turned_key), context.start)
            attended = self._absorbed(plain, turned, latent, turned_key, expand, context.mask)
        output = linear(self.width, use_bias=spec.bias, init_std=self.output_std, name="output")
        return output(attended.reshape(*inputs.shape[:2], -1)), cache

    def _expansion(self) -> Float[Array, "r H kv"]:
        """The matrices from a latent to every head's unrotated key and value, side by side."""
        spec = self.spec
        shape = (spec.latent_dim, spec.num_heads * (spec.nope_dim + spec.value_dim))
        kernel = self.param("expand", nn.initializers.normal(0.02), shape, self.param_dtype)
        return kernel.astype(self.dtype).reshape(spec.latent_dim, spec.num_heads, -1)

    def _expanded(self, plain, turned, latent, turned_key, expand, mask) -> Float[Array, "B T H v"]:
        both = jnp.einsum("bsr,rhk->bshk", latent, expand)
        key, value = both[..., : self.spec.nope_dim], both[..., self.spec.nope_dim :]
        shared = jnp.broadcast_to(turned_key[:, :, None], (*key.shape[:3], turned_key.shape[-1]))
        query = jnp.concatenate([plain, turned], axis=-1)
        return attend(query, jnp.concatenate([key, shared], axis=-1), value, mask, scale=self.spec.scale)

    def _absorbed(self, plain, turned, latent, turned_key, expand, mask) -> Float[Array, "B T H v"]:
        to_key, to_value = expand[..., : self.spec.nope_dim], expand[..., self.spec.nope_dim :]
        query = jnp.concatenate([jnp.einsum("bthn,rhn->bthr", plain, to_key), turned], axis=-1)
        key = jnp.concatenate([latent, turned_key], axis=-1)[:, :, None]
        attended = attend(query, key, latent[:, :, None], mask, scale=self.spec.scale)
        return jnp.einsum("bthr,rhv->bthv", attended, to_value)
