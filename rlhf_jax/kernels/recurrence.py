"""The one recurrence beneath every return and advantage: x_t = a_t x_{t+1} + b_t, from the end backwards."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float

Result = TypeVar("Result")


def sequential_following(
    coefficients: Float[Array, "B T"], offsets: Float[Array, "B T"], last: Float[Array, " B"]
) -> Float[Array, "B T"]:
    """x_{t+1} at t, where x_t = a_t x_{t+1} + b_t and x_T = `last`, by a scan of T steps."""

    def step(following: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        coefficient, offset = now
        return coefficient * following + offset, following

    _, results = lax.scan(step, last, (coefficients.T, offsets.T), reverse=True)
    return results.T


def associative_following(
    coefficients: Float[Array, "B T"], offsets: Float[Array, "B T"], last: Float[Array, " B"]
) -> Float[Array, "B T"]:
    """The same by an associative scan: log T parallel steps, several times the work and memory.

    The steps are affine maps, and their composition is associative (Blelloch 1990, section 1.4.1).
    """

    def compose(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], earlier[0] * later[1] + earlier[1]

    slopes, intercepts = lax.associative_scan(compose, (coefficients, offsets), reverse=True, axis=1)
    results = slopes * last[:, None] + intercepts
    return jnp.concatenate([results[:, 1:], last[:, None]], axis=1)


def following_unmasked(
    coefficients: Float[Array, "B T"],
    offsets: Float[Array, "B T"],
    last: Float[Array, " B"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """x_{t+1} at t, where x_t = a_t x_{t+1} + b_t and t+1 is the next unmasked step.

    A return is its reward plus the discounted x of the step after it, for an x that depends on the kind
    of return; choosing x well leaves one pass over time. On CPU the pass is a sequential scan, the faster at
    every length measured (128 to 65,536); elsewhere, where each of its T steps would cost a kernel
    launch, it is the associative scan.

    Args:
      coefficients: a_t; masked entries may hold anything.
      offsets: b_t; masked entries may hold anything.
      last: x after the last unmasked step.
      mask: steps that count.
    """
    coefficients, offsets, last, mask = check_shapes(
        "following_unmasked",
        coefficients=(coefficients, "B T"),
        offsets=(offsets, "B T"),
        last=(last, "B"),
        mask=(mask, "B T"),
    )
    return lax.platform_dependent(
        jnp.where(mask, coefficients, 1),
        jnp.where(mask, offsets, 0),
        last,
        cpu=sequential_following,
        default=associative_following,
    )


def next_unmasked(
    values: Float[Array, "B T"], last: Float[Array, " B"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """At t, the value at the first unmasked step after t; `last` where there is none."""
    values, last, mask = check_shapes(
        "next_unmasked", values=(values, "B T"), last=(last, "B"), mask=(mask, "B T")
    )

    def shift(_: None) -> Float[Array, "B T"]:
        return jnp.concatenate([values[:, 1:], last[:, None]], axis=1)

    def carry(_: None) -> Float[Array, "B T"]:
        return following_unmasked(jnp.zeros_like(values), values, last, mask)

    # Without masked steps, as in most of classic RL, the pass over time is not needed.
    return lax.cond(jnp.all(mask), shift, carry, None)


def time_major(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The same kernel over [T, B, ...] arrays: swaps the first two axes of arguments and results.

    Inside `jit` the swaps are layouts, not copies: the scans are time-major within.

        advantages, returns = time_major(generalized_advantage_estimation)(rewards, values, ...)
    """

    def swap(x: Any) -> Any:
        return jnp.swapaxes(x, 0, 1) if jnp.ndim(x) >= 2 else x

    @functools.wraps(kernel)
    def swapped(*arrays: Any, **options: Any) -> Result:
        return jax.tree.map(swap, kernel(*jax.tree.map(swap, arrays), **options))

    return swapped
