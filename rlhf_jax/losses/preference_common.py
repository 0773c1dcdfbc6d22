"""What the losses on rows share: log-ratios with masked rows cleaned, weighted means, metrics."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar

RowMean: TypeAlias = Callable[[Float[Array, "B"]], Float[Array, ""]]


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
    mask: Bool[Array, "B"], weights: Float[Array, "B"] | None = None, denominator: Scalar | None = None
) -> RowMean:
    """The function rows -> sum of weighted unmasked rows / `denominator` (their number by default)."""

    def mean(values: Float[Array, "B"]) -> Float[Array, ""]:
        total = jnp.asarray(jnp.sum(mask) if denominator is None else denominator, values.dtype)
        scaled = values if weights is None else values * clean(full_precision(weights), mask)
        return jnp.sum(clean(scaled, mask)) / jnp.maximum(total, jnp.finfo(values.dtype).tiny)

    return mean


def log_ratios(
    policy_chosen_logp: Float[Array, "B"],
    policy_rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    mask: Bool[Array, "B"] | None,
    weights: Float[Array, "B"] | None,
    denominator: Scalar | None,
) -> tuple[Float[Array, "B"], Float[Array, "B"], RowMean]:
    """Policy-minus-reference log-ratios of chosen and rejected, 0 where masked, and the mean over pairs."""
    mask, (policy_chosen, policy_rejected, ref_chosen, ref_rejected) = clean_rows(
        mask, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp
    )
    mean = row_mean(mask, weights, denominator)
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected, mean


def per_token(logp: Float[Array, "B"], length: Int[Array, "B"]) -> Float[Array, "B"]:
    """A sum over a response / its number of tokens; a masked row may say 0 tokens."""
    return logp / jnp.where(length >= 1, length, 1).astype(logp.dtype)


def smoothed_logistic(
    logits: Float[Array, "B"], label_smoothing: Scalar | Float[Array, "B"]
) -> Float[Array, "B"]:
    """-(1 - e) log s(x) - e log s(-x)."""
    log_sigmoid = jax.nn.log_sigmoid
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def paired(
    losses: Float[Array, "B"],
    chosen_reward: Float[Array, "B"],
    rejected_reward: Float[Array, "B"],
    mean: RowMean,
    **extra: Float[Array, "B"],
) -> tuple[Float[Array, ""], Metrics]:
    """Mean loss over pairs, and the metrics of a paired loss as means over the same pairs.

    Args:
      chosen_reward: implicit reward of the chosen response, as the loss compares it.
      rejected_reward: the same of the rejected one.
      extra: further quantities, one per pair, to report as means.
    """
    rows = {
        "loss": losses,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": chosen_reward - rejected_reward,
        "accuracy": (chosen_reward > rejected_reward).astype(losses.dtype),
        **extra,
    }
    return mean(losses), {name: mean(jax.lax.stop_gradient(row)) for name, row in rows.items()}


def power_score(log_ratio: Float[Array, "B"], alpha: Scalar) -> Float[Array, "B"]:
    """(1 - u^-alpha) / alpha for u = exp(log_ratio); log u for alpha = 0.

    Above an exponent of 30 the exponential goes on along its tangent: float32 would overflow, and a
    clamp would leave exactly the worst responses without a gradient.
    """
    alpha = jnp.asarray(alpha, log_ratio.dtype)
    near_zero = jnp.abs(alpha) < 1e-6
    safe_alpha = jnp.where(near_zero, 1, alpha)
    exponent = -safe_alpha * log_ratio
    limit = 30.0
    tangent = jnp.exp(jnp.asarray(limit, log_ratio.dtype)) * jnp.maximum(exponent - limit, 0)
    power = -(jnp.expm1(jnp.minimum(exponent, limit)) + tangent) / safe_alpha
    return jnp.where(near_zero, log_ratio, power)
