"""Retrieval over a small collection of texts by BM25, as arrays."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlhf_jax.core.errors import UserError

_WORD = re.compile(r"\w+")
MAX_QUERY_CHARACTERS = 1000


class Index:
    """Texts by the words in them, ranked by BM25 (Robertson & Zaragoza 2009).

        score(q, d) = sum_{w in q} idf(w) f(w, d) (k1 + 1) / (f(w, d) + k1 (1 - b + b |d| / mean |d|))
        idf(w)      = log(1 + (N - n(w) + 1/2) / (n(w) + 1/2))

    f(w, d) counts w in d, |d| the words of d, n(w) the texts with w; this idf is never negative. Words are
    runs of letters and digits, without case.

    Args:
      texts: at least one.
      k1: how fast repetition of a word stops to count.
      b: how far length is made up for, from 0 to 1.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        if not texts:
            raise UserError("an index needs at least one text; give some")
        self.texts = list(texts)
        counts = [Counter(words(text)) for text in texts]
        lengths = np.array([count.total() for count in counts], np.float64)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1))
        places: dict[str, list[int]] = {}
        for place, count in enumerate(counts):
            for word in count:
                places.setdefault(word, []).append(place)
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, found in places.items():
            texts_with = np.array(found)
            frequency = np.array([counts[place][word] for place in found], np.float64)
            idf = np.log1p((len(texts) - len(found) + 0.5) / (len(found) + 0.5))
            self._postings[word] = (texts_with, idf * frequency * (k1 + 1) / (frequency + norm[texts_with]))

    def scores(self, query: str) -> np.ndarray:
        """[N] BM25 of each text; each time that a word stands in the query counts."""
        total = np.zeros(len(self.texts))
        for word in words(query[:MAX_QUERY_CHARACTERS]):
            if word in self._postings:
                places, weights = self._postings[word]
                total[places] += weights
        return total

    def places(self, query: str, count: int = 3) -> list[tuple[int, float]]:
        """(place, score) of the best texts that share a word with the query; the earlier one of equals."""
        scores = self.scores(query)
        best = np.argsort(-scores, kind="stable")[:count]
        return [(int(place), float(scores[place])) for place in best if scores[place] > 0]

    def search(self, query: str, count: int = 3) -> list[tuple[float, str]]:
        """(score, text) of the same texts."""
        return [(score, self.texts[place]) for place, score in self.places(query, count)]


def words(text: str) -> list[str]:
    """The words of a text, without case."""
    return _WORD.findall(text.casefold())
