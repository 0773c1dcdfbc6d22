"""The one recurrence beneath every return and advantage: x_t = a_t x_{t+1} + b_t, from the end backwards."""

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.types import Array, Bool, Float


def reverse_recurrence(
    coefficients: Float[Array, "B T"], offsets: Float[Array, "B T"], last: Float[Array, " B"]
) -> Float[Array, "B T"]:
    """x_t = a_t x_{t+1} + b_t for t = T-1 ... 0, with x_T = `last`."""

    def step(following: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        coefficient, offset = now
        result = coefficient * following + offset
        return result, result

    _, results = lax.scan(step, last, (coefficients.T, offsets.T), reverse=True)
    return results.T


def next_unmasked(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], last: Float[Array, " B"]
) -> Float[Array, "B T"]:
    """At t, the value at the first unmasked step after t; `last` where there is none."""
    coefficients = jnp.where(mask, 0, 1).astype(values.dtype)
    carried = reverse_recurrence(coefficients, jnp.where(mask, values, 0), last)
    return jnp.concatenate([carried[:, 1:], last[:, None]], axis=1)
