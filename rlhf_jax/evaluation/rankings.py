"""Ranking accuracy of scores over ranked answers: pairs in order, the best answer on top."""

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
    """Share of rows in which only an answer of the best rank scores highest. Args: as `pair_leads`."""
    lowest_rank = np.min(np.where(mask, ranks, np.iinfo(ranks.dtype).max), axis=1, keepdims=True)
    best = mask & (ranks == lowest_rank)
    highest, of_others = (np.max(np.where(x, scores, -np.inf), axis=1) for x in (best, mask & ~best))
    return float(np.mean(highest > of_others))
