"""Models as the callables that samplers know: prefill, decode, extend."""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.core.protocols import DecodeFn, ExtendFn, HiddenExtendFn, HiddenPrefillFn, PrefillFn
from rlhf_jax.core.types import Array, Float, Images, Int, Params
from rlhf_jax.models import decoder as decoders
from rlhf_jax.models.config import ModelConfig


def make_decode_fns(config: ModelConfig) -> tuple[PrefillFn, DecodeFn]:
    """(prefill, decode) for `generation.generate`; see `core.protocols` for what they promise."""

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
        images: Images | None = None,
    ) -> tuple[Float[Array, "B V"], decoders.Cache]:
        cache = decoders.init_cache(config, tokens.shape[0], length)
        hidden, cache = decoders.cached_hidden_states(
            config, params, tokens, positions, segment_ids, cache, fresh=True, images=images
        )
        return decoders.logits(config, params, hidden[:, -1]), cache

    def decode(
        params: Params,
        cache: decoders.Cache,
        token: Int[Array, "B"],
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], decoders.Cache]:
        hidden, cache = decoders.cached_hidden_states(
            config, params, token[:, None], position[:, None], jnp.ones_like(token)[:, None], cache
        )
        return decoders.logits(config, params, hidden[:, 0]), cache

    return prefill, decode


def make_hidden_decode_fns(config: ModelConfig) -> tuple[HiddenPrefillFn, HiddenExtendFn]:
    """(prefill, extend) as of `make_decode_fns` and `make_extend_fn`, which also give the final hidden
    states: (logits, hidden [B, T, D], cache).
    """

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B P D"], decoders.Cache]:
        cache = decoders.init_cache(config, tokens.shape[0], length)
        hidden, cache = decoders.cached_hidden_states(
            config, params, tokens, positions, segment_ids, cache, fresh=True
        )
        return decoders.logits(config, params, hidden[:, -1]), hidden, cache

    def extend(
        params: Params,
        cache: decoders.Cache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B n V"], Float[Array, "B n D"], decoders.Cache]:
        segment_ids = jnp.ones_like(tokens)
        shortened = dataclasses.replace(cache, length=columns)
        hidden, extended = decoders.cached_hidden_states(
            config, params, tokens, positions, segment_ids, shortened
        )
        extended = dataclasses.replace(extended, length=cache.length)
        return decoders.logits(config, params, hidden), hidden, extended

    return prefill, extend


def make_extend_fn(config: ModelConfig) -> ExtendFn:
    """`extend` for continuous batching and speculative decoding, with the cache of `make_decode_fns`; see
    `core.protocols.ExtendFn`.
    """
    _, hidden_extend = make_hidden_decode_fns(config)

    def extend(
        params: Params,
        cache: decoders.Cache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B n V"], decoders.Cache]:
        logits, _, cache = hidden_extend(params, cache, tokens, positions, columns)
        return logits, cache

    return extend


def make_layer_decode_fns(config: ModelConfig, layers: tuple[int, ...]) -> tuple[PrefillFn, DecodeFn]:
    """(prefill, decode) as of `make_decode_fns`, with logits [L, B, V] of several layers, the last one last.

    Args:
      layers: how many repeats of the pattern of blocks come before each early prediction; the output matrix
        is applied to what they leave as it is. 0 is the embedding.
    """
    unrolled = dataclasses.replace(config, scan_layers=False, remat="none")

    def read(
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: decoders.Cache,
    ) -> tuple[Float[Array, "L B V"], decoders.Cache]:
        if config.scan_layers:
            params = decoders.unstack_layers(config, params)
        hidden, between, cache = decoders.layer_hidden_states(
            unrolled, params, tokens, positions, segment_ids, cache
        )
        last = jnp.stack([*(between[layer][:, -1] for layer in layers), hidden[:, -1]])
        return decoders.logits(unrolled, params, last), cache

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "L B V"], decoders.Cache]:
        cache = decoders.init_cache(unrolled, tokens.shape[0], length)
        return read(params, tokens, positions, segment_ids, cache)

    def decode(
        params: Params, cache: decoders.Cache, token: Int[Array, "B"], position: Int[Array, "B"]
    ) -> tuple[Float[Array, "L B V"], decoders.Cache]:
        return read(params, token[:, None], position[:, None], jnp.ones_like(token)[:, None], cache)

    return prefill, decode
