"""The decoder: embeddings, blocks, final norm. One forward code for training, prefill and decoding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Params, PRNGKeyArray
from rlhf_jax.models.config import Attention, Block, GatedFeedForward, ModelConfig
from rlhf_jax.models.layers import Linear, Scale, apply_rotary, normal_init, rotary_angles

LayerCache = tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]


@pytree_dataclass
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
      layers: (keys, values) for each block of the pattern of each repeat; stacked over the repeats when
        the layers are scanned.
      segment_ids: segment of each column; 0 where the column is padding or not yet written.
      length: columns written.
    """

    layers: Any
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]


class SelfAttention(nn.Module):
    """Grouped-query attention; with a cache, new keys and values are written at column `start`."""

    spec: Attention
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: LayerCache | None,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the block's output and the cache with the new columns."""
        spec, (batch, time, _) = self.spec, inputs.shape
        linear = functools.partial(Linear, param_dtype=self.param_dtype, dtype=self.dtype)

        def project(name: str, heads: int) -> Float[Array, "B T H d"]:
            flat = linear(heads * spec.head_dim, use_bias=spec.bias, name=name)(inputs)
            return flat.reshape(batch, time, heads, spec.head_dim)

        angles = rotary_angles(positions, spec.head_dim, spec.position.theta)
        query = apply_rotary(project("query", spec.num_heads), angles)
        key = apply_rotary(project("key", spec.num_kv_heads), angles)
        value = project("value", spec.num_kv_heads)
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(cache, (key, value), strict=True)
            )
            cache = (key, value)
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        output = linear(self.width, init_std=self.output_std, name="output")
        return output(attended.reshape(batch, time, -1)), cache


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down."""

    spec: GatedFeedForward
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to every token."""
        linear = functools.partial(Linear, param_dtype=self.param_dtype, dtype=self.dtype)
        gate = jax.nn.silu(linear(self.spec.hidden_dim, name="gate")(inputs))
        hidden = gate * linear(self.spec.hidden_dim, name="up")(inputs)
        return linear(self.width, init_std=self.output_std, name="down")(hidden)


class ResidualBlocks(nn.Module):
    """The blocks of one repeat of the pattern."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        caches: tuple[LayerCache | None, ...],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, ...]]:
        """Runs the blocks in order; `caches` has one entry for each."""
        config = self.config
        dtypes = {"param_dtype": jnp.dtype(config.param_dtype), "dtype": jnp.dtype(config.compute_dtype)}
        # Outputs that are added to the residual stream start smaller, by the number of additions.
        common = {"width": config.width, "output_std": 0.02 / (2 * config.num_layers) ** 0.5, **dtypes}
        new_caches = []
        for index, (block, cache) in enumerate(zip(config.pattern, caches, strict=True)):
            prefix = f"block_{index}_" if len(config.pattern) > 1 else ""
            norm = functools.partial(Scale, block.norm.epsilon, dtypes["param_dtype"])
            attention = SelfAttention(block.attention, name=f"{prefix}attention", **common)
            feed_forward = SwiGLU(block.feed_forward, name=f"{prefix}feed_forward", **common)
            attended, cache = attention(
                norm(name=f"{prefix}attention_norm")(hidden), positions, mask, cache, start
            )
            hidden = hidden + attended
            hidden = hidden + feed_forward(norm(name=f"{prefix}feed_forward_norm")(hidden))
            new_caches.append(cache)
        return hidden, tuple(new_caches)


REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Decoder(nn.Module):
    """Tokens to final hidden states; logits are the business of `unembedding` and the log-prob kernel."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with these tokens appended."""
        config = self.config
        param_dtype = jnp.dtype(config.param_dtype)
        embedding = self.param("embedding", normal_init, (config.vocab_size, config.width), param_dtype)
        if not config.tied_embeddings:
            self.param("unembedding", normal_init, (config.vocab_size, config.width), param_dtype)
        hidden = embedding[tokens].astype(jnp.dtype(config.compute_dtype))
        mask, cache_segments, start = _attention_mask(segment_ids, cache)
        layers = cache.layers if cache is not None else _no_cache(config)
        body = ResidualBlocks
        if config.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        if config.scan_layers:
            scanned = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.num_repeats,
            )
            hidden, layers = scanned(config, name="layers")(hidden, layers, positions, mask, start)
        else:
            new_layers = []
            for index in range(config.num_repeats):
                block = body(config, name=f"layer_{index}")
                hidden, new_layer = block(hidden, layers[index], positions, mask, start)
                new_layers.append(new_layer)
            layers = tuple(new_layers)
        hidden = Scale(config.final_norm.epsilon, param_dtype, name="final_norm")(hidden)
        if cache is None:
            return hidden, None
        return hidden, Cache(layers, cache_segments, cache.length + tokens.shape[1])


def _no_cache(config: ModelConfig) -> Any:
    repeat = (None,) * len(config.pattern)
    return repeat if config.scan_layers else (repeat,) * config.num_repeats


def _attention_mask(
    segment_ids: Int[Array, "B T"], cache: Cache | None
) -> tuple[Bool[Array, "B T S"], Int[Array, "B S"], Int[Array, ""]]:
    """Who sees whom: the same segment, not later (so padding, segment 0, sees only padding)."""
    time = jnp.arange(segment_ids.shape[1])
    if cache is None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        return same & (time[:, None] >= time), segment_ids, jnp.int32(0)
    columns = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    same = segment_ids[:, :, None] == columns[:, None, :]
    return same & (cache.length + time[:, None] >= jnp.arange(columns.shape[1])), columns, cache.length


def init_params(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Fresh parameters: nested dicts of arrays."""
    dummy = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, dummy, dummy, dummy + 1)["params"]


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens."""
    dtype = jnp.dtype(config.compute_dtype)

    def empty(block: Block, repeats: tuple[int, ...]) -> LayerCache:
        attention = block.attention
        shape = (*repeats, batch, length, attention.num_kv_heads, attention.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    if config.scan_layers:
        layers = tuple(empty(block, (config.num_repeats,)) for block in config.pattern)
    else:
        layers = tuple(tuple(empty(block, ()) for block in config.pattern) for _ in range(config.num_repeats))
    return Cache(layers, jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Final hidden states of whole rows, without a cache."""
    return Decoder(config).apply({"params": params}, tokens, positions, segment_ids)[0]


def cached_hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Final hidden states of the next tokens of each row, and the cache with them appended."""
    result: Any = Decoder(config).apply({"params": params}, tokens, positions, segment_ids, cache)
    return result


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The output matrix, in the compute dtype."""
    matrix = params["embedding"] if config.tied_embeddings else params["unembedding"]
    return matrix.astype(jnp.dtype(config.compute_dtype))


def logits(config: ModelConfig, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Float32 logits of hidden states; for whole sequences use `kernels.logprobs` instead."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden,
        unembedding(config, params),
        preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
    )


def stack_layers(config: ModelConfig, params: Params) -> Params:
    """Parameters of an unrolled decoder in the layout of a scanned one."""
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layer_")}
    layers = [params[f"layer_{index}"] for index in range(config.num_repeats)]
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(config: ModelConfig, params: Params) -> Params:
    """The inverse of `stack_layers`."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = {
        f"layer_{index}": jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
        for index in range(config.num_repeats)
    }
    return {**rest, **layers}
