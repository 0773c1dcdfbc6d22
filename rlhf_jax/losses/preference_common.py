"""What every loss on pairs shares: log-ratios with masked rows cleaned, means over pairs, metrics."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean, masked_sum
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar


def full_precision(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32: a log-probability summed over a response has few correct digits in bfloat16."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def clean_rows(
    mask: Bool[Array, "B"] | None, *rows: Float[Array, "B"]
) -> tuple[Bool[Array, "B"], tuple[Float[Array, "B"], ...]]:
    """The mask (all True for None) and the rows in full precision, 0 where masked."""
    mask = jnp.ones(rows[0].shape, bool) if mask is None else mask
    return mask, tuple(clean(full_precision(row), mask) for row in rows)


def row_mean(
    values: Float[Array, "B"], mask: Bool[Array, "B"], denominator: Scalar | None
) -> Float[Array, ""]:
    """Sum over the unmasked rows / `denominator` (their number by default; 0 if there are none)."""
    total = jnp.sum(mask) if denominator is None else denominator
    total = jnp.asarray(total, values.dtype)
    return masked_sum(values, mask) / jnp.maximum(total, jnp.finfo(values.dtype).tiny)


def reduce_pairs(
    losses: Float[Array, "B"],
    chosen_reward: Float[Array, "B"],
    rejected_reward: Float[Array, "B"],
    mask: Bool[Array, "B"],
    denominator: Scalar | None,
    **extra: Float[Array, "B"],
) -> tuple[Float[Array, ""], Metrics]:
    """Mean loss over pairs, and the metrics of a paired loss as means over the same pairs.

    Args:
      chosen_reward: implicit reward of the chosen response, in the units of the loss's beta.
      rejected_reward: the same of the rejected one.
      extra: further quantities, one per pair, to report as means.
    """
    loss = row_mean(losses, mask, denominator)
    rows = {
        "loss": losses,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": chosen_reward - rejected_reward,
        "accuracy": (chosen_reward > rejected_reward).astype(losses.dtype),
        **extra,
    }
    metrics = {name: row_mean(jax.lax.stop_gradient(row), mask, denominator) for name, row in rows.items()}
    return loss, metrics
