"""The layers decoders are made of. Our own, so that parameter names and layouts are ours."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Int

normal_init = nn.initializers.normal(stddev=0.02)


class Linear(nn.Module):
    """x W (+ b). Works on [N, D]: on CPU, XLA's weight gradients of [B, T, D] matmuls are far slower.

    Attributes:
      features: output width.
      init_std: standard deviation of the initial weights.
    """

    features: int
    use_bias: bool = False
    init_std: float = 0.02
    param_dtype: Any = jnp.float32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        """Applies the layer over the last axis."""
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype)
        outputs = inputs.reshape(-1, shape[0]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            outputs += bias.astype(self.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.features)


class Scale(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + epsilon) * scale, statistics in float32."""

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (inputs.shape[-1],), self.param_dtype)
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(inputs.dtype)


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T half"]:
    """Angle m theta^(-2 i / d) of position m in dimension pair i (Su et al. 2021, eq. 15)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequencies


def apply_rotary(heads: Float[Array, "B T H d"], angles: Float[Array, "B T half"]) -> Float[Array, "B T H d"]:
    """Rotates the pairs (x_i, x_{i + d/2}) of every head by `angles` (Su et al. 2021, eq. 34)."""
    first, second = jnp.split(heads, 2, axis=-1)
    cos = jnp.cos(angles)[:, :, None].astype(heads.dtype)
    sin = jnp.sin(angles)[:, :, None].astype(heads.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
