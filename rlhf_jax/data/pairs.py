"""Preference pairs from judged answers, and their cleaning: what teaches nothing is left out, and counted."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import Row

REASONS = ("not judged", "tie", "empty", "torn", "equal", "repeated", "contradicted")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt.

    Attributes:
      prompt: a user's message, or messages.
      chosen: the better answer.
      rejected: the worse one.
      chosen_score: what it was judged to be worth; NaN where it could not be judged.
      rejected_score: the same of the other.
      preference: how probably the chosen answer is the better one, by a judge; None where there was none.
      order_gap: the judge's advantage for what it sees first, from -1 to 1; 0 where the order does not
        matter.
      agrees: whether a verifier also finds the chosen answer better; None where it finds both alike.
    """

    prompt: Any
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    preference: float | None = None
    order_gap: float | None = None
    agrees: bool | None = None

    @property
    def margin(self) -> float:
        """By how much the chosen answer is better."""
        return self.chosen_score - self.rejected_score

    def row(self) -> dict[str, Any]:
        """As a row of a file that `rlhf dpo` and `rlhf reward-model` read."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def best_vs_worst(prompt: Any, answers: Sequence[tuple[str, float]], most: int) -> list[Pair]:
    """The best answer with the worst, the second best with the second worst, and so on: `most` pairs at most.

    Args:
      answers: texts with their scores; those that could not be judged (NaN) are left out.
    """
    ranked = sorted((a for a in answers if not math.isnan(a[1])), key=lambda answer: -answer[1])
    count = min(most, len(ranked) // 2)
    sides = zip(ranked[:count], ranked[::-1][:count], strict=True)
    return [Pair(prompt, best, worst, high, low) for (best, high), (worst, low) in sides]


def solution_pairs(rows: Iterable[Row], *, most: int, seed: int) -> list[Pair]:
    """Right solutions with wrong ones to the same question, drawn without repetition.

    Args:
      rows: each with a `question` and, in other fields, objects with `solution` and `is_correct`, as several
        models' solutions to one question come.
      most: pairs of a question at most.

    Raises:
      UserError: a row without a question, or without such an object; or one whose fields are of other types.
    """
    rng, pairs = np.random.default_rng(seed), []
    for row in rows:
        question, found = _solutions(row)
        right, wrong = (
            rng.permutation([x["solution"] for x in found.values() if x["is_correct"] is truth]).tolist()
            for truth in (True, False)
        )
        pairs += [Pair(question, *sides, 1.0, 0.0) for sides in zip(right[:most], wrong[:most], strict=False)]
    return pairs


def solution_rows(rows: Iterable[Row]) -> list[Row]:
    """Each solution of such rows as a row of its own: `question`, `answer`, `is_correct` and its `writer`.

    Raises: as `solution_pairs`.
    """
    return [
        Row(
            {"question": question, "answer": x["solution"], "is_correct": x["is_correct"], "writer": writer},
            f"{row.where} ({writer})",
        )
        for row in rows
        for question, found in [_solutions(row)]
        for writer, x in found.items()
    ]


def _solutions(row: Row) -> tuple[str, dict[str, dict[str, Any]]]:
    found = {
        name: x
        for name, x in row.fields.items()
        if isinstance(x, dict) and {"solution", "is_correct"} <= x.keys()
    }
    for name, x in found.items():
        if not (isinstance(x["solution"], str) and isinstance(x["is_correct"], bool)):
            raise UserError(
                f"{row.where}: in {name!r}, `solution` is a text and `is_correct` true or false: mend it"
            )
    question = row.fields.get("question")
    if not found or not isinstance(question, str):
        raise UserError(f"{row.where}: gives no `question`, or no object of `solution` and `is_correct`")
    return question, found


def describe_judge(pairs: Iterable[Pair]) -> dict[str, float]:
    """Judge diagnostics (position bias, accuracy) from pairs of different answers.

    Returns:
      `order_gap`, the mean distance between its preferences in the two orders; `first_advantage`, the same
      with its sign, above 0 where what comes first is favoured; `inconsistent`, the share of pairs on which
      the two orders give two verdicts; `accuracy`, the share on which a verifier agrees, of `verified` pairs.
    """
    judged = [
        pair
        for pair in pairs
        if pair.order_gap is not None and pair.preference is not None and pair.chosen != pair.rejected
    ]
    judged = [pair for pair in judged if not math.isnan(pair.chosen_score)]
    if not judged:
        return {}
    gaps = np.array([pair.order_gap for pair in judged])
    sure = np.array([pair.preference for pair in judged]) - 0.5
    told = [pair.agrees for pair in judged if pair.agrees is not None]
    found = {
        "order_gap": float(np.mean(np.abs(gaps))),
        "first_advantage": float(np.mean(gaps)),
        "inconsistent": float(np.mean((sure + gaps / 2) * (sure - gaps / 2) < 0)),
    }
    return found | ({"accuracy": float(np.mean(told)), "verified": len(told)} if told else {})


def clean(pairs: Iterable[Pair], *, min_margin: float = 0.0) -> tuple[list[Pair], dict[str, int]]:
    """Pairs that can be learned from, in their order.

    Args:
      min_margin: least difference of scores that is more than a tie; one of 0 is a tie always.

    Returns:
      (kept, how many were left out for each reason): not judged, a tie, an empty answer, torn characters,
      equal answers, a repetition of an earlier pair, and contradiction: pairs that stand in both orders, of
      which none is kept.
    """
    counts: dict[str, int] = dict.fromkeys(REASONS, 0)
    kept: dict[tuple[str, str, str], Pair] = {}
    for pair in pairs:
        key = (json.dumps(pair.prompt, sort_keys=True), pair.chosen, pair.rejected)
        if reason := _fault(pair, min_margin) or ("repeated" if key in kept else None):
            counts[reason] += 1
        else:
            kept[key] = pair
    both = {key for key in kept if (key[0], key[2], key[1]) in kept}
    counts["contradicted"] = len(both)
    return [pair for key, pair in kept.items() if key not in both], counts


def _fault(pair: Pair, min_margin: float) -> str | None:
    """Why a pair by itself cannot be learned from; None where it can."""
    answers = (pair.chosen, pair.rejected)
    if math.isnan(pair.margin):
        return "not judged"
    if pair.margin <= 0 or pair.margin < min_margin:
        return "tie"
    if not all(answer.strip() for answer in answers):
        return "empty"
    if any("\ufffd" in answer for answer in answers):
        return "torn"
    return "equal" if pair.chosen == pair.rejected else None
