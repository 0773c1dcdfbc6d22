"""Reductions of per-token losses [B, T] to one number: token mean, sequence mean, sequence sum.

Every reduction is a weighted sum over a denominator:

    loss = sum_{b,t} w_{bt} l_{bt} / Z

so that a batch split into micro-batches, each divided by the Z of the whole batch, sums to the loss of
the whole batch, and so do the gradients. Masked entries of `values` may hold anything, NaN included.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar
from rlhf_jax.kernels.prepare import cleaned


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A named reduction: token weights and the denominator that goes with them.

    Attributes:
      weights: mask [B, T] -> weights [B, T], 0 where masked.
      total: mask [B, T] -> the denominator of a batch with this mask; sums over a split of its rows.
    """

    weights: Callable[[Bool[Array, "B T"]], Float[Array, "B T"]]
    total: Callable[[Bool[Array, "B T"]], Float[Array, ""]]

    def __call__(
        self, values: Float[Array, "B T"], mask: Bool[Array, "B T"], *, denominator: Scalar | None = None
    ) -> Float[Array, ""]:
        """Reduces `values`, in at least float32: in bfloat16 a count of tokens is no longer exact.

        Args:
          denominator: replaces the batch's own, for micro-batches and shards.
        """
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        total = self.total(mask) if denominator is None else denominator
        weighted = clean(values, mask).astype(dtype) * self.weights(mask).astype(dtype)
        return jnp.sum(weighted) / jnp.maximum(jnp.asarray(total, dtype), jnp.finfo(dtype).tiny)


def _token_weights(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return mask.astype(jnp.float32)


def _row_weights(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    lengths = jnp.sum(mask, axis=-1, keepdims=True)
    return mask / jnp.maximum(lengths, 1)


def _token_count(mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(mask).astype(jnp.float32)


def _row_count(mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.any(mask, axis=-1)).astype(jnp.float32)


token_mean = Reduction(weights=_token_weights, total=_token_count)
"""Mean over all unmasked tokens of the batch (DAPO, Yu et al. 2025, arXiv 2503.14476; BNPO)."""

sequence_mean = Reduction(weights=_row_weights, total=_row_count)
"""Mean over rows of each row's token mean (GRPO, Shao et al. 2024, eq. 3). Empty rows do not count."""


@functools.lru_cache
def constant_length(length: int) -> Reduction:
    """Token sum over rows x a fixed `length` (Dr. GRPO, Liu et al. 2025): no length enters the gradient."""
    return Reduction(weights=_token_weights, total=lambda mask: _row_count(mask) * length)


sequence_sum = constant_length(1)
"""Mean over rows of each row's token *sum*: the policy gradient E[A grad log pi(y)] of whole answers
(REINFORCE, Williams 1992; RLOO, ReMax, OPO); LUSPO (arXiv 2602.05261), GSPO with rows weighted by length."""


RowMean: TypeAlias = Callable[[Float[Array, "..."]], Float[Array, ""]]
"""Rows, or pairs of them -> their mean, for losses on rows rather than tokens."""


def row_mean(
    mask: Bool[Array, "..."], weights: Float[Array, "..."] | None = None, denominator: Scalar | None = None
) -> RowMean:
    """The function rows -> sum of weighted unmasked rows / `denominator` (their number by default)."""

    def mean(values: Float[Array, "..."]) -> Float[Array, ""]:
        total = jnp.asarray(jnp.sum(mask) if denominator is None else denominator, values.dtype)
        scaled = values if weights is None else values * cleaned(weights, mask)
        return jnp.sum(clean(scaled, mask)) / jnp.maximum(total, jnp.finfo(values.dtype).tiny)

    return mean


def packed_sequence_mean(segment_ids: Int[Array, "B T"], num_segments: int) -> Reduction:
    """`sequence_mean` for packed rows: the mean over samples, however they share rows.

    Args:
      segment_ids: 0 for padding, 1 ... `num_segments` within each row.
    """
    one_hot = segment_ids[..., None] == jnp.arange(1, num_segments + 1)

    def weights(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        lengths = jnp.sum(one_hot & mask[..., None], axis=1, keepdims=True)
        return jnp.sum(one_hot / jnp.maximum(lengths, 1), axis=-1) * mask

    def total(mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        return jnp.sum(jnp.any(one_hot & mask[..., None], axis=1)).astype(jnp.float32)

    return Reduction(weights=weights, total=total)
