"""The decoder: embeddings, blocks, final norm. One forward code for training, prefill and decoding."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.axes import all_gathered, constrain, mesh_size
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import merge, pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Images, Int, Params, PRNGKeyArray
from rlhf_jax.kernels.logprobs import softcapped
from rlhf_jax.models.attention.backends import ATTENTION_NAMES, AttentionContext
from rlhf_jax.models.attention.modules import write_columns
from rlhf_jax.models.blocks import ResidualBlocks, laid_out
from rlhf_jax.models.builders import empty_cache, keep
from rlhf_jax.models.config import Block, ModelConfig
from rlhf_jax.models.layers import norm_layer, normal_init
from rlhf_jax.models.pipeline import pipelined
from rlhf_jax.models.vision.encoder import VisionTower, place_features


@pytree_dataclass
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
      prefix: what attention keeps (keys and values, or latents) for each block of the prefix.
      layers: the same for each block of the pattern of each repeat; stacked over the repeats when the
        layers are scanned.
      segment_ids: segment of each column; 0 where the column is padding or not yet written.
      positions: position of each column within its segment.
      length: columns written; of all rows, or of each.
    """

    prefix: Any
    layers: Any
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    length: Int[Array, "*B"]


_OF_ROUTERS = ("routing", "replay")  # collections that routers write and read, a repeat after the other

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # The feed-forward, whose hidden activations are the widest, is computed again from its input.
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES, "feed_forward_input"),
    "full": None,
}


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
        *,
        fresh: bool = False,
        soft: Float[Array, "B T D"] | None = None,
        images: Images | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with these tokens appended.

        Args:
          fresh: the cache is empty, so that these tokens see one another alone.
          soft: stands in the place of the tokens' embeddings, those of positions included.
          images: whose features stand in the places of the image token.
        """
        config = self.config
        hidden = self._embed(tokens, positions, segment_ids, soft, images)
        context, columns = _context(positions, segment_ids, cache, fresh)
        prefix, layers = (cache.prefix, cache.layers) if cache is not None else _no_cache(config)
        body = ResidualBlocks
        if config.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        if config.prefix:
            hidden, prefix = body(config, config.prefix, name="prefix")(hidden, prefix, context)
        stages = 1 if cache is not None or self.is_initializing() else _stages(config)
        kept = any(self.is_mutable_collection(name) or name in self.variables for name in _OF_ROUTERS)
        if stages > 1 and not kept:
            layer_params = self.variables["params"]["layers"]
            stage_fn = functools.partial(_run_layers, config)
            hidden = pipelined(stage_fn, layer_params, hidden, positions, segment_ids, stages=stages)
        elif config.scan_layers:
            scanned = nn.scan(
                body,
                variable_axes={"params": 0, **dict.fromkeys(_OF_ROUTERS, 0)},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.num_repeats,
            )
            hidden, layers = scanned(config, config.pattern, name="layers")(hidden, layers, context)
        else:
            new_layers = []
            for index in range(config.num_repeats):
                block = body(config, config.pattern, name=f"layer_{index}")
                hidden, new_layer = block(hidden, layers[index], context)
                new_layers.append(new_layer)
            layers = tuple(new_layers)
        if config.final_norm is not None:
            hidden = norm_layer(config.final_norm, jnp.dtype(config.param_dtype), name="final_norm")(hidden)
        if cache is None:
            return hidden, None
        # Written here, once, so that no layer copies what it only reads.
        prefix = _kept(config.prefix, cache.prefix, prefix, context.start)
        if config.scan_layers:
            layers = _kept(config.pattern, cache.layers, layers, context.start, stacked=True)
        else:
            both = zip(cache.layers, layers, strict=True)
            layers = tuple(_kept(config.pattern, old, new, context.start) for old, new in both)
        return hidden, Cache(prefix, layers, *columns, cache.length + tokens.shape[1])

    def _embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        soft: Float[Array, "B T D"] | None,
        images: Images | None,
    ) -> Float[Array, "B T D"]:
        config = self.config
        param_dtype, dtype = jnp.dtype(config.param_dtype), jnp.dtype(config.compute_dtype)
        shape = (config.vocab_size, config.width)
        embedding = self.param("embedding", normal_init, shape, param_dtype)
        if not config.tie_word_embeddings:
            self.param("unembedding", normal_init, shape, param_dtype)
        # Gathered over the embedding's width first: rows are looked up whole, and so are their gradients
        # summed, before each device keeps its part.
        table = constrain(all_gathered(embedding, "vocab", "embed"), "vocab", None)
        hidden = (table[tokens] if soft is None else soft).astype(dtype)
        if config.embedding_scale != 1:
            hidden *= jnp.asarray(config.embedding_scale, dtype)
        if images is not None:
            hidden = self._with_images(hidden, tokens, segment_ids, images)
        if config.learned_positions is not None:
            shape = (config.learned_positions, config.width)
            table = self.param("position_embedding", normal_init, shape, param_dtype)
            table = constrain(all_gathered(table, None, "embed"), None, None)
            hidden += table[positions].astype(dtype) if soft is None else 0
        if config.embedding_norm is not None:
            hidden = norm_layer(config.embedding_norm, param_dtype, name="embedding_norm")(hidden)
        return laid_out(hidden)

    def _with_images(
        self,
        embeddings: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        images: Images,
    ) -> Float[Array, "B T D"]:
        config, vision = self.config, self.config.vision
        if vision is None:
            raise UserError("the model reads no images: leave them out, or give a model with vision")
        dtypes: dict[str, Any] = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
        tower = VisionTower(vision, config.width, remat=config.remat, name="vision", **dtypes)
        rows, number = images.present.shape
        features = tower(images.pixels.reshape(rows * number, *images.pixels.shape[2:]))
        features = features.reshape(rows, number * vision.tokens_per_image, config.width)
        count = jnp.sum(images.present, axis=1) * vision.tokens_per_image
        places = (tokens == vision.image_token_id) & (segment_ids > 0)
        return place_features(embeddings, places, features, count)


def _kept(
    blocks: Sequence[Block], caches: Any, new: Any, start: Int[Array, "*B"], *, stacked: bool = False
) -> Any:
    """The caches of some blocks with what their layers return."""
    each = zip(blocks, caches, new, strict=True)
    return tuple(keep(block, cache, added, start, stacked=stacked) for block, cache, added in each)


def _stages(config: ModelConfig) -> int:
    """Stages of the entered mesh's pipeline; 1 without one.

    Raises:
      UserError: the layers cannot be dealt out to them.
    """
    stages = mesh_size("layers")
    if stages > 1 and not (config.scan_layers and config.num_repeats % stages == 0):
        layers = f"{config.num_repeats} scanned" if config.scan_layers else "layers that are not scanned"
        raise UserError(
            f"pipeline={stages} on the mesh needs layers that are scanned (scan_layers=True) and that "
            f"{stages} divides, and this model has {layers}; change one of them, or use another axis."
        )
    return stages


def _run_layers(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Stacked layers one after the other, without a cache."""
    context, caches = whole_context(positions, segment_ids), (None,) * len(config.pattern)
    blocks = ResidualBlocks(config, config.pattern, parent=None)

    def layer(hidden: Array, params: Params) -> tuple[Array, None]:
        return blocks.apply({"params": params}, hidden, caches, context)[0], None

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    return jax.lax.scan(layer, hidden, params)[0]


def _no_cache(config: ModelConfig) -> tuple[Any, Any]:
    repeat = (None,) * len(config.pattern)
    layers = repeat if config.scan_layers else (repeat,) * config.num_repeats
    return (None,) * len(config.prefix), layers


def _context(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cache: Cache | None, fresh: bool
) -> tuple[AttentionContext, tuple[Int[Array, "B S"], Int[Array, "B S"]]]:
    """Attention context with a cache: the same segment, not later (padding, segment 0, sees only padding).

    Returns:
      the context, and segments and positions of all columns, those of the cache included.
    """
    time = jnp.arange(segment_ids.shape[1])
    start, segments, key_positions = jnp.int32(0), segment_ids, positions
    if cache is not None:
        start = cache.length
        segments = write_columns(cache.segment_ids, segment_ids, start)
        key_positions = write_columns(cache.positions, positions, start)
    if cache is None or fresh:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (time[:, None] >= time)
        context = AttentionContext(positions, positions, mask, start, segment_ids, segment_ids > 0)
    else:
        same = segment_ids[:, :, None] == segments[:, None, :]
        mask = same & (start.reshape(-1, 1, 1) + time[:, None] >= jnp.arange(segments.shape[1]))
        context = AttentionContext(positions, key_positions, mask, start, None, segment_ids > 0)
    return context, (segments, key_positions)


def whole_context(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> AttentionContext:
    """Attention context of whole rows, without a cache."""
    return _context(positions, segment_ids, None, True)[0]


def init_params(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Fresh parameters: nested dicts of arrays."""
    dummy = jnp.zeros((1, 1), jnp.int32)
    images = None
    if config.vision is not None:
        pixels = jnp.zeros((1, 1, config.vision.image_size, config.vision.image_size, 3), jnp.uint8)
        images = Images(pixels, dummy > 0)
    return Decoder(config).init(key, dummy, dummy, dummy + 1, images=images)["params"]


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens."""
    dtype = jnp.dtype(config.compute_dtype)

    shape = (batch, length)
    prefix = tuple(empty_cache(block, shape, dtype) for block in config.prefix)
    if config.scan_layers:
        stacked = (config.num_repeats, *shape)
        layers = tuple(empty_cache(block, stacked, dtype) for block in config.pattern)
    else:
        repeats = range(config.num_repeats)
        layers = tuple(tuple(empty_cache(block, shape, dtype) for block in config.pattern) for _ in repeats)
    columns = jnp.zeros(shape, jnp.int32)
    return Cache(prefix, layers, columns, columns, jnp.int32(0))


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    images: Images | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states of whole rows, without a cache."""
    params = expand_prompt(config, params)
    return Decoder(config).apply({"params": params}, tokens, positions, segment_ids, images=images)[0]


def cached_hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: Cache,
    *,
    fresh: bool = False,
    images: Images | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Final hidden states of the next tokens of each row, and the cache with them appended.

    Args:
      fresh: nothing was read before; the tokens need not look into the cache then.
    """
    params = expand_prompt(config, params)
    result: Any = Decoder(config).apply(
        {"params": params}, tokens, positions, segment_ids, cache, fresh=fresh, images=images
    )
    return result


def layer_hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], list[Float[Array, "B T D"]], Cache]:
    """`cached_hidden_states` of unrolled layers, with what goes into each repeat of the pattern."""

    def wanted(module: nn.Module, method: str) -> bool:
        return (isinstance(module, ResidualBlocks) and method == "__call__") or method == "_embed"

    result: Any = Decoder(config).apply(
        {"params": params},
        tokens,
        positions,
        segment_ids,
        cache,
        capture_intermediates=wanted,
        mutable=["intermediates"],
    )
    (hidden, new_cache), captured = result
    kept = captured["intermediates"]
    names = ["prefix"] * bool(config.prefix) + [f"layer_{index}" for index in range(config.num_repeats)]
    outputs = [kept["_embed"][0], *(kept[name]["__call__"][0][0] for name in names)]
    return hidden, outputs[bool(config.prefix) : -1], new_cache


def expand_prompt(config: ModelConfig, params: Params) -> Params:
    """Parameters in which a trained prompt (`adapters.PromptTuning`) has become, in every attention layer,
    the columns that attention keeps of it: these depend on nothing that follows. Others stay as they are.
    """
    if "prompt_embedding" not in params:
        return params
    soft = params["prompt_embedding"][None]
    length = soft.shape[1]
    expanded = {name: leaf for name, leaf in params.items() if name != "prompt_embedding"}
    positions = jnp.arange(-length, 0)[None]  # relative positions alone count, and samples begin at 0
    ones = jnp.ones_like(positions)
    result: Any = Decoder(config).apply(
        {"params": expanded}, ones, positions, ones, init_cache(config, 1, length), fresh=True, soft=soft
    )
    cache: Cache = result[1]
    groups = (
        {"prefix": cache.prefix, "layers": cache.layers}
        if config.scan_layers
        else {"prefix": cache.prefix, **{f"layer_{index}": kept for index, kept in enumerate(cache.layers)}}
    )
    for group, blocks in groups.items():
        for index, columns in enumerate(blocks):
            name = f"block_{index}_attention" if len(blocks) > 1 else "attention"
            leaves = {f"prompt_{number}": column for number, column in enumerate(columns)}
            expanded = merge(expanded, {group: {name: leaves}})
    return expanded


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The output matrix, in the compute dtype."""
    matrix = params["embedding"] if config.tie_word_embeddings else params["unembedding"]
    return all_gathered(matrix, "vocab", "embed").astype(jnp.dtype(config.compute_dtype))


def logits(config: ModelConfig, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Float32 logits of hidden states; for whole sequences use `kernels.logprobs` instead."""
    product = jnp.einsum(
        "...d,vd->...v",
        hidden,
        unembedding(config, params),
        preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
    )
    return softcapped(
        constrain(product, "batch", *(None,) * (product.ndim - 2), "vocab"), config.logit_softcap
    )


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits after every token of whole rows: the plain way to call a model. Training and sampling use
    `make_logprob_fn` and `make_decode_fns`, which never hold all logits.

    Args:
      mask: where there is a token rather than padding, on either side; everywhere by default.
      positions: counted along the mask by default.

    Returns:
      Float32 logits, meaningless where masked.
    """
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden = hidden_states(config, params, tokens, positions, mask.astype(jnp.int32))
    return logits(config, params, hidden)


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
