"""Judged solutions: where labels stand, what is made of socratic solutions, what is refused."""

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.data.process_rewards import (
    is_socratic,
    pad_labels,
    process_examples,
    socratic_rows,
    until_first_mistake,
)
from rlhf_jax.data.sources import Row
from rlhf_jax.tasks import arithmetic

TOKENIZER = arithmetic.arithmetic_tokenizer()
QUESTION = "Tom has 2 bags of 6 apples and eats 1. How many are left?"
SOCRATIC = {
    "question": QUESTION,
    "answer": "How many apples? ** He has 2*6=<<2*6=12>>12 apples.\n"
    "How many are left? ** 12-1=<<12-1=11>>11\n#### 11",
}


def test_labels_stand_at_the_ends_of_steps():
    row = {"prompt": "7+8+6=?", "completions": ["7+8=15", "15+6=20", "#### 20"], "labels": [True, 0.25, None]}
    (example,) = process_examples([Row(row, "here")], TOKENIZER)
    text = TOKENIZER.decode(example.ids.tolist(), skip_special=False)
    assert text.endswith("7+8=15\n15+6=20\n#### 20<|im_end|>")
    ends = np.flatnonzero(example.mask)
    before = [TOKENIZER.decode(example.ids[: end + 1].tolist()) for end in ends]
    assert before[0].endswith("7+8=15\n")
    assert before[1].endswith("15+6=20\n")
    assert example.labels[ends].tolist() == [1.0, 0.25]
    padded = pad_labels([example], 64)
    mask = pad_rows([example], 64).mask
    np.testing.assert_array_equal(padded[mask], [1.0, 0.25])
    assert padded.sum() == 1.25


@pytest.mark.parametrize("level", [1, 2])
def test_embedded_rows_judge_steps_or_the_answer(level):
    level = arithmetic.LEVELS[level]
    options = {"slip_rate": 0.5, "split": "train", "count": 200, "seed": 0}
    steps = arithmetic.judged_rows(level, **options)
    outcomes = arithmetic.judged_rows(level, **options, outcome=True)
    plain = arithmetic.step_rows(level, **options)
    for judged, outcome, bare in zip(steps, outcomes, plain, strict=True):
        assert judged["completions"][:-1] == bare["completions"]
        assert judged["labels"] == [*bare["labels"], None]
        assert outcome["completions"] == judged["completions"]
        first, *others = ANSWER_MARK, *outcome["completions"][-1].split()[1:]
        assert first == outcome["completions"][-1].split()[0]
        truth = int(others[0]) == eval_left_to_right(judged["prompt"])
        assert outcome["labels"] == [None] * len(bare["labels"]) + [truth]
    rights = [row["labels"][-1] for row in outcomes]
    assert 0.2 < np.mean(rights) < 0.8


def eval_left_to_right(prompt):
    total, sign, number = 0, 1, ""
    for character in prompt.removesuffix("=?") + "+":
        if character in "+-":
            total, sign, number = total + sign * int(number), 1 if character == "+" else -1, ""
        else:
            number += character
    return total


def test_socratic_solutions_are_made_wrong_and_cut():
    rows = [Row(SOCRATIC, f"file:{number}") for number in range(200)]
    assert all(map(is_socratic, rows))
    assert not is_socratic(Row({"question": "?", "answer": "#### 1"}, "plain"))
    made = socratic_rows(rows, 0)
    wrong = [row for row in made if False in row.fields["labels"]]
    assert 60 < len(wrong) < 140
    lengths = set()
    for row in made:
        steps, labels = row.fields["completions"], row.fields["labels"]
        assert labels[-1] is None
        assert len(steps) == len(labels)
        if False in labels:
            assert labels[:-2] == [True] * (len(labels) - 2)
            assert labels[-2] is False
            place = len(steps) - 2
            original = SOCRATIC["answer"].split("\n")
            assert steps[:place] == original[:place]
            left, _, right = steps[place].partition("<<")
            result, shown = right.split("=")[1].split(">>")
            assert result != original[place].split("<<")[1].split("=")[1].split(">>")[0]
            assert shown.startswith(result)
            assert left == original[place].partition("<<")[0]
            lengths.add(len(steps))
        else:
            assert steps == SOCRATIC["answer"].split("\n")
            assert labels == [True, True, None]
    assert lengths == {2, 3}
    assert [row.fields for row in made] == [row.fields for row in socratic_rows(rows, 0)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ""}, "prompt"),
        ({"completions": "7+8=15"}, "completions"),
        ({"labels": [True]}, "one label a step"),
        ({"labels": [None, None]}, "not all null"),
        ({"labels": [True, 2]}, "from 0 to 1"),
    ],
)
def test_bad_rows_are_named(change, said):
    row = {"prompt": "1+1=?", "completions": ["1+1=2", "#### 2"], "labels": [True, None], **change}
    with pytest.raises(UserError, match=f"file:3.*{said}"):
        process_examples([Row(row, "file:3")], TOKENIZER)


def test_labels_until_the_first_mistake():
    row = Row({"prompt": "1", "completions": ["a"] * 5, "labels": [True, None, False, True, None]}, "here")
    assert until_first_mistake(row).fields["labels"] == [True, None, False, False, None]
