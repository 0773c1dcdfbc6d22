"""Text overlap metrics: corpus BLEU and ROUGE. NumPy only.

Each has two halves: the sufficient statistics of every example as rows of an array, and the metric of any
such rows. An interval or a comparison resamples the rows (`statistics.bootstrap_interval`,
`statistics.paired_bootstrap`) and never reads a text twice.

Scores are shares from 0 to 1.
"""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rlhf_jax.core.types import Float, Int

Smoothing = Literal["exp", "add_one", "none"]
References = Sequence[str | Sequence[str]]
"""For each hypothesis one reference, or several."""

_BLEU_ORDERS = 4
# What NIST's mteval-v13a sets apart: signs other than . , - ' and a full stop or comma that is not between
# digits, and a hyphen behind a digit.
_SIGNS = re.compile(r"([\x20-\x26\x28-\x2b\x2f\x3a-\x40\x5b-\x60\x7b-\x7e])")
_AFTER_WORD, _BEFORE_WORD = re.compile(r"([^0-9])([.,])"), re.compile(r"([.,])([^0-9])")
_DIGIT_HYPHEN = re.compile(r"([0-9])(-)")
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_NOT_ROUGE = re.compile(r"[^a-z0-9]+")


# BLEU ----------------------------------------------------------------------------------------------


def tokenize_13a(text: str) -> list[str]:
    """Words and signs as NIST's mteval-v13a finds them: "13a", the default of sacreBLEU (Post 2018)."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in _ENTITIES.items():
        text = text.replace(entity, sign)
    text = _SIGNS.sub(r" \1 ", f" {text} ")
    text = _BEFORE_WORD.sub(r" \1 \2", _AFTER_WORD.sub(r"\1 \2 ", text))
    return _DIGIT_HYPHEN.sub(r"\1 \2 ", text).split()


def bleu_statistics(
    hypotheses: Sequence[str],
    references: References,
    *,
    tokenize_fn: Callable[[str], list[str]] = tokenize_13a,
) -> Int[np.ndarray, "N 10"]:
    """Sufficient statistics of BLEU, one row an example.

    Args:
      hypotheses: texts to judge.
      references: one or several to each; an n-gram counts as often as the reference that has it most often.

    Returns:
      Columns: n-grams of the hypothesis that are in a reference (clipped) for n = 1 ... 4, its n-grams for
      n = 1 ... 4, its tokens, and the tokens of the reference nearest in length (the shorter of two).

    Raises:
      ValueError: not as many references as hypotheses, or an example without any.
    """
    rows = []
    for text, others in _paired(hypotheses, references):
        tokens, targets = tokenize_fn(text), [tokenize_fn(other) for other in others]
        nearest = min((abs(len(target) - len(tokens)), len(target)) for target in targets)[1]
        matches, totals = [], []
        for order in range(1, _BLEU_ORDERS + 1):
            allowed: collections.Counter[tuple[str, ...]] = collections.Counter()
            for target in targets:
                allowed |= _ngrams(target, order)
            found = _ngrams(tokens, order)
            matches.append((found & allowed).total())
            totals.append(found.total())
        rows.append([*matches, *totals, len(tokens), nearest])
    return np.array(rows, np.int64).reshape(-1, 2 * _BLEU_ORDERS + 2)


def bleu(statistics: Int[np.ndarray, "N 10"], *, smoothing: Smoothing = "exp") -> float:
    """Corpus BLEU of up to four words in a row (Papineni et al. 2002), from sums over examples.

        min(1, exp(1 - r / c)) exp(1/4 sum_n log p_n)

    with p_n the share of n-grams that are in a reference, c and r the tokens of hypotheses and references.

    Args:
      statistics: rows of `bleu_statistics`.
      smoothing: where no n-gram of an order is right: "exp" takes half, a quarter, ... of one for the
        first, second, ... such order (Chen & Cherry 2014, method 3; what sacreBLEU does), "add_one" adds one
        to both counts of every order above 1 (Lin & Och 2004), "none" is 0.
    """
    sums = np.asarray(np.sum(statistics, axis=0, dtype=np.float64))
    matches, totals = sums[:_BLEU_ORDERS].copy(), sums[_BLEU_ORDERS : 2 * _BLEU_ORDERS].copy()
    length, target = sums[-2:]
    if not matches.any():
        return 0.0
    if smoothing == "add_one":
        matches[1:] += 1
        totals[1:] += 1
    elif smoothing == "exp":
        missed = matches == 0
        matches[missed] = 0.5 ** np.arange(1, missed.sum() + 1)
    if not matches.all() or not totals.all():
        return 0.0
    brevity = min(0.0, 1 - target / length)
    return float(np.exp(brevity + np.mean(np.log(matches / totals))))


# ROUGE ---------------------------------------------------------------------------------------------


def tokenize_rouge(text: str) -> list[str]:
    """Runs of a-z and 0-9 in lower case, as rouge-score finds them without stemming."""
    return _NOT_ROUGE.sub(" ", text.lower()).split()


def rouge_n(
    hypotheses: Sequence[str],
    references: References,
    *,
    order: int,
    tokenize_fn: Callable[[str], list[str]] = tokenize_rouge,
) -> Float[np.ndarray, "N 3"]:
    """ROUGE-N of every example (Lin 2004): n-grams that hypothesis and reference share.

    Args:
      references: where there are several, the one with the highest F1 counts.
      order: n.

    Returns:
      Precision, recall and F1 of each; the corpus has their means.
    """

    def shared(tokens: list[str], target: list[str]) -> tuple[int, int, int]:
        found, wanted = _ngrams(tokens, order), _ngrams(target, order)
        return (found & wanted).total(), found.total(), wanted.total()

    return _best_of_references(hypotheses, references, shared, tokenize_fn)


def rouge_l(
    hypotheses: Sequence[str],
    references: References,
    *,
    tokenize_fn: Callable[[str], list[str]] = tokenize_rouge,
) -> Float[np.ndarray, "N 3"]:
    """ROUGE-L of every example (Lin 2004): the longest common subsequence of tokens, texts taken whole.

    Args: as `rouge_n`.

    Returns:
      Precision, recall and F1 (beta of 1) of each; the corpus has their means.
    """

    def shared(tokens: list[str], target: list[str]) -> tuple[int, int, int]:
        return longest_common_subsequence(tokens, target), len(tokens), len(target)

    return _best_of_references(hypotheses, references, shared, tokenize_fn)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence: tokens in the same order, others in between or not."""
    numbers: dict[str, int] = {}
    left, right = (
        np.array([numbers.setdefault(token, len(numbers)) for token in side], np.int64)
        for side in (first, second)
    )
    lengths = np.zeros(len(right) + 1, np.int64)
    for token in left:
        # Row i of the table: from above, from the diagonal where tokens agree, then from the left.
        lengths[1:] = np.maximum(lengths[1:], lengths[:-1] + (right == token))
        np.maximum.accumulate(lengths, out=lengths)
    return int(lengths[-1])


def _best_of_references(
    hypotheses: Sequence[str],
    references: References,
    shared_fn: Callable[[list[str], list[str]], tuple[int, int, int]],
    tokenize_fn: Callable[[str], list[str]],
) -> Float[np.ndarray, "N 3"]:
    rows = []
    for text, others in _paired(hypotheses, references):
        tokens = tokenize_fn(text)
        scores = [_precision_recall_f1(*shared_fn(tokens, tokenize_fn(other))) for other in others]
        rows.append(max(scores, key=lambda score: score[2]))
    return np.array(rows, np.float64).reshape(-1, 3)


def _precision_recall_f1(shared: int, found: int, wanted: int) -> tuple[float, float, float]:
    return shared / max(found, 1), shared / max(wanted, 1), 2 * shared / max(found + wanted, 1)


def _ngrams(tokens: Sequence[str], order: int) -> "collections.Counter[tuple[str, ...]]":
    return collections.Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _paired(hypotheses: Sequence[str], references: References) -> list[tuple[str, Sequence[str]]]:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses cannot be held against {len(references)} references")
    several = [[other] if isinstance(other, str) else other for other in references]
    for number, others in enumerate(several):
        if not others:
            raise ValueError(f"example {number} has no reference")
    return list(zip(hypotheses, several, strict=True))
