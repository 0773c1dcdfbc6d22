"""Rankings of K answers to a prompt, and pairs as rankings of two: rows to examples.

    {"prompt": "Name a prime.", "completions": ["7", "9", "It is 7."], "ranks": [0, 2, 0]}
    {"prompt": "Name a prime.", "chosen": "7", "rejected": "9", "margin": 1.0}

Rank 0 is the best; only the order of ranks counts, and answers of equal rank are not compared.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.content_parts import load_images
from rlhf_jax.data.examples import (
    SupervisedExample,
    encode_completion,
    join_completion,
    make_examples,
    preference_example,
)
from rlhf_jax.data.packing import Overlength
from rlhf_jax.data.row_messages import row_messages, tools_of
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer

_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class RankingExample:
    """A prompt with K ranked answers.

    Attributes:
      answers: the prompt with each of them, as samples, best first.
      ranks: 0, 1, ...: as many as there are different ones; 0 is the best.
      where: the row it came from.
      margin: by how much a better answer is better, the field `margin` of the row; None where it has none.
      preference: how probably a pair's chosen answer is the better one, or 1.
    """

    answers: tuple[SupervisedExample, ...]
    ranks: tuple[int, ...]
    where: str
    margin: float | None = None
    preference: float = 1.0


def ranking_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, overlength: Overlength = "error"
) -> list[RankingExample]:
    """Rankings of rows with `prompt`, `completions`, `ranks`, and pairs of `preference_examples`, best first.

    Args: as `preference_examples`; `max_length` holds for a prompt with any of its answers.

    Raises:
      UserError: as `preference_examples`; ranks that are no numbers, all equal, or of another count than the
        completions; fewer than two completions, or equal ones of different rank; a margin that is no number.
    """

    def make(row: Row) -> RankingExample:
        if row.fields.get("completions") is not None:
            return _ranking(row, tokenizer)
        pair = preference_example(row, tokenizer)
        sides = pair.chosen, pair.rejected
        return RankingExample(sides, (0, 1), row.where, _margin(row), pair.preference)

    def size(example: RankingExample) -> int:
        return max(len(answer.ids) for answer in example.answers)

    return make_examples(rows, make, size, max_length, overlength, "the prompt with its longest completion")


def _ranking(row: Row, tokenizer: Tokenizer) -> RankingExample:
    for other in ("chosen", "rejected"):
        if row.fields.get(other) is not None:
            raise UserError(f"the row has both 'completions' and {other!r}; keep a ranking or a pair")
    prompt, completions = row_messages(row, "prompt", "user"), row.fields["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise UserError("field 'completions' is no list of two answers or more; give them or remove the row")
    ranks = _ranks(row, len(completions))
    named = {f"completions[{number}]": completion for number, completion in enumerate(completions)}
    texts = [row_messages(Row(named, row.where), name, "assistant") for name in named]
    for (a, text), (b, other) in itertools.combinations(enumerate(texts), 2):
        if text == other and ranks[a] != ranks[b]:
            raise UserError(f"completions {a} and {b} are the same, and their ranks differ; remove one")
    tools = tools_of(row)
    prompt, images = load_images(tokenizer, prompt, row.fields)
    prompt_ids = encode_prompt(tokenizer, prompt, tools=tools)
    answers = tuple(
        join_completion(
            np.array(prompt_ids, np.int32),
            *encode_completion(tokenizer, prompt, prompt_ids, text, tools),
            row.where,
            images,
        )
        for text in texts
    )
    order = sorted(range(len(ranks)), key=lambda number: ranks[number])
    in_order = tuple(answers[number] for number in order), tuple(ranks[number] for number in order)
    return RankingExample(*in_order, row.where, _margin(row))


def _ranks(row: Row, count: int) -> tuple[int, ...]:
    ranks = row.fields.get("ranks")
    if not isinstance(ranks, list) or len(ranks) != count:
        given = len(ranks) if isinstance(ranks, list) else "none"
        raise UserError(
            f"field 'ranks' ranks {given} of {count} completions; give one number to each, 0 the best"
        )
    for rank in ranks:
        if not _is_number(rank):
            raise UserError(f"field 'ranks' holds {rank!r}; give numbers, 0 the best")
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    if len(order) == 1:
        raise UserError("all completions have the same rank: there is nothing to learn from; remove the row")
    return tuple(order[rank] for rank in ranks)


def _margin(row: Row) -> float | None:
    value = row.fields.get("margin")
    if value is not None and not _is_number(value):
        raise UserError(f"field 'margin' is {value!r}; give a number or remove it")
    return None if value is None else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
