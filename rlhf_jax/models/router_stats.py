"""Router statistics of a batch, and biases that even out the load of experts."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import map_named
from rlhf_jax.core.types import Array, Float, Params, Routing, Scalar, Sequences
from rlhf_jax.models.config import MixtureOfExperts, ModelConfig
from rlhf_jax.models.decoder import Decoder, expand_prompt


def has_routers(config: ModelConfig) -> bool:
    """True where any feed-forward is a mixture of experts."""
    return any(isinstance(block.feed_forward, MixtureOfExperts) for block in config.blocks)


def routed_hidden_states(
    config: ModelConfig, params: Params, sequences: Sequences
) -> tuple[Float[Array, "B T D"], dict[str, Routing]]:
    """Final hidden states of whole rows, and what every router did, by the path of its parameters."""
    inputs = sequences.tokens, sequences.positions, sequences.segment_ids
    variables = {"params": expand_prompt(config, params)}
    result: Any = Decoder(config).apply(variables, *inputs, mutable=["routing"], images=sequences.images)
    (hidden, _), kept = result
    present = (sequences.segment_ids > 0).reshape(-1)
    return hidden, _summed(kept["routing"], present)


def _summed(node: dict[str, Any], present: Array, path: str = "") -> dict[str, Routing]:
    """Sums over the tokens that are present, of every router in a tree of what routers left."""
    if "chosen" not in node:
        found = [_summed(child, present, f"{path}/{name}" if path else name) for name, child in node.items()]
        return {name: routing for part in found for name, routing in part.items()}
    chosen, probabilities, normaliser = (node[name][0] for name in ("chosen", "probabilities", "normaliser"))
    weight = present.astype(probabilities.dtype)
    experts = jnp.arange(probabilities.shape[-1])
    picked = jnp.sum(chosen[..., None] == experts, axis=-2) * weight[:, None]
    # Padding may hold anything.
    sound = jnp.where(present[:, None], probabilities, 0)
    squared = jnp.where(present, normaliser, 0) ** 2
    sums = jax.lax.stop_gradient(jnp.sum(picked, axis=-2)), jnp.sum(sound, axis=-2), jnp.sum(squared, axis=-1)
    return {path: Routing(*sums, jnp.sum(weight))}


def rebalance(params: Params, routing: dict[str, Routing], rate: Scalar) -> Params:
    """Parameters with the routers' biases moved towards an even load (Wang et al. 2024, algorithm 1).

        b_e <- b_e + rate sign(mean load - load_e)

    Routers without a bias (`SoftmaxRouter`) stay as they are, and so do those that are not among the
    parameters, because they are frozen.

    Args:
      routing: of the whole batch.
      rate: 0.001 in the paper.
    """

    def moved(name: str, leaf: Array) -> Array:
        path, _, last = name.rpartition("/")
        if last != "bias" or path not in routing:
            return leaf
        load = routing[path].assignments
        lack = jnp.mean(load, axis=-1, keepdims=True) - load
        return leaf + (rate * jnp.sign(lack)).astype(leaf.dtype)

    return map_named(moved, params)
