"""The embedded task with reviews, and constitutions."""

import json
import re

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.feedback.constitution import constitution_rows, read_constitution
from rlhf_jax.tasks import arithmetic_reviews as reviews

ROWS = reviews.skill_rows(
    reviews.REVIEW_LEVEL, "train", reviews.Mixture(60, 60, 60, 60), 0, slip_rate=0.3, late_slip_rate=0.7
)


def lines_right(prompt, answer):
    """Says for each line whether it is right, from the text alone."""
    *steps, last = answer.split("\n")
    numbers = [re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step) for step in steps]
    found = [int(m[1]) + int(m[2]) == int(m[3]) for m in numbers]
    return [*found, last == f"#### {numbers[-1][3]}"], last == f"#### {sum(map(int, prompt[:-2].split('+')))}"


def skill(name):
    return [[m["content"] for m in row["messages"]] for row in ROWS if row["skill"] == name]


def test_critics_name_the_first_wrong_line_and_revisions_are_right():
    careless = 0
    for prompt, answer, request, critique, again, revision in skill("review"):
        right, _ = lines_right(prompt, answer)
        wrong = [line for line, good in zip(answer.split("\n"), right, strict=True) if not good]
        assert critique == (f"{wrong[0]} is wrong" if wrong else "all is right")
        assert lines_right(prompt, revision) == ([True] * 4, True)
        assert (request, again) == (reviews.CONSTITUTION[0].critique, reviews.CONSTITUTION[0].revision)
        careless += bool(wrong)
    assert 15 < careless < 45


def test_judges_are_right_and_favour_no_place():
    first = 0
    for question, said in skill("comparison"):
        verdict, _ = said.split("\n")
        _, prompt, rest = question.split("\n", 2)
        sides = re.fullmatch(r"A\n(.*)\nB\n(.*)", rest, re.DOTALL).groups()
        assert [lines_right(prompt, side)[1] for side in sides] == [verdict == "A", verdict == "B"]
        first += verdict == "A"
    assert 18 < first < 42
    for question, said in skill("rating"):
        _, prompt, answer = question.split("\n", 2)
        rating, reason = said.split("\n")
        assert int(rating) == sum(lines_right(prompt, answer)[0])
        assert (reason == "all is right") == (rating == "4")
    for name, where in (("steps", slice(-1)), ("follows", slice(-1, None))):
        verdicts = set()
        for question, said in skill(name):
            verdict, _ = said.split("\n")
            _, prompt, answer = question.split("\n", 2)
            assert verdict == ("yes" if all(lines_right(prompt, answer)[0][where]) else "no")
            verdicts.add(verdict)
        assert verdicts == {"yes", "no"}


def test_ranked_rows_rank_by_their_mistakes():
    for row in reviews.ranked_rows(reviews.REVIEW_LEVEL, "train", 20, 0):
        mistakes = [
            (not all(right[:-1])) + (not right[-1])
            for right in (lines_right(row["prompt"], text)[0] for text in row["completions"])
        ]
        assert mistakes == row["ranks"] == [0, 1, 1, 2]


def test_requests_and_verdicts_are_single_tokens():
    tokenizer = reviews.review_tokenizer()
    principle = reviews.CONSTITUTION[0]
    words = [principle.critique, principle.revision, "yes", "no", *principle.choices, *principle.ratings]
    assert [len(tokenizer.encode(word)) for word in words] == [1] * len(words)
    text = ROWS[0]["messages"][0]["content"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_constitutions_come_from_lines_or_rows(tmp_path):
    (tmp_path / "lines.txt").write_text("Be {kind}.\n\nSay what you do not know.\n")
    kind, honest = read_constitution(tmp_path / "lines.txt")
    assert "Be {kind}." in kind.compare("2+2?", "4", "5")
    assert kind.compare("{x}", "4", "5").count("{x}") == 1
    assert "Say what you do not know." in honest.critique
    rows = constitution_rows([*reviews.CONSTITUTION, kind])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_constitution(tmp_path / "rows.jsonl") == [*reviews.CONSTITUTION, kind]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"principle": "p", "compare": "x"}, "no part of a principle: compare"),
        ({"critique": "c"}, "neither `principle` nor name"),
        ({"principle": "p", "choices": ["A", "A"]}, "list of different words"),
        ({"principle": "p", "choices": ["A", "B", "C"]}, "list of different words"),
        ({"principle": "p", "rating": "{prompt}"}, "rating has the places"),
        ({"principle": "p", "rating": "{prompt"}, "rating is no template"),
        ({"principle": "p", "rating": "{prompt!z} {answer}"}, "rating has the places {answer}, {prompt!z}"),
        ({"principle": "p", "rating": "{prompt} {answer:>999999999}"}, "rating has the places {answer:>9"),
        ({"principle": "p", "name": 3}, "not text"),
    ],
)
def test_a_principle_that_cannot_be_asked_is_refused(tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=re.escape("rows.jsonl:1: ") + ".*" + re.escape(said)):
        read_constitution(tmp_path / "rows.jsonl")


def test_a_constitution_without_a_principle_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(UserError, match=name):
            read_constitution(tmp_path / name)


def test_slips_of_reviews_are_those_of_the_demonstrators():
    level = reviews.REVIEW_LEVEL
    rng = np.random.default_rng(0)
    from rlhf_jax.tasks.arithmetic import demonstrator_slips

    drawn = [demonstrator_slips(rng, level, slip_rate=0.3, late_slip_rate=0.7) for _ in range(4000)]
    np.testing.assert_allclose(np.mean(drawn, axis=0), [0.3, 0.3, 0.7], atol=0.04)
