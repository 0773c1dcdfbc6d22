"""Several sources of rows in one stream: how much of each, and which row comes when."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Float, Int
from rlhf_jax.data.pipeline import BatchSampler

_CYCLE = 10_000
"""Draws after which the order of sources repeats; shares are exact to one in so many."""


def mixing_shares(
    sizes: Sequence[int], *, weights: Sequence[float] | None = None, temperature: float = 1.0, cap: int = 0
) -> Float[np.ndarray, " S"]:
    """Mixture proportions of the sources; they sum to 1.

        p_i ~ w_i,   or without weights   p_i ~ min(n_i, K)^(1 / T)

    T = 1 is proportional to size, a large T makes sources equal, and the cap K keeps one large source from
    drowning the others (Raffel et al. 2020, section 3.5.2).

    Args:
      sizes: n, rows of each source.
      weights: w; None for by size.
      temperature: T.
      cap: K; 0 for none.

    Raises:
      UserError: a number out of range, or weights together with what they replace.
    """
    if temperature <= 0 or cap < 0:
        raise UserError(
            f"mixture: temperature {temperature} and cap {cap}: give a positive one, and 0 or more"
        )
    if weights is not None:
        if temperature != 1 or cap:
            raise UserError("mixture: weights leave nothing to temperature and cap: give one or the other")
        if any(weight <= 0 for weight in weights):
            raise UserError("mixture: a weight is not positive: give one above 0, or leave the source out")
        parts = np.asarray(weights, float)
    else:
        parts = np.minimum(sizes, cap or np.inf) ** (1 / temperature)
    return parts / parts.sum()


@dataclasses.dataclass(frozen=True)
class MixtureSampler:
    """Endless batches of several sources with random access: `BatchSampler` where rows have shares.

    A function of the step alone. Draws of the sources are spread evenly, so that every stretch of the stream
    holds them in their shares, to about one draw each; every source goes through fresh permutations of its
    own rows.

    Attributes:
      sizes: rows of each source; they stand one source after the other.
      shares: of `mixing_shares`.
      batch_size: rows a batch.
      seed: 0 to 2**32 - 1; decides all permutations.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    batch_size: int
    seed: int

    def indices(self, step: int) -> Int[np.ndarray, " B"]:
        """Indices of the rows in the batch of `step`, which counts from 0."""
        if step < 0:
            raise UserError(f"step {step} is negative; steps count from 0")
        places = step * self.batch_size + np.arange(self.batch_size)
        cycles, within = np.divmod(places, _CYCLE)
        order, earlier, counts = self._pattern
        sources = order[within]
        numbers = cycles * counts[sources] + earlier[within]
        first = np.concatenate([[0], np.cumsum(self.sizes)])
        drawn = [self._samplers[s].indices(int(n))[0] for s, n in zip(sources, numbers, strict=True)]
        return first[sources] + np.asarray(drawn, np.int64)

    def source_of(self, indices: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """Source of each row."""
        return np.searchsorted(np.cumsum(self.sizes), indices, side="right").astype(np.int32)

    def epochs(self, steps: int) -> Float[np.ndarray, " S"]:
        """Epochs of each source in so many steps."""
        return steps * self.batch_size * np.asarray(self.shares) / np.asarray(self.sizes)

    @functools.cached_property
    def _samplers(self) -> list[BatchSampler]:
        return [BatchSampler(size, 1, (self.seed + n) % 2**32) for n, size in enumerate(self.sizes)]

    @functools.cached_property
    def _pattern(self) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"], Int[np.ndarray, " S"]]:
        """Of a cycle: the source of each draw, how many of that source came before, how many there are."""
        exact = np.asarray(self.shares) * _CYCLE
        counts = np.maximum(np.floor(exact).astype(np.int64), 1)
        while counts.sum() != _CYCLE:  # what rounding left over, or the least shares took too much
            sign = 1 if counts.sum() < _CYCLE else -1
            counts[np.argmax(sign * (exact - counts) + (counts > 1))] += sign
        sources = np.repeat(np.arange(len(counts)), counts)
        earlier = np.concatenate([np.arange(count) for count in counts])
        order = np.lexsort((sources, (earlier + 0.5) / counts[sources]))
        return sources[order], earlier[order], counts
