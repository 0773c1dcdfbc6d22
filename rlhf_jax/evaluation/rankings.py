"""How well scores order ranked answers: pairs in order, the best answer on top."""

import numpy as np

from rlhf_jax.core.types import Bool, Float, Int


def pair_leads(
    scores: Float[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"], mask: Bool[np.ndarray, "N K"]
) -> Float[np.ndarray, " P"]:
    """By how much the better answer leads, of every pair of different rank, row after row.

    Args:
      ranks: the smaller the better.
      mask: answers there are.
    """
    pairs = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    return (scores[:, :, None] - scores[:, None, :])[pairs]


def top1_accuracy(
    scores: Float[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"], mask: Bool[np.ndarray, "N K"]
) -> float:
    """Share of rows whose answer of the highest score is one of the best rank. Args: as `pair_leads`."""
    first = np.argmax(np.where(mask, scores, -np.inf), axis=1)[:, None]
    best = np.min(np.where(mask, ranks, np.iinfo(ranks.dtype).max), axis=1)
    return float(np.mean(np.take_along_axis(ranks, first, axis=1)[:, 0] == best))
