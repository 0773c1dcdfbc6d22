"""Log importance ratios of policy-gradient losses, at the level of tokens or of sequences.

A ratio function takes `(logp, old_logp, mask)`, all [B, T] and clean of NaN, and returns log-ratios
[B, T] whose `exp` multiplies the advantages. Pass it to `grpo_loss` as `ratio_fn=`.

A sequence is a row, or, in packed rows, what shares an entry of `segment_ids`; set it with
`functools.partial(sequence_log_ratio, segment_ids=segment_ids)`.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Int

RatioFn: TypeAlias = Callable[
    [Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]
]


def sequence_total(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """At each token, the sum over the unmasked tokens of its sequence.

    Args:
      values: masked entries may hold anything.
      mask: tokens that count.
      segment_ids: for packed rows, in [0, T]; None when a row is a sequence.
    """
    values = clean(values, mask)
    if segment_ids is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-1, keepdims=True), values.shape)

    def of_row(row: Float[Array, " T"], ids: Int[Array, " T"]) -> Float[Array, " T"]:
        return jax.ops.segment_sum(row, ids, num_segments=row.shape[0] + 1)[ids]

    return jax.vmap(of_row)(values, segment_ids)


def sequence_average(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """At each token, the mean over the unmasked tokens of its sequence; 0 where there are none."""
    count = sequence_total(mask.astype(values.dtype), mask, segment_ids)
    return sequence_total(values, mask, segment_ids) / jnp.maximum(count, 1)


def sequence_maximum(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """At each token, the largest value of the unmasked tokens of its sequence; -inf where there are none."""
    values = clean(values, mask, -jnp.inf)
    if segment_ids is None:
        return jnp.broadcast_to(jnp.max(values, axis=-1, keepdims=True), values.shape)

    def of_row(row: Float[Array, " T"], ids: Int[Array, " T"]) -> Float[Array, " T"]:
        return jax.ops.segment_max(row, ids, num_segments=row.shape[0] + 1)[ids]

    return jax.vmap(of_row)(values, segment_ids)


def token_log_ratio(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Token-level log-ratio, log pi(y_t) - log pi_old(y_t) (PPO, Schulman et al. 2017, section 3; GRPO)."""
    del mask
    return logp - old_logp


def sequence_log_ratio(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Sequence-level log-ratio, the mean over tokens, at every token (GSPO, Zheng et al. 2025).

        log s_i = (1 / |y_i|) sum_t [log pi(y_t) - log pi_old(y_t)]

    Use with `sequence_mean`; clipping bounds are then of the order 1e-4.
    """
    return sequence_average(logp - old_logp, mask, segment_ids)


def sequence_token_log_ratio(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """GSPO-token's log-ratio: the sequence's in value, each token's own in gradient (arXiv 2507.18071).

        log s_{i,t} = sg[log s_i] + log pi(y_t) - sg[log pi(y_t)]

    Equal to GSPO in value and gradient where the advantages of a sequence are equal.
    """
    sequence = sequence_log_ratio(logp, old_logp, mask, segment_ids=segment_ids)
    return lax.stop_gradient(sequence) + logp - lax.stop_gradient(logp)


def sequence_total_log_ratio(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The sequence's summed log-ratio at every token: its importance weight, not normalised by length."""
    return sequence_total(logp - old_logp, mask, segment_ids)
