"""Attention layers. They read a cache and return the columns that it is to keep of the new tokens; who
owns the cache writes them there. Where it was empty, the new columns are all there is to attend to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.axes import constrain
from rlhf_jax.core.types import Array, Float, Int, Shaped
from rlhf_jax.models.attention.backends import AttentionContext, attend, plain_attention
from rlhf_jax.models.config import Attention, AttentionBackend, LatentAttention
from rlhf_jax.models.layers import Linear, RMSNorm, norm_layer
from rlhf_jax.models.positions import Alibi, Rope, alibi_slopes, rotate

LayerCache = tuple[Array, ...]
"""(keys, values) [B, S, K, d], or (latents, rotated keys) [B, S, d]."""


def write_columns(
    old: Shaped[Array, "..."], new: Shaped[Array, "..."], start: Int[Array, "*B"], *, stacked: bool = False
) -> Shaped[Array, "..."]:
    """`old` [B, S, ...] with `new` [B, T, ...] written from column `start` on; of all rows, or of each.

    Args:
      stacked: both have an axis of layers before that of the rows.
    """
    new = new.astype(old.dtype)
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1 + stacked)
    rows = jnp.arange(old.shape[stacked])[:, None]
    columns = start[:, None] + jnp.arange(new.shape[1 + stacked])
    return old.at[(slice(None),) * stacked + (rows, columns)].set(new, mode="drop", unique_indices=True)


def append(
    cache: LayerCache, new: LayerCache, start: Int[Array, "*B"], *, stacked: bool = False
) -> LayerCache:
    """The cache with new columns written at `start`."""
    return tuple(
        write_columns(old, columns, start, stacked=stacked) for old, columns in zip(cache, new, strict=True)
    )


def behind_prompt(
    layer: nn.Module, columns: LayerCache, context: AttentionContext
) -> tuple[LayerCache, AttentionContext]:
    """Columns and context with the layer's columns of a soft prompt before them, where it has any."""
    if not layer.has_variable("params", "prompt_0"):
        return columns, context
    prompt = [layer.get_variable("params", f"prompt_{index}") for index in range(len(columns))]
    both = tuple(
        jnp.concatenate([jnp.broadcast_to(soft, (len(own), *soft.shape[1:])).astype(own.dtype), own], axis=1)
        for soft, own in zip(prompt, columns, strict=True)
    )
    return both, context.behind_prompt(prompt[0].shape[1])


class SelfAttention(nn.Module):
    """Grouped-query attention."""

    spec: Attention
    width: int
    output_std: float
    backend: AttentionBackend
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B T D"], context: AttentionContext, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output, and the new columns for the cache."""
        spec = self.spec
        query = self._normed(self._project(inputs, "query", spec.num_heads), "query_norm")
        unrotated = query
        key = self._normed(self._project(inputs, "key", spec.num_kv_heads), "key_norm")
        value = self._project(inputs, "value", spec.num_kv_heads)
        if isinstance(spec.position, Rope):
            query, key = (rotate(heads, context.positions, spec.position) for heads in (query, key))
        new = None if cache is None else (key, value)
        if cache is not None and context.segment_ids is None:
            key, value = append(cache, (key, value), context.start)
        (key, value), context = behind_prompt(self, (key, value), context)
        bias = None
        if isinstance(spec.position, Alibi):
            slopes = alibi_slopes(spec.num_heads)[:, None, None]
            bias = jnp.asarray(-slopes * context.distance()[:, None], query.dtype)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        attended = attend(
            query,
            key,
            value,
            context,
            backend=self.backend,
            scale=scale,
            softcap=spec.softcap,
            bias=bias,
            window=spec.window,
        )
        if self.has_variable("params", "prefix_key"):
            attended += self._attended_prefix(unrotated, scale)
        output = self._linear(self.width, use_bias=spec.output_bias, init_std=self.output_std, name="output")
        return output(attended.reshape(*inputs.shape[:2], -1)), new

    def _attended_prefix(self, query: Float[Array, "B T H d"], scale: float) -> Float[Array, "B T H d"]:
        """Attention to a trained prefix, which has no position, through its gate."""
        names = ("prefix_key", "prefix_value", "prefix_scale")
        key, value, gate = (self.get_variable("params", name).astype(self.dtype) for name in names)
        shape = (query.shape[0], len(key), self.spec.num_kv_heads, self.spec.head_dim)
        key, value = (jnp.broadcast_to(x.reshape(shape[1:]), shape) for x in (key, value))
        mask = jnp.ones((*query.shape[:2], shape[1]), bool)
        return jnp.tanh(gate) * plain_attention(query, key, value, mask, scale=scale)

    def _linear(self, features: int, **options: Any) -> Linear:
        return Linear(features, param_dtype=self.param_dtype, dtype=self.dtype, **options)

    def _project(self, inputs: Float[Array, "B T D"], name: str, heads: int) -> Float[Array, "B T H d"]:
        flat = self._linear(heads * self.spec.head_dim, use_bias=self.spec.bias, name=name)(inputs)
        heads_apart = flat.reshape(*inputs.shape[:2], heads, self.spec.head_dim)
        return constrain(heads_apart, "batch", "time", "heads", None)

    def _normed(self, heads: Float[Array, "B T H d"], name: str) -> Float[Array, "B T H d"]:
        if self.spec.qk_norm is None:
            return heads
        norm = norm_layer(self.spec.qk_norm, self.param_dtype, name=name)
        if self.spec.qk_norm_whole:
            return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
        return norm(heads)


class MultiHeadLatentAttention(nn.Module):
    """Keys and values from one latent a token. Reading from a cache, attention works on the latents
    themselves: the matrices that would expand them are applied to queries and outputs instead
    (DeepSeek-V2 report, section 2.1.2).
    """

    spec: LatentAttention
    width: int
    output_std: float
    backend: AttentionBackend
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B T D"], context: AttentionContext, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output, and the new columns for the cache."""
        spec = self.spec
        linear = functools.partial(Linear, param_dtype=self.param_dtype, dtype=self.dtype)
        norm = functools.partial(RMSNorm, spec.norm, self.param_dtype)
        hidden = inputs
        if spec.q_lora_rank is not None:
            hidden = linear(spec.q_lora_rank, use_bias=spec.bias, name="query_down")(hidden)
            hidden = norm(name="query_norm")(hidden)
        query = linear(spec.num_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim), name="query")(hidden)
        query = query.reshape(*inputs.shape[:2], spec.num_heads, -1)
        plain, turned = query[..., : spec.qk_nope_head_dim], query[..., spec.qk_nope_head_dim :]
        turned = rotate(turned, context.positions, spec.position)
        latent = linear(spec.kv_lora_rank, use_bias=spec.bias, name="latent")(inputs)
        latent = norm(name="latent_norm")(latent)
        turned_key = linear(spec.qk_rope_head_dim, use_bias=spec.bias, name="rotated_key")(inputs)
        turned_key = rotate(turned_key[:, :, None], context.positions, spec.position)[:, :, 0]
        expand = self._expansion()
        new = columns = (latent, turned_key)
        alone = cache is None or context.segment_ids is not None
        if cache is not None and not alone:
            columns = append(cache, columns, context.start)
        (latent, turned_key), context = behind_prompt(self, columns, context)
        attend_to = self._expanded if alone else self._absorbed
        attended = attend_to(plain, turned, latent, turned_key, expand, context)
        output = linear(self.width, use_bias=spec.bias, init_std=self.output_std, name="output")
        return output(attended.reshape(*inputs.shape[:2], -1)), None if cache is None else new

    def _expansion(self) -> Float[Array, "r H kv"]:
        """The matrices from a latent to every head's unrotated key and value, side by side."""
        spec = self.spec
        shape = (spec.kv_lora_rank, spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim))
        kernel = self.param("expand", nn.initializers.normal(0.02), shape, self.param_dtype)
        return kernel.astype(self.dtype).reshape(spec.kv_lora_rank, spec.num_heads, -1)

    def _expanded(self, plain, turned, latent, turned_key, expand, context) -> Float[Array, "B T H v"]:
        both = jnp.einsum("bsr,rhk->bshk", latent, expand)
        key, value = both[..., : self.spec.qk_nope_head_dim], both[..., self.spec.qk_nope_head_dim :]
        shared = jnp.broadcast_to(turned_key[:, :, None], (*key.shape[:3], turned_key.shape[-1]))
        query = jnp.concatenate([plain, turned], axis=-1)
        key = jnp.concatenate([key, shared], axis=-1)
        return attend(query, key, value, context, backend=self.backend, scale=self.spec.scale)

    def _absorbed(self, plain, turned, latent, turned_key, expand, context) -> Float[Array, "B T H v"]:
        to_key, to_value = (
            expand[..., : self.spec.qk_nope_head_dim],
            expand[..., self.spec.qk_nope_head_dim :],
        )
        query = jnp.concatenate([jnp.einsum("bthn,rhn->bthr", plain, to_key), turned], axis=-1)
        key = jnp.concatenate([latent, turned_key], axis=-1)[:, :, None]
        value = latent[:, :, None]
        attended = attend(query, key, value, context, backend=self.backend, scale=self.spec.scale)
        return jnp.einsum("bthr,rhv->bthv", attended, to_value)
