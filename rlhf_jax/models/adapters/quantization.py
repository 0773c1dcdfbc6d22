"""Kernels in few bits, by qwix: `kernel_values` and `kernel_scale` stand in the place of `kernel`, and from
some GGUF files `kernel_offset` as well (see `models.gguf_blocks`)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import optional
from rlhf_jax.core.types import Array, Float, Params
from rlhf_jax.models.adapters.config import Quantization
from rlhf_jax.models.adapters.trees import map_linears

QTYPES = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4", "fp8": jnp.float8_e4m3fn}


def quantize(config: Quantization, params: Params) -> Params:
    """The parameters of a decoder with the kernels of its linear layers in few bits.

    Raises:
      UserError: there are adapters in them.
    """

    def change(path: str, leaves: Params) -> Params:
        if set(leaves) - {"kernel", "bias"}:
            raise UserError(f"{path}: only a plain base is quantised: merge its adapter first")
        kernel = leaves["kernel"]
        quantize_one = jax.vmap(lambda k: _quantized(config, k)) if kernel.ndim == 3 else None
        values, scale = quantize_one(kernel) if quantize_one else _quantized(config, kernel)
        rest = {name: leaf for name, leaf in leaves.items() if name != "kernel"}
        return {**rest, "kernel_values": values, "kernel_scale": scale}

    return map_linears(change, params)


def _quantized(config: Quantization, kernel: Float[Array, "D F"]) -> tuple[Array, Array]:
    tiles = {0: math.gcd(kernel.shape[0], config.block)} if config.format in ("int4", "nf4") else {}
    qwix = optional("qwix", extra="quant")
    array = qwix.quantize(kernel, QTYPES[config.format], channelwise_axes=(1,), tiled_axes=tiles)
    return array.qvalue, array.scale


def dequantized_kernel(leaves: Params) -> Float[Array, "D F"]:
    """The kernel that `kernel_values`, `kernel_scale` and `kernel_offset` stand for."""
    qwix = optional("qwix", extra="quant")
    values, scale = leaves["kernel_values"], leaves["kernel_scale"]
    # The values' dtype tells the formats apart: buckets of nf4 are the only ones without a sign.
    qtype: Any = "nf4" if values.dtype == jnp.uint4 else values.dtype
    kernel = qwix.dequantize(qwix.QArray(values, scale, qtype=qtype))
    if "kernel_offset" not in leaves:
        return kernel
    return kernel + jnp.repeat(leaves["kernel_offset"], len(kernel) // len(scale), axis=0)


def dequantize(params: Params) -> Params:
    """The inverse of `quantize`, to within the formats' precision."""

    def change(path: str, leaves: Params) -> Params:
        del path
        if "kernel_values" not in leaves:
            return leaves
        held = {name: leaf for name, leaf in leaves.items() if name.startswith("kernel_")}
        stacked = leaves["kernel_values"].ndim == 3
        kernel = (jax.vmap(dequantized_kernel) if stacked else dequantized_kernel)(held)
        return {**{name: leaf for name, leaf in leaves.items() if name not in held}, "kernel": kernel}

    return map_linears(change, params)
