"""Multi-token prediction: modules that foresee tokens beyond the next one (DeepSeek-V3 report, section 2.2).

    h'_i^k = M_k [norm(h_i^{k-1}); norm(Emb(t_{i+k}))],   h^k = Block_k(h'^k),   P_{i+k+1}^k = OutHead(h_i^k)

Sequential modules rather than parallel heads (Gloeckle et al. 2024): each keeps the whole causal chain, which
is what a draft for speculative decoding needs, and embedding and output matrix are the model's own, so that a
module costs one block and one projection. h^0 are the model's final hidden states, after its last norm.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Int, Params, PRNGKeyArray, Sequences
from rlhf_jax.models.blocks import ResidualBlocks
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import init_params, whole_context
from rlhf_jax.models.layers import Linear, norm_layer


class MTPModule(nn.Module):
    """One module: states of depth k - 1 and embeddings of the tokens k ahead, to states of depth k."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Applies the module to every place; those without a token k ahead in their segment mean nothing."""
        config = self.config
        param_dtype, dtype = jnp.dtype(config.param_dtype), jnp.dtype(config.compute_dtype)
        assert config.final_norm is not None  # `ModelConfig` sees to it
        norms = [
            norm_layer(config.final_norm, param_dtype, name=f"{name}_norm")
            for name in ("hidden", "embedding")
        ]
        both = jnp.concatenate([norms[0](hidden), norms[1](embeddings)], axis=-1)
        joined = Linear(config.width, param_dtype=param_dtype, dtype=dtype, name="join")(both)
        context = whole_context(positions, segment_ids)
        outputs, _ = ResidualBlocks(config, config.pattern[-1:], name="block")(joined, (None,), context)
        return norm_layer(config.final_norm, param_dtype, name="final_norm")(outputs)


def module_name(depth: int) -> str:
    """Name of the module of this depth, from 1 on, among the model's parameters."""
    return f"further_{depth}"


def init_model(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Fresh parameters of a decoder and of its modules; the decoder's are those it has without them."""
    return {**init_params(config, key), **init_mtp(config, key)}


def param_shapes(config: ModelConfig) -> Params:
    """Shapes of `init_model`'s parameters."""
    return jax.eval_shape(functools.partial(init_model, config), jax.random.key(0))


def init_mtp(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Fresh modules, as many as the configuration has."""
    state = jnp.zeros((1, 1, config.width), jnp.dtype(config.compute_dtype))
    place = jnp.zeros((1, 1), jnp.int32)
    return {
        module_name(depth): MTPModule(config).init(
            jax.random.fold_in(key, depth), state, state, place, place + 1
        )["params"]
        for depth in range(1, config.mtp_depth + 1)
    }


def mtp_hidden_states(
    config: ModelConfig, params: Params, hidden: Float[Array, "B T D"], sequences: Sequences
) -> list[Float[Array, "B T D"]]:
    """States of every depth, from 1 on: that of depth k at column t foresees the token at column t + k + 1.

    Args:
      hidden: the model's final hidden states.
    """
    table = params["embedding"].astype(jnp.dtype(config.compute_dtype))
    states = []
    for depth in range(1, config.mtp_depth + 1):
        embeddings = table[jnp.roll(sequences.tokens, -depth, axis=1)] * config.embedding_scale
        hidden = MTPModule(config).apply(
            {"params": params[module_name(depth)]},
            hidden,
            embeddings.astype(hidden.dtype),
            sequences.positions,
            sequences.segment_ids,
        )  # pyright: ignore[reportAssignmentType] (of one output, without mutable collections)
        states.append(hidden)
    return states
