"""Rows of rankings and of pairs, their order, and what is wrong with others."""

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import preference_examples
from rlhf_jax.data.rankings import ranking_examples
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
RANKED = {"prompt": "Q", "completions": ["b", "c", "a", "a2"], "ranks": [1, 2.5, -1, -1]}
PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}


def read(*rows, **options):
    numbered = [Row(row, f"rows.jsonl:{number}") for number, row in enumerate(rows, start=1)]
    return ranking_examples(numbered, TOKENIZER, **{"max_length": 1000} | options)


def test_answers_stand_best_first_and_ranks_become_small_whole_numbers():
    (example,) = read(RANKED)
    texts = [TOKENIZER.decode(answer.ids[answer.mask].tolist()) for answer in example.answers]
    assert texts == ["a", "a2", "b", "c"]
    assert example.ranks == (0, 0, 1, 2)
    assert (example.margin, example.preference, example.where) == (None, 1.0, "rows.jsonl:1")


def test_a_pair_is_the_ranking_of_two_that_its_completions_are():
    pair, ranked = read(
        PAIR | {"margin": 1, "preference": 0.8},
        {"prompt": "Q", "completions": ["b", "a"], "ranks": [1, 0]},
    )
    (usual,) = preference_examples([Row(PAIR, "")], TOKENIZER, max_length=1000)
    for example in (pair, ranked):
        assert example.ranks == (0, 1)
        for found, expected in zip(example.answers, (usual.chosen, usual.rejected), strict=True):
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.mask, expected.mask)
    assert (pair.margin, pair.preference) == (1.0, 0.8)


def test_messages_are_answers_too():
    plain, messages = read(
        RANKED,
        RANKED
        | {
            "prompt": [{"role": "user", "content": "Q"}],
            "completions": [[{"role": "assistant", "content": text}] for text in RANKED["completions"]],
        },
    )
    for found, expected in zip(messages.answers, plain.answers, strict=True):
        np.testing.assert_array_equal(found.ids, expected.ids)


BAD = {
    "fewer ranks": ({"ranks": [0, 1]}, "ranks 2 of 4 completions"),
    "no ranks": ({"ranks": None}, "ranks none of 4 completions"),
    "a word": ({"ranks": [0, 1, "best", 2]}, "holds 'best'; give numbers"),
    "a truth": ({"ranks": [True, False, 1, 2]}, "holds True"),
    "nan": ({"ranks": [0, 1, float("nan"), 2]}, "holds nan"),
    "all equal": ({"ranks": [3, 3, 3, 3]}, "the same rank"),
    "one answer": ({"completions": ["a"], "ranks": [0]}, "two answers or more"),
    "a text": ({"completions": "a", "ranks": [0]}, "two answers or more"),
    "an empty one": ({"completions": ["a", "b", " ", "c"]}, r"'completions\[2\]' is empty"),
    "a contradiction": ({"completions": ["a", "b", "a", "c"]}, "completions 0 and 2 are the same"),
    "a pair besides": ({"chosen": "a"}, "both 'completions' and 'chosen'"),
    "a word for a margin": ({"margin": "wide"}, "'margin' is 'wide'"),
    "too wide a margin": ({"margin": 10**400}, "give a number"),
    "no prompt": ({"prompt": None}, "'prompt' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_what_is_wrong(case):
    change, said = BAD[case]
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{said}"):
        read(PAIR, RANKED | change)


def test_equal_answers_of_equal_rank_are_no_contradiction():
    assert read(RANKED | {"completions": ["b", "c", "a", "a"]})[0].ranks == (0, 0, 1, 2)


def test_the_longest_answer_decides_what_is_too_long(caplog):
    long = RANKED | {"completions": ["b", "c" * 50, "a", "a2"]}
    size = max(len(answer.ids) for answer in read(RANKED)[0].answers)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the prompt with its longest completion"):
        read(RANKED, long, max_length=size)
    assert len(read(RANKED, long, max_length=size, overlength="drop")) == 1
    assert "dropped 1 of 2" in caplog.text
