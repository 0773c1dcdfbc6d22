"""Batch order, the examples of each step: a function of the step alone, so that resuming needs no state."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Int


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Endless shuffled batches with random access.

    Every epoch is a fresh permutation: batches, end to end, hold each example exactly once in each run of
    `num_examples`. A batch may begin in one epoch and end in the next, so none is short and none is lost.

    Attributes:
      num_examples: how many examples there are.
      batch_size: examples a batch, at most `num_examples`.
      seed: 0 to 2**32 - 1; decides all permutations.
    """

    num_examples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Raises: UserError for sizes or a seed out of range."""
        if self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size} is not positive; give at least 1")
        if self.batch_size > self.num_examples:
            raise UserError(
                f"a batch of {self.batch_size} is larger than the data set of {self.num_examples} examples; "
                "lower the batch size or give more data"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} is out of range; give one from 0 to {2**32 - 1}")

    @property
    def steps_per_epoch(self) -> float:
        """Batches an epoch; not whole where the batch size does not divide the data set."""
        return self.num_examples / self.batch_size

    def indices(self, step: int) -> Int[np.ndarray, " B"]:
        """Indices of the examples in the batch of `step`, which counts from 0."""
        if step < 0:
            raise UserError(f"step {step} is negative; steps count from 0")
        first = step * self.batch_size
        return np.array([self._order[place] for place in range(first, first + self.batch_size)], np.int64)

    @functools.cached_property
    def _order(self) -> Any:
        import grain

        return grain.MapDataset.range(self.num_examples).shuffle(seed=self.seed).repeat()


def fingerprint(arrays: Iterable[np.ndarray], rows: Iterable[Any] = ()) -> str:
    """SHA-256 over the arrays' shapes, dtypes and contents, in their order; kept with checkpoints.

    Args:
      rows: values as of JSON that count, too, such as the fields that rewards are given.
    """
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_as_json).encode())
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """Of what JSON does not know, in the same words in every process."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def joint_fingerprint(*fingerprints: str) -> str:
    """The fingerprint of several sets of data that a run takes together."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()
