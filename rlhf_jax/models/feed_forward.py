"""Feed-forward layers: plain, gated, and mixtures of gated experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Int
from rlhf_jax.models.config import (
    FeedForward,
    GatedFeedForward,
    MixtureOfExperts,
    SigmoidRouter,
    SoftmaxRouter,
)
from rlhf_jax.models.layers import Linear, activate, normal_init


class Gated(nn.Module):
    """(activation(x W_gate) * x W_up) W_down."""

    spec: GatedFeedForward
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to every token."""
        linear = functools.partial(
            Linear, use_bias=self.spec.bias, param_dtype=self.param_dtype, dtype=self.dtype
        )
        gate = activate(linear(self.spec.hidden_dim, name="gate")(inputs), self.spec.activation)
        hidden = gate * linear(self.spec.hidden_dim, name="up")(inputs)
        return linear(self.width, init_std=self.output_std, name="down")(hidden)


class Plain(nn.Module):
    """activation(x W_up + b) W_down + b."""

    spec: FeedForward
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to every token."""
        linear = functools.partial(Linear, use_bias=True, param_dtype=self.param_dtype, dtype=self.dtype)
        hidden = activate(linear(self.spec.hidden_dim, name="up")(inputs), self.spec.activation)
        return linear(self.width, init_std=self.output_std, name="down")(hidden)


class Routing(nn.Module):
    """Which experts each token goes through, and with what weights."""

    spec: MixtureOfExperts
    param_dtype: Any

    @nn.compact
    def __call__(self, flat: Float[Array, "N D"]) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
        """Float32 throughout: a choice that rounding flips is another function."""
        shape = (flat.shape[-1], self.spec.num_experts)
        kernel = self.param("kernel", normal_init, shape, self.param_dtype)
        wide = jnp.promote_types(flat.dtype, jnp.float32)
        logits = flat.astype(wide) @ kernel.astype(wide)
        match self.spec.router:
            case SoftmaxRouter() as router:
                scores = jax.nn.softmax(logits, axis=-1)
                preference, ranked = scores, 1
            case SigmoidRouter() as router:
                scores = jax.nn.sigmoid(logits)
                bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
                preference, ranked = scores + jax.lax.stop_gradient(bias), 2
        preference = _within_best_groups(preference, router, ranked)
        chosen = jax.lax.top_k(preference, self.spec.experts_per_token)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if router.renormalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return weights * router.scale, chosen


class Mixture(nn.Module):
    """sum_e weight_e expert_e(x) over the chosen experts, plus the shared one. No token is dropped.

    Tokens are sorted by expert and every expert's slice is multiplied with its own matrices
    (`jax.lax.ragged_dot`), so that the work is that of the chosen experts alone.
    """

    spec: MixtureOfExperts
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to every token."""
        spec, flat = self.spec, inputs.reshape(-1, self.width).astype(self.dtype)
        weights, chosen = Routing(spec, self.param_dtype, name="router")(flat)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        token = order // spec.experts_per_token
        sizes = jnp.bincount(chosen.reshape(-1), length=spec.num_experts).astype(jnp.int32)
        expert_out = self._experts(flat[token], sizes)
        weighted = expert_out * weights.reshape(-1)[order, None].astype(expert_out.dtype)
        output = jnp.zeros(flat.shape, weighted.dtype).at[token].add(weighted).astype(self.dtype)
        if spec.shared is not None:
            options = {"param_dtype": self.param_dtype, "dtype": self.dtype}
            output += Gated(spec.shared, self.width, self.output_std, name="shared", **options)(flat)
        return output.reshape(inputs.shape)

    def _experts(self, rows: Float[Array, "M D"], sizes: Int[Array, "E"]) -> Float[Array, "M D"]:
        """Rows sorted by expert, through their experts."""
        spec, hidden = self.spec.expert, self.spec.expert.hidden_dim

        def multiply(name: str, rows: Array, features: int, std: float) -> Array:
            shape = (self.spec.num_experts, rows.shape[-1], features)
            kernel = self.param(name, nn.initializers.normal(std), shape, self.param_dtype)
            wide = jnp.promote_types(self.dtype, jnp.float32)
            product = jax.lax.ragged_dot(rows, kernel.astype(self.dtype), sizes, preferred_element_type=wide)
            return product.astype(self.dtype)

        gate = activate(multiply("gate", rows, hidden, 0.02), spec.activation)
        return multiply("down", gate * multiply("up", rows, hidden, 0.02), self.width, self.output_std)


def _within_best_groups(
    preference: Float[Array, "N E"], router: SoftmaxRouter | SigmoidRouter, ranked: int
) -> Float[Array, "N E"]:
    """-inf outside the kept groups, which are those with the highest sum of their `ranked` best experts."""
    if router.groups == router.kept_groups:
        return preference
    grouped = preference.reshape(-1, router.groups, preference.shape[-1] // router.groups)
    best = jnp.sum(jax.lax.top_k(grouped, ranked)[0], axis=-1)
    kept = jax.lax.top_k(best, router.kept_groups)[1]
    allowed = jnp.any(kept[:, :, None] == jnp.arange(router.groups), axis=1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(preference.shape)
