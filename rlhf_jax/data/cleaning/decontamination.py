"""Rows that give a benchmark away: runs of words that stand in its questions too.

Two published rules differ in their numbers. GPT-3 (Brown et al. 2020, appendix C) looks for any run of up to
13 words that a row shares with a benchmark, unless it is a common phrase (`least_share=0`, `size=13`,
`most_rows=10`); Tulu 3 (Lambert et al. 2024) for runs of eight words that make up more than half of a
question (`least_share=0.5`, `size=8`).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Bool, UInt
from rlhf_jax.data.cleaning.text import run_hashes, words


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A row and the benchmark's question that it gives away most of.

    Attributes:
      place: of the row.
      question: number of the question.
      share: of the question's words that stand in shared runs.
    """

    place: int
    question: int
    share: float


def find_ngram_overlaps(
    texts: Sequence[str],
    questions: Sequence[str],
    *,
    size: int = 8,
    least_share: float = 0.5,
    most_rows: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Overlap]:
    """Rows whose shared runs cover more than `least_share` of a question's words.

    A question of fewer words than `size` is one run, which only a text of the same words shares.

    Args:
      texts: of the rows.
      questions: of the benchmark.
      size: words in a run, after `text.words`.
      least_share: 0 for any run at all.
      most_rows: runs that stand in more rows than this are phrases, and count for nothing; 0 for no limit.
      progress: is told how many texts are done.

    Raises:
      UserError: a number out of range.
    """
    if size < 1 or not 0 <= least_share < 1 or most_rows < 0:
        raise UserError(
            f"decontamination: size {size}, share {least_share}, most rows {most_rows}: give at least 1 "
            "word, a share from 0 to below 1, and 0 or more rows"
        )
    places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    whole: dict[tuple[str, ...], int] = {}
    lengths = []
    for number, question in enumerate(questions):
        units = words(question)
        lengths.append(len(units))
        if len(units) < size:
            whole.setdefault(tuple(units), number)
        for start, run in enumerate(run_hashes(units, size).tolist()):
            places[run].append((number, start))
    wanted = np.sort(np.fromiter(places, np.uint64, len(places)))
    shared = []
    for place, text in enumerate(texts):
        units = words(text)
        runs = np.unique(run_hashes(units, size))
        shared.append((tuple(units), runs[_among(runs, wanted)]))
        progress(place + 1)
    if most_rows:
        runs, counts = np.unique(np.concatenate([runs for _, runs in shared]), return_counts=True)
        phrases = runs[counts > most_rows]
        shared = [(units, np.setdiff1d(runs, phrases)) for units, runs in shared]
    found = []
    for place, (units, runs) in enumerate(shared):
        covered: defaultdict[int, set[int]] = defaultdict(set)
        for run in runs.tolist():
            for number, start in places[run]:
                covered[number].update(range(start, start + size))
        shares = [(len(seen) / lengths[number], -number) for number, seen in covered.items()]
        if units in whole and len(units) < size:
            shares.append((1.0, -whole[units]))
        best, number = max(shares, default=(0.0, 0))
        if best > least_share:
            found.append(Overlap(place, -number, best))
    return found


def _among(numbers: UInt[np.ndarray, " N"], wanted: UInt[np.ndarray, " W"]) -> Bool[np.ndarray, " N"]:
    """Mask of the numbers that are wanted; these are sorted, and many."""
    places = np.minimum(np.searchsorted(wanted, numbers), len(wanted) - 1)
    return wanted[places] == numbers if len(wanted) else np.zeros(len(numbers), bool)
