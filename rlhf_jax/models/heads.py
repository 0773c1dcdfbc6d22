"""Scalar heads on a decoder: rewards after a token, values before one."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Params, PRNGKeyArray
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import init_params


def init_scalar_head(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """`init_head` for a decoder of ours."""
    return init_head(config.width, key, jnp.dtype(config.param_dtype))


def init_head(width: int, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Params:
    """A linear head D -> 1, weights of variance 1 / (D + 1) (Stiennon et al. 2020, appendix B.1).

    Args:
      width: D.
    """
    kernel = (width + 1) ** -0.5 * jax.random.normal(key, (width,), dtype)
    return {"kernel": kernel, "bias": jnp.zeros((), kernel.dtype)}


def init_scalar_model(config: ModelConfig, key: PRNGKeyArray, decoder: Params | None = None) -> Params:
    """A decoder with a scalar head; `decoder` gives the body (an SFT policy), else it is fresh."""
    body_key, head_key = jax.random.split(key)
    body = init_params(config, body_key) if decoder is None else decoder
    return {"decoder": body, "head": init_scalar_head(config, head_key)}


def apply_scalar_head(head: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """One float32 number for each hidden state."""
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return wide @ head["kernel"].astype(wide.dtype) + head["bias"].astype(wide.dtype)
