"""Pairs of judged answers: who is paired with whom, and what cleaning leaves out."""

import dataclasses
import math

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.pairs import REASONS, Pair, best_vs_worst, clean, solution_pairs
from rlhf_jax.data.sources import Row

GOOD = Pair("2+2=?", "4", "5", 1.0, 0.0)


def changed(**fields):
    return dataclasses.replace(GOOD, **fields)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (changed(chosen_score=math.nan), "not judged"),
        (changed(rejected_score=1.0), "tie"),
        (changed(rejected_score=0.7), "tie"),
        (changed(rejected_score=2.0), "tie"),  # the worse one first is no preference
        (changed(rejected=" \n"), "empty"),
        (changed(chosen="4\ufffd"), "torn"),
        (changed(chosen="5"), "equal"),
        (GOOD, "repeated"),
    ],
)
def test_each_fault_is_left_out_and_counted(pair, reason):
    kept, counts = clean([GOOD, pair, changed(prompt="other")], min_margin=0.5)
    assert kept == [GOOD, changed(prompt="other")]
    assert counts == {name: int(name == reason) for name in REASONS}


def test_pairs_in_both_orders_contradict_each_other():
    other = changed(chosen="5", rejected="4")
    kept, counts = clean([GOOD, other, changed(prompt=[{"role": "user", "content": "2+2=?"}])])
    assert [type(pair.prompt) for pair in kept] == [list]
    assert counts["contradicted"] == 2
    assert sum(counts.values()) == 2


def test_the_best_meets_the_worst():
    answers = [("b", 2.0), ("unjudged", math.nan), ("d", 0.0), ("a", 3.0), ("c", 1.0)]
    pairs = best_vs_worst("p", answers, 2)
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [("a", "d", 3.0), ("b", "c", 1.0)]
    assert len(best_vs_worst("p", answers, 9)) == 2  # nobody twice
    assert best_vs_worst("p", answers[:2], 1) == []


def test_solutions_of_models_become_pairs():
    marks = {"x": True, "y": False, "z": False, "w": True}
    models = {name: {"solution": name, "is_correct": mark} for name, mark in marks.items()}
    row = Row({"question": "?", "ground_truth": "A: 7", **models}, "file:1")
    pairs = solution_pairs([row], most=2, seed=0)
    assert {pair.chosen for pair in pairs} == {"x", "w"}
    assert {pair.rejected for pair in pairs} == {"y", "z"}
    assert all(pair.margin == 1 and pair.prompt == "?" for pair in pairs)
    assert len(solution_pairs([row], most=1, seed=0)) == 1
    with pytest.raises(UserError, match=r"file:2: gives no `question`"):
        solution_pairs([Row({"question": "?", "answer": "7"}, "file:2")], most=1, seed=0)


@pytest.mark.parametrize(("solution", "mark"), [(["7"], True), ({"x": "7"}, True), ("7", 1), ("7", None)])
def test_solutions_of_other_types_are_not_left_out_in_silence(solution, mark):
    right, fields = {"solution": "7", "is_correct": True}, {"solution": solution, "is_correct": mark}
    row = Row({"question": "?", "a": right, "b": fields}, "file:3")
    with pytest.raises(UserError, match=r"^file:3: in 'b', `solution` is a text and `is_correct` true or"):
        solution_pairs([row], most=1, seed=0)
