"""Texts that say the same, exactly or nearly: MinHash signatures, banded for look-up (Broder 1997).

Of two texts that are alike the earlier stays. The same texts in the same order give the same answer.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import UInt
from rlhf_jax.data.cleaning.text import mix, run_hashes, words

_RECALL = 0.98
"""Least probability of finding a pair that is just as alike as the threshold."""


@dataclasses.dataclass(frozen=True)
class Repeat:
    """A text that stands among the earlier ones.

    Attributes:
      place: its own.
      first: that of the earlier one.
      similarity: Jaccard's, of their shingles.
    """

    place: int
    first: int
    similarity: float


def exact_duplicates(texts: Sequence[str]) -> list[Repeat]:
    """Texts that were there before, but for their spaces."""
    seen: dict[str, int] = {}
    found = []
    for place, text in enumerate(texts):
        first = seen.setdefault(" ".join(text.split()), place)
        if first != place:
            found.append(Repeat(place, first, 1.0))
    return found


def near_duplicates(
    texts: Sequence[str],
    *,
    jaccard_threshold: float = 0.8,
    ngram_size: int = 3,
    hashes: int = 128,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Repeat]:
    """Texts of which an earlier one, itself kept, shares at least `jaccard_threshold` of the shingles.

        J(A, B) = |A and B| / |A or B|,   P(min h(A) = min h(B)) = J(A, B)

    Signatures only find candidates; whether they are alike is then counted exactly, so that nothing is
    dropped by chance, and a pair just at the threshold is missed with probability below 2 %.

    Args:
      jaccard_threshold: of Jaccard's similarity, in (0, 1].
      ngram_size: words in a run; texts with fewer are one shingle.
      hashes: numbers in a signature.
      seed: of the hash functions.
      progress: is told how many texts are done.

    Raises:
      UserError: a number out of range.
    """
    if not 0 < jaccard_threshold <= 1 or ngram_size < 1 or hashes < 1:
        raise UserError(
            f"near duplicates: jaccard_threshold {jaccard_threshold}, ngram_size {ngram_size}, hashes "
            f"{hashes}: give a threshold above 0 and up to 1, and at least 1 of the others"
        )
    rows = band_rows(jaccard_threshold, hashes)
    bands = hashes // rows
    multipliers, shifts = _hash_functions(bands * rows, seed)
    kept: list[defaultdict[bytes, list[int]]] = [defaultdict(list) for _ in range(bands)]
    sets: dict[int, UInt[np.ndarray, " N"]] = {}
    found = []
    for place, text in enumerate(texts):
        shingles = shingle_set(text, ngram_size)
        signature = np.min((shingles[:, None] * multipliers + shifts) >> np.uint64(32), axis=0)
        keys = [band.tobytes() for band in signature.reshape(bands, rows)]
        candidates = sorted(
            {other for table, key in zip(kept, keys, strict=True) for other in table.get(key, ())}
        )
        likeness = [(jaccard(shingles, sets[other]), -other) for other in candidates]
        best, first = max(likeness, default=(0.0, 0))
        if best >= jaccard_threshold:
            found.append(Repeat(place, -first, best))
        else:
            sets[place] = shingles
            for table, key in zip(kept, keys, strict=True):
                table[key].append(place)
        progress(place + 1)
    return found


def shingle_set(text: str, size: int) -> UInt[np.ndarray, " N"]:
    """Hashes of the runs of `size` words, sorted, each once; of all words where there are fewer.

    Signs of arithmetic are words here: 5+4 is not 5-4.
    """
    units = words(text, signs=True) or [text]
    return np.unique(run_hashes(units, min(size, len(units))))


def jaccard(first: UInt[np.ndarray, " N"], second: UInt[np.ndarray, " M"]) -> float:
    """|A and B| / |A or B| of two sets as `shingle_set` gives them."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def band_rows(threshold: float, hashes: int) -> int:
    """Numbers in a band: as many as still find a pair at the threshold with probability 98 %.

    A pair with similarity s shares one of b bands of r numbers with probability 1 - (1 - s^r)^b.
    """
    fitting = [
        rows for rows in range(1, hashes + 1) if 1 - (1 - threshold**rows) ** (hashes // rows) >= _RECALL
    ]
    return max(fitting, default=1)


def _hash_functions(count: int, seed: int) -> tuple[UInt[np.ndarray, " H"], UInt[np.ndarray, " H"]]:
    """a and b of h(x) = (a x + b) mod 2^64, of which the upper half counts; a is odd."""
    numbers = mix(np.arange(2 * count, dtype=np.uint64) + mix(np.array([seed], np.uint64)))
    return numbers[:count] | np.uint64(1), numbers[count:]
