"""Rollout routing replay (R3, Ma et al. 2025, arXiv 2510.11370): the learner takes the sampler's experts.

A mixture of experts is another function where its routers choose otherwise, and small differences in numbers
are enough for that. So the sampler records the experts that every token went through, and the learner's
forward pass takes them in the place of its own choice. Their weights are the learner's: the scores of the
given experts, through which the routers' gradient flows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.protocols import DecodeFn, ExtendFn, PrefillFn
from rlhf_jax.core.types import Array, Float, Int, Params, Sequences
from rlhf_jax.generation.caches import RecordedCache
from rlhf_jax.models import decoder as decoders
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.router_stats import has_routers

Path = tuple[str, ...]


def _routers(params: Params) -> list[tuple[Path, int]]:
    """(path, how many are stacked there; 0 for one that is not) of the decoder's routers, in order."""

    def within(node: Any, path: Path) -> list[tuple[Path, int]]:
        if not isinstance(node, dict):
            return []
        if path[-1] == "router":
            return [(path, node["kernel"].shape[0] if node["kernel"].ndim == 3 else 0)]
        return [found for name in sorted(node) for found in within(node[name], (*path, name))]

    blocks = (name for name in sorted(params) if name in ("prefix", "layers") or name.startswith("layer_"))
    return [found for name in blocks for found in within(params[name], (name,))]


def _recorded(kept: Any, params: Params, shape: tuple[int, ...]) -> Int[Array, "B T R k"]:
    """What the routers have left of their choices, of all of them."""
    found = []
    for path, count in _routers(params):
        node = kept
        for name in path:
            node = node[name]
        chosen = node["chosen"][0]
        found += list(chosen) if count else [chosen]
    return jnp.stack([chosen.reshape(*shape, -1) for chosen in found], axis=2)


def _to_replay(params: Params, experts: Int[Array, "B T R k"]) -> dict[str, Any]:
    """The variables from which routers take their choices."""
    flat = experts.reshape(-1, *experts.shape[2:]).swapaxes(0, 1)
    tree: dict[str, Any] = {}
    first = 0
    for path, count in _routers(params):
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node["chosen"] = flat[first : first + count] if count else flat[first]
        first += count or 1
    return tree


def replayed_hidden_states(
    config: ModelConfig, params: Params, sequences: Sequences
) -> Float[Array, "B T D"]:
    """Final hidden states of whole rows whose tokens go through `sequences.experts`."""
    assert sequences.experts is not None
    params = decoders.expand_prompt(config, params)
    variables = {"params": params, "replay": _to_replay(params, sequences.experts)}
    inputs = sequences.tokens, sequences.positions, sequences.segment_ids
    return decoders.Decoder(config).apply(variables, *inputs, images=sequences.images)[0]


def make_recording_fns(config: ModelConfig) -> tuple[PrefillFn, DecodeFn, ExtendFn]:
    """(prefill, decode, extend), as of `decode_fns`, that record which experts each token goes through.

    Raises:
      UserError: the model has no router.
    """
    if not has_routers(config):
        raise UserError("routing replay: the model has no mixture of experts")

    def read(
        params: Params, cache: decoders.Cache, *inputs: Int[Array, "B T"], fresh: bool = False
    ) -> tuple[Float[Array, "B T V"], decoders.Cache, Int[Array, "B T R k"]]:
        params = decoders.expand_prompt(config, params)
        result: Any = decoders.Decoder(config).apply(
            {"params": params}, *inputs, cache, fresh=fresh, mutable=["routing"]
        )
        (hidden, cache), kept = result
        experts = _recorded(kept["routing"], params, inputs[0].shape)
        hidden = hidden[:, -1:] if fresh else hidden
        return decoders.logits(config, params, hidden), cache, experts

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "B V"], RecordedCache]:
        cache = decoders.init_cache(config, tokens.shape[0], length)
        logits, cache, experts = read(params, cache, tokens, positions, segment_ids, fresh=True)
        room = ((0, 0), (0, length - tokens.shape[1]), (0, 0), (0, 0))
        return logits[:, -1], RecordedCache(cache, jnp.pad(experts, room, constant_values=-1))

    def decode(
        params: Params, cache: RecordedCache, token: Int[Array, "B"], position: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], RecordedCache]:
        column = cache.cache.length
        inputs = token[:, None], position[:, None], jnp.ones_like(token)[:, None]
        logits, inner, experts = read(params, cache.cache, *inputs)
        recorded = jax.lax.dynamic_update_slice_in_dim(cache.experts, experts, column, axis=1)
        return logits[:, -1], RecordedCache(inner, recorded)

    def extend(
        params: Params,
        cache: RecordedCache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B n V"], RecordedCache]:
        shortened = dataclasses.replace(cache.cache, length=columns)
        logits, inner, experts = read(params, shortened, tokens, positions, jnp.ones_like(tokens))
        inner = dataclasses.replace(inner, length=cache.cache.length)
        rows, places = jnp.arange(len(tokens))[:, None], columns[:, None] + jnp.arange(tokens.shape[1])
        # A row that has used all of its room goes on beside the others, and leaves nothing.
        return logits, RecordedCache(inner, cache.experts.at[rows, places].set(experts, mode="drop"))

    return prefill, decode, extend


def recorded_shape(config: ModelConfig, params: Params) -> tuple[int, ...]:
    """(R, k): how many experts are recorded of a token."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    prefill, _, _ = make_recording_fns(config)
    _, cache = jax.eval_shape(lambda params, x: prefill(params, x, x, x, 1), params, token)
    return cache.experts.shape[2:]
