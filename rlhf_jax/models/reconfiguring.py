"""Another precision, memory plan or layout of a model that exists already: the function stays the same."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import map_named
from rlhf_jax.core.types import Params
from rlhf_jax.models.adapters import is_adapter_leaf
from rlhf_jax.models.config import AttentionBackend, ModelConfig, Remat
from rlhf_jax.models.decoder import stack_layers, unstack_layers

DTYPES = ("float32", "bfloat16", "float16", "float64")
UNROLLED = 8
"""Up to so many layers are unrolled by default: faster on CPU, and still quick to compile."""


def default_dtype() -> str:
    """The dtype of computation where none is named: bfloat16 on GPUs and TPUs, which have it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def scans_by_default(config: ModelConfig) -> bool:
    """Default of `scan_layers`: layers are many, and their pattern repeats."""
    return config.num_layers > UNROLLED and config.num_repeats > 1


def check_dtype(name: str, dtype: str | None) -> None:
    """Raises: UserError for what is no dtype of parameters or computation."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{name}={dtype!r} is none of {', '.join(DTYPES)}: choose one of them.")


def reconfigure(
    config: ModelConfig,
    params: Params,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: Remat | None = None,
    scan_layers: bool | None = None,
    attention_backend: AttentionBackend | None = None,
) -> tuple[ModelConfig, Params]:
    """A model with another precision, memory plan or layout; what is None stays as it is.

    Args:
      params: of a decoder, or a tree that holds decoders (with a head, as actor and critic). Kernels in few
        bits and adapter leaves keep their dtype.
      dtype: of computation.
      param_dtype: of parameters.
      remat: what the backward pass computes again.
      scan_layers: whether layers are stacked and run as one scan.
      attention_backend: how attention is computed.

    Raises:
      UserError: there is no such dtype, or an adapter that is not on every layer forbids to stack them.
    """
    check_dtype("dtype", dtype)
    check_dtype("param_dtype", param_dtype)
    changes: dict[str, Any] = {
        "compute_dtype": dtype,
        "param_dtype": param_dtype,
        "remat": remat,
        "scan_layers": scan_layers,
        "attention_backend": attention_backend,
    }
    new = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    if new.scan_layers != config.scan_layers:
        params = _restacked(config, params)
    if param_dtype is not None:
        params = _cast(params, jnp.dtype(param_dtype))
    return new, params


def _restacked(config: ModelConfig, node: Params) -> Params:
    """Every decoder in the tree in the other layout."""
    if "layer_0" in node:
        try:
            return stack_layers(config, node)
        except ValueError as error:  # of trees that differ
            raise UserError(
                "The adapter is not on every layer in the same way, so that scan_layers=True cannot stack "
                "them: leave scan_layers False, or let its targets match all layers."
            ) from error
    if "layers" in node:
        return unstack_layers(config, node)
    return {
        key: _restacked(config, child) if isinstance(child, dict) else child for key, child in node.items()
    }


def _cast(params: Params, dtype: Any) -> Params:
    def cast(name: str, leaf: jax.Array) -> jax.Array:
        kept = is_adapter_leaf(name) or "/kernel_" in name
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_float and not kept else leaf

    return map_named(cast, params)
