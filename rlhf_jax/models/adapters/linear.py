"""Linear layers with the adapter leaves beside their kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Params
from rlhf_jax.models.adapters.quantization import dequantized_kernel

LEAVES = (
    "kernel_values",
    "kernel_scale",
    "kernel_offset",
    "lora_a",
    "lora_b",
    "lora_scale",
    "lora_singular",
    "lora_magnitude",
    "lora_a0",
    "lora_b0",
    "bottleneck_down",
    "bottleneck_up",
)
"""What may stand beside a kernel, or, the first three, in its place."""


def kernel_of(leaves: Params) -> Float[Array, "D F"]:
    """The base's kernel, as it is or out of few bits."""
    return leaves["kernel"] if "kernel" in leaves else dequantized_kernel(leaves)


def low_rank(leaves: Params) -> Float[Array, "D F"]:
    """Low-rank update of the kernel."""
    product = scaled_columns(leaves) @ leaves["lora_b"]
    if "lora_a0" in leaves:
        product -= leaves["lora_a0"] @ leaves["lora_b0"]
    return product * leaves["lora_scale"]


def scaled_columns(leaves: Params) -> Float[Array, "D r"]:
    """The first factor, with singular values where there are any."""
    return leaves["lora_a"] * leaves["lora_singular"] if "lora_singular" in leaves else leaves["lora_a"]


def column_lengths(kernel: Float[Array, "D F"]) -> Float[Array, "F"]:
    """The Euclidean length of each column, in at least float32."""
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(wide**2, axis=0))


def adapted_product(rows: Float[Array, "N D"], leaves: Params, dtype: Any) -> Float[Array, "N F"]:
    """rows W, with what the leaves beside W make of it, in `dtype`."""
    kernel = kernel_of(leaves)
    product = rows @ kernel.astype(dtype)
    if "lora_a" in leaves:
        cast = {name: leaf.astype(dtype) for name, leaf in leaves.items() if name.startswith("lora_")}
        added = (rows @ scaled_columns(cast)) @ cast["lora_b"]
        if "lora_a0" in cast:
            added -= (rows @ cast["lora_a0"]) @ cast["lora_b0"]
        product += added * cast["lora_scale"]
    if "lora_magnitude" in leaves:
        lengths = jax.lax.stop_gradient(column_lengths(kernel + low_rank(leaves)))
        product *= (leaves["lora_magnitude"] / lengths).astype(dtype)
    return product


def through_bottleneck(outputs: Float[Array, "N F"], leaves: Params, dtype: Any) -> Float[Array, "N F"]:
    """outputs + W_up gelu(W_down outputs), where there is a bottleneck."""
    if "bottleneck_down" not in leaves:
        return outputs
    down, up = (leaves[name].astype(dtype) for name in ("bottleneck_down", "bottleneck_up"))
    return outputs + jax.nn.gelu(outputs @ down) @ up
