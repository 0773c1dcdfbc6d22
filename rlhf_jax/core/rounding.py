"""Parameters of 16 bits that move: moments in float32, and sums that lose nothing below their spacing.

A bfloat16 has 8 significant bits, so that a weight of 1 stays exactly 1 under any update below 1/512, which
is every update of a learning rate of 1e-6. Float32 parameters are the plain way out. Where memory forbids it:

    stochastic   rounds up with a probability of (sum - lower) / (upper - lower): right in expectation
                 (Gupta et al. 2015), at no memory
    kahan        keeps what rounding took away and adds it to the next update (Kahan 1965). It is kept in
                 units of 2^-16 of the parameter's spacing, two bytes a parameter: 8 bits and these 16
                 are the 24 of a float32, which a compensation of bfloat16 would not be
"""

import zlib
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.trees import map_named, named_leaves, pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Params, PRNGKeyArray, Scalar

T = TypeVar("T")
Rounding = Literal["nearest", "stochastic", "kahan"]

_STEPS = 2.0**16
_LARGEST = 2**15 - 1


def widened(tree: T) -> T:
    """A tree whose floating leaves are at least float32."""
    return jax.tree.map(
        lambda x: (
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        ),
        tree,
    )


def narrow_leaves(params: Params) -> dict[str, Any]:
    """The floating leaves of fewer bits than float32, by their name."""
    return {name: leaf for name, leaf in named_leaves(params).items() if _is_narrow(leaf)}


def _is_narrow(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with moments and updates of at least float32, whatever parameters and gradients are."""
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        return inner.init(widened(params))

    def update(updates: Params, state: Any, params: Params = None, **more: Any):
        return inner.update(widened(updates), state, None if params is None else widened(params), **more)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


@pytree_dataclass
class StochasticState:
    """State of stochastic rounding: its draws depend on nothing but `steps`, so that runs resume exactly.

    Attributes:
      steps: updates made.
      inner: the state of the optimizer.
    """

    steps: Int[Array, ""]
    inner: Any


@pytree_dataclass
class KahanState:
    """State of Kahan summation: the low parts that the parameters have no bits for.

    Attributes:
      compensation: what each parameter of 16 bits lacks, in 2^-16 of its spacing; nothing for wider ones.
      inner: the state of the optimizer.
    """

    compensation: Params
    inner: Any


def rounded(
    tx: optax.GradientTransformation, rounding: Rounding
) -> optax.GradientTransformation | optax.GradientTransformationExtraArgs:
    """`tx`, under whose updates parameters of 16 bits move as `rounding` says; wider ones as ever.

    Needs `learning_rate` as an extra argument, but for `nearest`. The updates are those that lead to the
    rounded sum once they are multiplied with minus the learning rate and added in float32.
    """
    match rounding:
        case "nearest":
            return tx
        case "stochastic":
            return _stochastic(optax.with_extra_args_support(tx))
        case "kahan":
            return _kahan(optax.with_extra_args_support(tx))


def _stochastic(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    def init(params: Params) -> Any:
        return StochasticState(jnp.int32(0), tx.init(params))

    def update(updates: Params, state: Any, params: Params = None, *, learning_rate: Scalar, **more: Any):
        updates, inner = tx.update(updates, state.inner, params, learning_rate=learning_rate, **more)
        key = jax.random.fold_in(jax.random.key(0), state.steps)

        def change(name: str, leaf: Array, wanted: Array) -> Array:
            if not _is_narrow(leaf):
                return wanted
            of_leaf = jax.random.fold_in(key, zlib.crc32(name.encode()))
            target = _sum(leaf, wanted, learning_rate)
            return _leading_to(stochastically_rounded(target, leaf.dtype, of_leaf), leaf, learning_rate)

        names = map_named(lambda name, _: name, params)
        return jax.tree.map(change, names, params, updates), StochasticState(state.steps + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _kahan(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    def init(params: Params) -> Any:
        compensation = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, jnp.int16) if _is_narrow(leaf) else optax.MaskedNode(), params
        )
        return KahanState(compensation, tx.init(params))

    def update(updates: Params, state: Any, params: Params = None, *, learning_rate: Scalar, **more: Any):
        updates, inner = tx.update(updates, state.inner, params, learning_rate=learning_rate, **more)

        def change(leaf: Array, wanted: Array, lacking: Any) -> tuple[Array, Any]:
            if not _is_narrow(leaf):
                return wanted, lacking
            target = _sum(leaf, wanted, learning_rate) + lacking * (spacing(leaf, lacking) / _STEPS)
            new = target.astype(leaf.dtype)
            off = target - new.astype(jnp.float32)
            left = jnp.round(off / spacing(new, off) * _STEPS)
            # Never half of the spacing itself: a tie might round back to the other side.
            left = jnp.clip(left, -_LARGEST, _LARGEST).astype(jnp.int16)
            return _leading_to(new, leaf, learning_rate), left

        leaves, structure = jax.tree.flatten(params)
        lacking = structure.flatten_up_to(state.compensation)
        pairs = [change(*each) for each in zip(leaves, jax.tree.leaves(updates), lacking, strict=True)]
        changed, compensation = (structure.unflatten(half) for half in zip(*pairs, strict=True))
        return changed, KahanState(compensation, inner)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _sum(leaf: Array, update: Array, learning_rate: Scalar) -> Float[Array, "..."]:
    return leaf.astype(jnp.float32) - learning_rate * update


def _leading_to(new: Array, leaf: Array, learning_rate: Scalar) -> Float[Array, "..."]:
    """The update that makes `new` of a parameter; its own rounding is far below the parameter's spacing."""
    difference = leaf.astype(jnp.float32) - new.astype(jnp.float32)
    return difference / jnp.where(learning_rate == 0, 1, learning_rate)


def spacing(values: Float[Array, "..."], direction: Array) -> Float[Array, "..."]:
    """The distance to the next number of the same dtype, in float32 and above 0.

    Args:
      direction: below 0 for the next lower one. The two distances differ at powers of 2, where the scales of
        norms begin.
    """
    gap = _neighbour(values, direction).astype(jnp.float32) - values.astype(jnp.float32)
    limits = jnp.finfo(jnp.float32)
    return jnp.clip(jnp.abs(gap), limits.tiny, limits.max)


def stochastically_rounded(values: Float[Array, "..."], dtype: Any, key: PRNGKeyArray) -> Float[Array, "..."]:
    """`values` in a narrower dtype, rounded to either neighbour so that the expectation is the value."""
    nearest = values.astype(dtype)
    off = values - nearest.astype(values.dtype)
    chosen = jax.random.uniform(key, values.shape) * spacing(nearest, off) < jnp.abs(off)
    return jnp.where(chosen, _neighbour(nearest, off), nearest)


def _neighbour(values: Float[Array, "..."], direction: Array) -> Float[Array, "..."]:
    """The next number of the same dtype: behind the sign, bits count through the numbers in order of size."""
    integers = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(values, integers)
    grows = (direction < 0) == (values < 0)
    next_bits = bits + jnp.where(grows, 1, -1).astype(integers)
    smallest = jnp.where(direction < 0, jnp.iinfo(integers).min + 1, 1).astype(integers)
    return jax.lax.bitcast_convert_type(jnp.where(values == 0, smallest, next_bits), values.dtype)
