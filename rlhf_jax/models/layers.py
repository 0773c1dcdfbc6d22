"""The layers decoders are made of. Our own, so that parameter names and layouts are ours."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.axes import shards
from rlhf_jax.core.types import Array, Float
from rlhf_jax.models import config
from rlhf_jax.models.adapters import linear as adapters
from rlhf_jax.models.config import Activation, Norm

normal_init = nn.initializers.normal(stddev=0.02)


class Linear(nn.Module):
    """x W (+ b). Works on [N, D]: on CPU, XLA's weight gradients of [B, T, D] matmuls are far slower. Not
    where columns are split over devices, for rows of such a matrix could not be.

    Adapter leaves among its parameters change what it computes (`models.adapters`); fresh ones have none.

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
        present = (name for name in adapters.LEAVES if self.has_variable("params", name))
        leaves = {name: self.get_variable("params", name) for name in present}
        if "kernel_values" not in leaves:
            init = nn.initializers.normal(self.init_std)
            leaves["kernel"] = self.param("kernel", init, shape, self.param_dtype)
        split = inputs.ndim > 2 and shards("time", inputs.shape[-2]) > 1
        rows = inputs if split else inputs.reshape(-1, shape[0])
        outputs = adapters.adapted_product(rows.astype(self.dtype), leaves, self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            outputs += bias.astype(self.dtype)
        outputs = adapters.through_bottleneck(outputs, leaves, self.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + epsilon) * scale, statistics in float32."""

    spec: config.RMSNorm
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        init = nn.initializers.zeros if self.spec.offset else nn.initializers.ones
        scale = self.param("scale", init, (inputs.shape[-1],), self.param_dtype)
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.spec.epsilon)
        # 1 is added in the wide dtype: a bfloat16 scale near 1 would lose most of its offset.
        scale = 1 + scale.astype(wide.dtype) if self.spec.offset else scale
        return (normed * scale).astype(inputs.dtype)


class LayerNorm(nn.Module):
    """LayerNorm: (x - mean) / sqrt(variance + epsilon) * scale + bias, statistics in float32."""

    spec: config.LayerNorm
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        shape = (inputs.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.spec.epsilon)
        return (normed * scale + bias).astype(inputs.dtype)


def norm_layer(spec: Norm, param_dtype: Any, *, name: str) -> nn.Module:
    """The layer of a norm's description."""
    match spec:
        case config.RMSNorm():
            return RMSNorm(spec, param_dtype, name=name)
        case config.LayerNorm():
            return LayerNorm(spec, param_dtype, name=name)


def activate(inputs: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """The non-linearity of feed-forwards."""
    match activation:
        case "silu":
            return jax.nn.silu(inputs)
        case "gelu":
            return jax.nn.gelu(inputs, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(inputs, approximate=True)
