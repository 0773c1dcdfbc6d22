"""Numbers that stay finite: exponentials of log-ratios, however far policies drift, and those of files."""

import sys
from typing import Any

import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float

# Beyond this many nats `exp` goes on along its tangent: value and gradient stay finite, and the
# gradient still points back.
EXP_LIMIT = 20.0


def bounded_exp(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) up to 20 nats, its tangent beyond: exact where ratios mean something, finite everywhere."""
    return jnp.exp(jnp.minimum(log_ratio, EXP_LIMIT)) * (1 + jnp.maximum(log_ratio - EXP_LIMIT, 0))


def exp_excess(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) - 1 - x, what `exp` has above its tangent at 0; never negative, bounded as `bounded_exp`."""
    beyond = log_ratio > EXP_LIMIT
    near = jnp.where(beyond, 0, log_ratio)
    # expm1 keeps the digits that exp(x) - 1 - x loses near x = 0.
    return jnp.where(beyond, bounded_exp(log_ratio) - 1 - log_ratio, jnp.expm1(near) - near)


def is_finite_number(value: Any) -> bool:
    """True for an int or float that float64 holds: no NaN, no infinity, no integer of 400 digits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max
