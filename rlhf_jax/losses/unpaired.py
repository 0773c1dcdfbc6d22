"""Losses on single responses marked desirable or not: KTO, BCO.

Notation and shared arguments: `rlhf_jax.losses.pair_logps`; rows are responses, z the policy-minus-reference
log-ratio of one. Metrics are sums over the rows they concern / the loss's denominator, so that they add
up over micro-batches: the mean reward of desirable responses is `chosen_reward` / `desirable_fraction`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, mask_or_all
from rlhf_jax.losses.reductions import RowMean, row_mean


def _rows(name: str, policy_logp: Any, ref_logp: Any, mask: Any, **others: Any) -> tuple[Any, ...]:
    """(mask, both log-probs, others): shapes checked, log-probs in full precision and 0 where masked."""
    policy, ref, mask, *rest = check_shapes(
        name,
        policy_logp=(policy_logp, "B"),
        ref_logp=(ref_logp, "B"),
        mask=(mask, "B"),
        **{option: (value, "B") for option, value in others.items()},
    )
    mask = mask_or_all(mask, policy)
    return mask, cleaned(policy, mask), cleaned(ref, mask), *rest


def _unpaired(
    losses: Float[Array, "B"],
    reward: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    mean: RowMean,
    **extra: Float[Array, "B"],
) -> tuple[Float[Array, ""], Metrics]:
    rows = {
        "loss": losses,
        "reward": reward,
        "chosen_reward": jnp.where(desirable, reward, 0),
        "rejected_reward": jnp.where(desirable, 0, reward),
        "desirable_fraction": desirable.astype(losses.dtype),
        **extra,
    }
    return mean(losses), {name: mean(jax.lax.stop_gradient(row)) for name, row in rows.items()}


def kto_kl(
    policy_logp: Float[Array, "B"],
    ref_logp: Float[Array, "B"],
    *,
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """KTO's reference point: a KL estimate from mismatched pairs (Ethayarajh et al. 2024, section 4).

        max(0, mean of log p(y' | x) - log p_ref(y' | x))

    Take it over the whole batch, before splitting: the maximum of partial means is another number.

    Args:
      policy_logp: log-probabilities in nats of responses y' that belong to *other* prompts, given x.
      ref_logp: the reference's of the same.
      mask: rows that count.
    Returns:
      Nats, at least 0, without gradient.
    """
    counted, policy, ref = _rows("kto_kl", policy_logp, ref_logp, mask)
    return jax.lax.stop_gradient(jnp.maximum(row_mean(counted)(policy - ref), 0))


def kto_loss(
    policy_logp: Float[Array, "B"],
    ref_logp: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    kl: Float[Array, ""],
    *,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
    mask: Bool[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Kahneman-Tversky optimization (KTO, Ethayarajh et al. 2024, section 4).

        w_d [1 - s(b (z - kl))]   desirable
        w_u [1 - s(b (kl - z))]   undesirable

    Args:
      policy_logp: log-probability of each response in nats, summed over its tokens.
      ref_logp: the reference's.
      desirable: which responses are.
      kl: the reference point in nats, from `kto_kl`; no gradient goes through it.
      beta: scale b, per nat: risk aversion.
      desirable_weight: w_d; choose both so that w_d n_d and w_u n_u are about equal.
      undesirable_weight: w_u.
      denominator: what the sum over rows is divided by (their number by default).
    Returns:
      (loss, metrics), with the mean `reward` b z of all rows and `kl`.
    """
    counted, policy, ref, desirable = _rows("kto_loss", policy_logp, ref_logp, mask, desirable=desirable)
    ratio, kl = policy - ref, jax.lax.stop_gradient(kl)
    sign = jnp.where(desirable, 1, -1)
    class_weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    losses = class_weight * jax.nn.sigmoid(-beta * sign * (ratio - kl))
    mean = row_mean(counted, None, denominator)
    return _unpaired(losses, beta * ratio, desirable, mean, kl=jnp.full_like(ratio, kl))


def bco_loss(
    policy_logp: Float[Array, "B"],
    ref_logp: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    shift: Scalar,
    beta: Scalar = 0.1,
    mask: Bool[Array, "B"] | None = None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Binary classifier optimization with reward shift (BCO, Jung et al. 2024).

        -log s(b z - delta)     desirable
        -log s(-(b z - delta))  undesirable

    Args:
      policy_logp: log-probability of each response in nats, summed over its tokens.
      ref_logp: the reference's.
      desirable: which responses are.
      shift: delta, the running mean of `class_mean_shift` (the paper's) or of `row_mean_shift` (TRL's); kept
        by the caller, without gradient.
      beta: scale b of the log-ratios.
      weights: factor of each row; the paper's density ratio p / (1 - p) on undesirable rows makes up for
        prompts that are distributed differently in the two classes.
      denominator: what the sum over rows is divided by (their number by default).
    Returns:
      (loss, metrics), with the mean `reward` b z of all rows.
    """
    counted, policy, ref, desirable, weights = _rows(
        "bco_loss", policy_logp, ref_logp, mask, desirable=desirable, weights=weights
    )
    reward = beta * (policy - ref)
    sign = jnp.where(desirable, 1, -1)
    losses = -jax.nn.log_sigmoid(sign * (reward - jax.lax.stop_gradient(shift)))
    return _unpaired(losses, reward, desirable, row_mean(counted, weights, denominator))


def class_mean_shift(metrics: Metrics) -> Float[Array, ""]:
    """BCO's shift from a batch (Jung et al. 2024): the mean of the mean rewards of both classes.

        (mean of b z over the desirable + mean of b z over the others) / 2

    Args:
      metrics: of `bco_loss`, of the whole batch.
    Returns:
      NaN where the batch lacks a class.
    """
    share = metrics["desirable_fraction"]
    return (metrics["chosen_reward"] / share + metrics["rejected_reward"] / (1 - share)) / 2


def row_mean_shift(metrics: Metrics) -> Float[Array, ""]:
    """BCO's shift from a batch as TRL has it: the mean of b z over all rows, whatever their classes.

    Args:
      metrics: of `bco_loss`, of the whole batch.
    """
    return metrics["reward"]
