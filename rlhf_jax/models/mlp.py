"""Feed-forward layers: plain, gated, and mixtures of gated experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from rlhf_jax.core.axes import partition_spec, shards
from rlhf_jax.core.types import Array, Float, Int
from rlhf_jax.models.config import (
    Activation,
    FeedForward,
    GatedFeedForward,
    MixtureOfExperts,
    SigmoidRouter,
    SoftmaxRouter,
)
from rlhf_jax.models.layers import Linear, activate, normal_init


class GatedMLP(nn.Module):
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
        gate = activate(linear(self.spec.intermediate_size, name="gate")(inputs), self.spec.activation)
        hidden = gate * linear(self.spec.intermediate_size, name="up")(inputs)
        return linear(self.width, init_std=self.output_std, name="down")(hidden)


class MLP(nn.Module):
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
        hidden = activate(linear(self.spec.intermediate_size, name="up")(inputs), self.spec.activation)
        return linear(self.width, init_std=self.output_std, name="down")(hidden)


class Router(nn.Module):
    """Router: the experts that each token goes through, and their weights."""

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
                preference, probabilities, ranked = scores, scores, 1
            case SigmoidRouter() as router:
                scores = jax.nn.sigmoid(logits)
                bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
                preference, ranked = scores + jax.lax.stop_gradient(bias), 2
                probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
        preference = _within_best_groups(preference, router, ranked)
        chosen = jax.lax.top_k(preference, self.spec.experts_per_token)[1]
        if self.has_variable("replay", "chosen"):  # by `models.routing_replay`
            given = self.get_variable("replay", "chosen")
            chosen = jnp.where(given >= 0, given, chosen)
        # Kept only where somebody asks for it (`models.routing`).
        self.sow("routing", "chosen", chosen)
        self.sow("routing", "probabilities", probabilities)
        self.sow("routing", "normaliser", jax.nn.logsumexp(logits, axis=-1))
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if router.renormalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return weights * router.scale, chosen


class MoE(nn.Module):
    """sum_e weight_e expert_e(x) over the chosen experts, plus the shared one. No token is dropped.

    Tokens are sorted by expert and every expert's slice is multiplied with its own matrices
    (`jax.lax.ragged_dot`), so that the work is that of the chosen experts alone. Where experts are split over
    devices, each device takes the tokens of its neighbours through its own experts and hands back the sums.
    """

    spec: MixtureOfExperts
    width: int
    output_std: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to every token."""
        spec, inputs = self.spec, inputs.astype(self.dtype)
        weights, chosen = Router(spec, self.param_dtype, name="router")(inputs.reshape(-1, self.width))
        weights, chosen = (x.reshape(*inputs.shape[:-1], -1) for x in (weights, chosen))
        hidden = spec.expert.intermediate_size
        kernels = (
            self._kernel("gate", (self.width, hidden), 0.02),
            self._kernel("up", (self.width, hidden), 0.02),
            self._kernel("down", (hidden, self.width), self.output_std),
        )
        mix = mix_over_devices if shards("experts", spec.num_experts) > 1 else mix_experts
        output = mix(spec.expert.activation, kernels, inputs, weights, chosen)
        if spec.shared is not None:
            options = {"param_dtype": self.param_dtype, "dtype": self.dtype}
            output += GatedMLP(spec.shared, self.width, self.output_std, name="shared", **options)(inputs)
        return output

    def _kernel(self, name: str, shape: tuple[int, int], std: float) -> Float[Array, "E D F"]:
        stacked = (self.spec.num_experts, *shape)
        return self.param(name, nn.initializers.normal(std), stacked, self.param_dtype).astype(self.dtype)


Kernels = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


def mix_experts(
    activation: Activation,
    kernels: Kernels,
    inputs: Float[Array, "*batch D"],
    weights: Float[Array, "*batch k"],
    chosen: Int[Array, "*batch k"],
    *,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "*batch D"]:
    """sum_e weight_e expert_e(x) over those of the chosen experts that are here.

    Args:
      kernels: gate, up and down of the experts `first`, `first` + 1, ...
      weights: of the k experts of each token.
      chosen: their numbers, counted from 0 over all experts, wherever those are.
    """
    gate, up, down = kernels
    count, flat = gate.shape[0], inputs.reshape(-1, inputs.shape[-1])
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < count), local, count)  # those elsewhere stand last
    order = jnp.argsort(local, stable=True)
    token = order // chosen.shape[-1]
    sizes = jnp.bincount(local, length=count + 1)[:count].astype(jnp.int32)
    wide = jnp.promote_types(flat.dtype, jnp.float32)

    def multiply(rows: Array, kernel: Array) -> Array:
        return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=wide).astype(flat.dtype)

    rows = flat[token]
    outputs = multiply(activate(multiply(rows, gate), activation) * multiply(rows, up), down)
    # What stands behind the last expert's rows is not defined.
    outputs = jnp.where((local[order] < count)[:, None], outputs, 0)
    weighted = outputs * weights.reshape(-1)[order, None].astype(outputs.dtype)
    total = jnp.zeros(flat.shape, weighted.dtype).at[token].add(weighted)
    return total.astype(flat.dtype).reshape(inputs.shape)


def mix_over_devices(
    activation: Activation,
    kernels: Kernels,
    inputs: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
) -> Float[Array, "B T D"]:
    """`mix_experts` with experts split over the mesh axis `expert`, and their widths over `tensor`.

    Devices of one group along `expert` gather each other's tokens, compute what their own experts make of
    them, and each receives the sum for its own tokens. No token is dropped and shapes are static.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def spec(names: tuple[str | None, ...], array: Array) -> PartitionSpec:
        return partition_spec(names, array.shape, mesh)[0]

    of_tokens = spec(("batch", "time", None), inputs)
    # Along their other axes kernels come whole: they were gathered as any parameter is before its use.
    of_kernels = tuple(
        spec(("experts", *names), kernel)
        for names, kernel in zip(((None, "hidden"), (None, "hidden"), ("hidden", None)), kernels, strict=True)
    )
    rows_are_split = "expert" in (of_tokens[0] or ())
    widths_are_split = of_kernels[2][1] is not None

    def local(kernels: Kernels, *tokens: Array) -> Array:
        if rows_are_split:
            tokens = tuple(jax.lax.all_gather(x, "expert", tiled=True) for x in tokens)
        first = jax.lax.axis_index("expert") * kernels[0].shape[0]
        output = mix_experts(activation, kernels, *tokens, first=first)
        output = jax.lax.psum(output, "tensor") if widths_are_split else output
        if rows_are_split:
            return jax.lax.psum_scatter(output, "expert", tiled=True)
        return jax.lax.psum(output, "expert")

    in_specs = (of_kernels, of_tokens, of_tokens, of_tokens)
    return jax.shard_map(local, in_specs=in_specs, out_specs=of_tokens, check_vma=False)(
        kernels, inputs, weights, chosen
    )


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
