"""Pruning: score the weights of linear layers, keep the best, and let the others stay zero in training.

    scores = wanda_scores(params, input_square_sums(config, params, sequences))
    masks = keep_masks(scores, sparsity=0.5, scope="output")     # or keep_n_of_m(scores, n=2, m=4)
    params = apply_masks(params, masks)
    tx = preserve_sparsity(tx)                                          # before `init`

Scores, norms and masks are trees that hold the kernels of `Linear` layers and nothing else:
embeddings, norms, biases, routers and the experts of mixtures are never pruned. What is pruned is known by
its zeros alone, so a pruned model is a model like any other, in a run folder like any other.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import clean
from rlhf_jax.core.trees import map_named, merge, named_leaves, partition, pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Params, Sequences
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import hidden_states, stack_layers, unstack_layers
from rlhf_jax.models.layers import Linear

Granularity: TypeAlias = Literal["output", "layer", "global"]


def linear_kernels(params: Params) -> Params:
    """The kernels that may be pruned, in the tree where they stand."""
    return partition(params, _is_linear_kernel)[0]


def _is_linear_kernel(name: str, leaf: Any) -> bool:
    layer, _, word = name.rpartition("/")
    # Heads of scalar models have vectors; those start at zero and must be able to leave it.
    return word == "kernel" and leaf.ndim > 1 and layer.rpartition("/")[2] != "router"


# Scores --------------------------------------------------------------------------------------------


def magnitude_scores(params: Params) -> Params:
    """|W_ij| (Han et al. 2015), in at least float32."""
    return jax.tree.map(lambda kernel: jnp.abs(_wide(kernel)), linear_kernels(params))


def wanda_scores(params: Params, square_sums: Params) -> Params:
    """|W_ij| * ||X_j||_2 with X_j what goes into the weight, over all tokens (Sun et al. 2023, eq. 1).

    The norms are those of the model as it is: layers are not measured again behind layers that were pruned
    already, as the authors do it.

    Args:
      square_sums: of `input_square_sums`, or its sum over several batches.

    Raises:
      UserError: a layer was not measured, such as those of modules for further tokens.
    """
    scores = magnitude_scores(params)
    missing = sorted(named_leaves(scores).keys() - named_leaves(square_sums).keys())
    if missing:
        raise UserError(f"pruning: nothing goes into {missing[0]} in plain scoring: prune by magnitude")
    return jax.tree.map(lambda score, sums: score * jnp.sqrt(sums)[..., None], scores, square_sums)


def input_square_sums(config: ModelConfig, params: Params, sequences: Sequences) -> Params:
    """sum over tokens of x_j^2 of every input of every linear layer; sums of several batches add up.

    Args:
      sequences: whole texts; prompts count as well as answers, padding does not.

    Returns:
      [D] where `linear_kernels` has [D, F] (and [L, D] where layers are stacked), float32 or wider.
    """
    real = (sequences.segment_ids > 0)[..., None]
    found: Params = {}

    def note(function: Any, arguments: Any, options: Any, context: Any) -> Any:
        nonlocal found
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            sums = jnp.sum(clean(_wide(arguments[0]), real) ** 2, axis=(0, 1))
            leaf: Params = {"kernel": sums}
            for name in reversed(context.module.path):
                leaf = {name: leaf}
            found = merge(found, leaf)
        return function(*arguments, **options)

    unrolled = dataclasses.replace(config, scan_layers=False, remat="none")
    params = unstack_layers(config, params) if config.scan_layers else params
    with nn.intercept_methods(note):
        hidden_states(unrolled, params, sequences.tokens, sequences.positions, sequences.segment_ids)
    return stack_layers(config, found) if config.scan_layers else found


def _wide(values: Array) -> Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


# Masks ---------------------------------------------------------------------------------------------


def keep_masks(scores: Params, *, sparsity: float, granularity: Granularity = "output") -> Params:
    """True for the weights to keep: all but the `sparsity` of them that score lowest, exactly.

    The number of pruned weights is rounded down; of equal scores the first are pruned.

    Args:
      granularity: weights that compete: those that make one output (Wanda's choice), of a layer, or all.

    Raises:
      UserError: `sparsity` is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"pruning: sparsity {sparsity} is no share of weights: give one from 0 to below 1")
    if granularity != "global":
        return jax.tree.map(lambda x: _keep_best_of(x, sparsity, granularity), scores)
    leaves, structure = jax.tree.flatten(scores)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    kept = _keep_best(flat[:, None], int(sparsity * flat.size))[:, 0]
    ends = [sum(leaf.size for leaf in leaves[:number]) for number in range(1, len(leaves))]
    parts = jnp.split(kept, ends)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def _keep_best_of(
    scores: Float[Array, "*L D F"], sparsity: float, granularity: Literal["output", "layer"]
) -> Bool[Array, "*L D F"]:
    inputs, outputs = scores.shape[-2:]
    competing = scores if granularity == "output" else scores.reshape(*scores.shape[:-2], inputs * outputs, 1)
    return _keep_best(competing, int(sparsity * competing.shape[-2])).reshape(scores.shape)


def keep_n_of_m(scores: Params, *, n: int, m: int) -> Params:
    """True for the best n of every m consecutive inputs of an output: 2:4 is what sparse tensor cores take.

    Raises:
      UserError: n is not in 1 to m, or m does not divide the inputs of a layer.
    """
    if not 1 <= n <= m:
        raise UserError(f"pruning: {n}:{m} keeps none or too many of {m}: give N from 1 to M")

    def keep(name: str, leaf: Float[Array, "*L D F"]) -> Bool[Array, "*L D F"]:
        *stack, inputs, outputs = leaf.shape
        if inputs % m:
            raise UserError(
                f"pruning: {name} has {inputs} inputs, which {m} does not divide: choose another M"
            )
        groups = leaf.reshape(*stack, inputs // m, m, outputs)
        return _keep_best(groups, m - n).reshape(leaf.shape)

    return map_named(keep, scores)


def _keep_best(scores: Float[Array, "*A N F"], pruned: int) -> Bool[Array, "*A N F"]:
    """True but for the lowest `pruned` along the last axis but one."""
    ranks = jnp.argsort(jnp.argsort(scores, axis=-2, stable=True), axis=-2, stable=True)
    return ranks >= pruned


def apply_masks(params: Params, masks: Params) -> Params:
    """Parameters whose pruned weights are zero."""
    kernels, rest = partition(params, _is_linear_kernel)
    return merge(jax.tree.map(lambda w, keep: jnp.where(keep, w, 0), kernels, masks), rest)


def kernel_sparsity(params: Params) -> dict[str, float]:
    """Share of zeros in each kernel that may be pruned, by its name, and in all of them as `""`."""
    kernels = named_leaves(linear_kernels(params))
    zeros = {name: int(jnp.sum(leaf == 0)) for name, leaf in kernels.items()}
    shares = {name: zeros[name] / leaf.size for name, leaf in kernels.items()}
    return {**shares, "": sum(zeros.values()) / max(sum(leaf.size for leaf in kernels.values()), 1)}


# Training ------------------------------------------------------------------------------------------


@pytree_dataclass
class PreserveSparsityState:
    """State of `preserve_sparsity`: the masks, and the inner optimizer's state.

    Attributes:
      masks: which weights of linear layers may change; saved and restored with the optimizer.
      inner: the state of the optimizer.
    """

    masks: Params
    inner: Any


def preserve_sparsity(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, under which weights of linear layers that are zero at `init` stay exactly zero.

    Their gradients are taken out before `tx`, so that they count in no norm and no moment, and their updates
    behind it.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        return PreserveSparsityState(
            jax.tree.map(lambda w: w != 0, linear_kernels(params)), inner.init(params)
        )

    def update(updates: Params, state: Any, params: Params = None, **more: Any):
        updates, held = inner.update(apply_masks(updates, state.masks), state.inner, params, **more)
        return apply_masks(updates, state.masks), PreserveSparsityState(state.masks, held)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
