"""Adapter leaves: made, told from the base's, taken off, and merged into it."""

import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import partition
from rlhf_jax.core.types import Array, Float, Params, PRNGKeyArray
from rlhf_jax.models.adapters.config import (
    AdaLoRA,
    Adapter,
    Bottleneck,
    DoRA,
    LoRA,
    Partial,
    PiSSA,
    PrefixTuning,
    PromptTuning,
)
from rlhf_jax.models.adapters.linear import column_lengths, kernel_of, low_rank
from rlhf_jax.models.adapters.trees import is_attention, map_linears, map_nodes

_UNMERGEABLE = (
    "bottleneck_down",
    "bottleneck_up",
    "prefix_key",
    "prefix_value",
    "prefix_scale",
    "prompt_embedding",
)
TRAINED = frozenset(("lora_a", "lora_b", "lora_singular", "lora_magnitude", *_UNMERGEABLE))
FROZEN = frozenset(("lora_scale", "lora_a0", "lora_b0"))


def is_adapter_leaf(name: str) -> bool:
    """True for a leaf that belongs to an adapter rather than to the base, by its `a/b/c` name."""
    return name.rpartition("/")[2] in TRAINED | FROZEN


def is_trained(config: Adapter) -> Callable[[str, Array], bool]:
    """`predicate(name, leaf)` for `partition`: what `config` trains of a decoder that has it."""
    match config:
        case Partial(pattern):
            return lambda name, leaf: re.fullmatch(pattern, name) is not None
        case _:
            return lambda name, leaf: name.rpartition("/")[2] in TRAINED


def without_adapter(params: Params) -> Params:
    """Base parameters, without the adapter's leaves."""
    return partition(params, lambda name, leaf: is_adapter_leaf(name))[1]


# Made ----------------------------------------------------------------------------------------------


def init_adapter(config: Adapter, params: Params, key: PRNGKeyArray) -> Params:
    """The parameters of a decoder with the leaves of a fresh adapter among them (none for `Partial`).

    Args:
      params: a plain or quantised decoder, layers stacked or not. Its arrays are shared, not copied.

    Returns:
      The tree, in which adapter leaves are float32, or wider where the base is.

    Raises:
      UserError: there are adapter leaves in it already, or no layer to adapt.
    """
    base, held = without_adapter(params), partition(params, lambda name, leaf: is_adapter_leaf(name))[0]
    if held:
        raise UserError("the model has an adapter already: merge it into the base, or start from that")
    match config:
        case LoRA() | AdaLoRA() | Bottleneck():
            return _beside_linears(config, base, key)
        case PrefixTuning(length):
            return _with_prefixes(length, base, key)
        case PromptTuning(length):
            embedding = base["embedding"]
            rows = jax.random.choice(key, embedding.shape[0], (length,), replace=length > embedding.shape[0])
            return {**base, "prompt_embedding": embedding[rows].astype(_adapter_dtype(embedding))}
        case Partial():
            return base


def _adapter_dtype(leaf: Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _beside_linears(config: LoRA | AdaLoRA | Bottleneck, base: Params, key: PRNGKeyArray) -> Params:
    found: list[str] = []
    adapted: list[str] = []

    def add(path: str, leaves: Params) -> Params:
        found.append(path)
        if re.fullmatch(config.targets, path) is None:
            return leaves
        adapted.append(path)
        of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))

        def make(kernel_leaves: Params, one: PRNGKeyArray) -> Params:
            kernel = kernel_of(kernel_leaves)
            return _leaves(config, kernel.astype(_adapter_dtype(kernel)), one, path)

        kernels = {name: leaf for name, leaf in leaves.items() if name.startswith("kernel")}
        stack = next(iter(kernels.values()))
        if stack.ndim == 3:
            return {**leaves, **jax.vmap(make)(kernels, jax.random.split(of_path, len(stack)))}
        return {**leaves, **make(kernels, of_path)}

    params = map_linears(add, base)
    if not found:
        raise UserError(
            "adapter: the parameters have no linear layer of this package's models to stand on: train them "
            "all, without an adapter"
        )
    if not adapted:
        raise UserError(
            f"adapter: targets {config.targets!r} match no linear layer: they must match a whole path such "
            f"as {found[0]}"
        )
    return params


def _leaves(
    config: LoRA | AdaLoRA | Bottleneck, kernel: Float[Array, "D F"], key: PRNGKeyArray, path: str
) -> Params:
    (fan_in, fan_out), dtype = kernel.shape, kernel.dtype

    def normal(key: PRNGKeyArray, shape: tuple[int, int], std: float) -> Array:
        return std * jax.random.normal(key, shape, dtype)

    if isinstance(config, Bottleneck):
        down = normal(key, (fan_out, config.width), fan_out**-0.5)
        return {"bottleneck_down": down, "bottleneck_up": jnp.zeros((config.width, fan_out), dtype)}
    scale, rank = jnp.asarray(config.scale, dtype), config.rank
    match config:
        case PiSSA():
            a, b = _principal_factors(kernel / scale, rank, path)
            return {"lora_a": a, "lora_b": b, "lora_a0": a + 0, "lora_b0": b + 0, "lora_scale": scale}
        case AdaLoRA():
            a_key, b_key = jax.random.split(key)
            a, b = normal(a_key, (fan_in, rank), 0.02), normal(b_key, (rank, fan_out), 0.02)
            return {"lora_a": a, "lora_b": b, "lora_singular": jnp.zeros(rank, dtype), "lora_scale": scale}
        case LoRA():
            leaves = {
                "lora_a": normal(key, (fan_in, rank), fan_in**-0.5),
                "lora_b": jnp.zeros((rank, fan_out), dtype),
                "lora_scale": scale,
            }
            magnitude = {"lora_magnitude": column_lengths(kernel)} if isinstance(config, DoRA) else {}
            return {**leaves, **magnitude}


def _principal_factors(kernel: Float[Array, "D F"], rank: int, path: str) -> tuple[Array, Array]:
    if rank > min(kernel.shape):
        raise UserError(
            f"adapter: rank {rank} is more than {path} has ({min(kernel.shape)}): lower it, or leave that "
            "layer out of targets"
        )
    left, singular, right = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(singular[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _with_prefixes(length: int, base: Params, key: PRNGKeyArray) -> Params:
    count = 0

    def add(path: str, node: Params) -> Params:
        nonlocal count
        count += 1
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())))
        kernel = jax.eval_shape(lambda: _kernel_shape(node["key"]))
        shape, dtype = (*kernel.shape[:-2], length, kernel.shape[-1]), _adapter_dtype(kernel)
        prefix_key, prefix_value = (0.02 * jax.random.normal(each, shape, dtype) for each in keys)
        gate = jnp.zeros(kernel.shape[:-2], dtype)
        return {**node, "prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_scale": gate}

    params = map_nodes(lambda path, node: is_attention(node), add, base)
    if not count:
        raise UserError(
            "adapter: the model has no attention layer with keys and values of its own (latent attention has "
            "none): choose another kind of adapter"
        )
    return params


def _kernel_shape(leaves: Params) -> Array:
    if "kernel" in leaves:
        return leaves["kernel"]
    return jnp.zeros(leaves["kernel_values"].shape, leaves["kernel_scale"].dtype)


# Merged --------------------------------------------------------------------------------------------


def merge_adapter(params: Params) -> Params:
    """A plain decoder that computes the same: adapters of linear layers are added to their kernels, which
    come out of few bits where they were quantised.

    Raises:
      UserError: a prefix, a prompt or bottlenecks, for which a plain decoder has no place.
    """
    held = partition(params, lambda name, leaf: is_adapter_leaf(name))[0]
    if held and not can_merge(params):
        raise UserError(
            "prefixes, prompts and bottlenecks are no change of a matrix and cannot be merged: keep them as "
            "they are, or train a kind that can (lora, dora, pissa, adalora, partial)"
        )

    def change(path: str, leaves: Params) -> Params:
        del path
        changed = {name: leaf for name, leaf in leaves.items() if name != "bias"}
        if set(changed) == {"kernel"}:
            return leaves
        stacked = (leaves.get("kernel", leaves.get("kernel_values"))).ndim == 3
        kernel = (jax.vmap(_merged_kernel) if stacked else _merged_kernel)(changed)
        rest = {name: leaf for name, leaf in leaves.items() if name not in changed}
        return {**rest, "kernel": kernel}

    return map_linears(change, params)


def can_merge(params: Params) -> bool:
    """True where the adapter can be merged: a plain decoder can be made of these parameters."""
    return not partition(params, lambda name, leaf: name.rpartition("/")[2] in _UNMERGEABLE)[0]


def _merged_kernel(leaves: Params) -> Float[Array, "D F"]:
    kernel = kernel_of(leaves)
    if "lora_a" not in leaves:
        return kernel
    merged = kernel + low_rank(leaves)
    if "lora_magnitude" in leaves:
        merged *= leaves["lora_magnitude"] / column_lengths(merged)
    return merged.astype(kernel.dtype)
