"""Benchmark rows, shots and prompts, as text."""

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import Row
from rlhf_jax.evaluation.benchmarks import (
    chat_prompt,
    choice_turns,
    choose_shots,
    plain_prompt,
    read_problems,
    read_questions,
)
from rlhf_jax.tasks.arithmetic import LEVELS, choice_rows


def questions(*rows):
    return read_questions([Row(fields, f"rows:{number}") for number, fields in enumerate(rows)])


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"answer": 2}, 2),
        ({"answer": "C"}, 2),
        ({"answer": "blue"}, 2),
        ({"label": "2"}, 2),
        ({"answerKey": "1", "choices": {"text": ["red", "green"], "label": ["1", "2"]}}, 0),
        ({"answer": 1, "choices": None, "endings": ["3", "4"]}, 1),
        ({"answer": "4", "choices": ["3", "4"]}, 1),
        ({"answer": "0", "choices": ["3", "4"]}, 0),
    ],
)
def test_answers_in_every_spelling(fields, place):
    (question,) = questions({"question": "What?", "choices": ["red", "green", "blue"], **fields})
    assert question.answer == place
    assert question.subject == "all"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": 3}, "none of the choices"),
        ({"answer": True}, "none of the choices"),
        ({"answer": "1", "choices": ["1", "2"]}, "two of the choices"),
        ({"answer": "B", "choices": ["B", "A"]}, "two of the choices"),
        ({"answer": 0, "choices": ["a", "a"]}, "two choices are the same"),
        ({"answer": 0, "choices": ["a"]}, "two texts or more"),
        ({"answer": 0, "question": " "}, "needs a text"),
        ({}, "no field answer or answerKey or label"),
    ],
)
def test_bad_rows_are_named(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        questions({"question": "What?", "choices": ["red", "green", "blue"], **fields})
    assert str(caught.value).startswith("rows:0: ")


def test_shots_are_of_the_subject_and_never_the_question():
    rows = [
        {
            "question": f"{'What  IS' if copy else 'What is'} {n}?",
            "choices": ["a", "b"],
            "answer": 0,
            "subject": s,
        }
        for copy in (False, True)
        for s in ("sums", "words")
        for n in range(4)
    ]
    pool = questions(*rows)
    for item in pool:
        shots = choose_shots(pool, item, 6)
        assert {shot.subject for shot in shots} == {item.subject}
        asked = {" ".join(shot.text.lower().split()) for shot in shots}
        assert " ".join(item.text.lower().split()) not in asked
        assert shots == choose_shots(pool, item, 6)
    stranger = questions(rows[0] | {"subject": "maps"})[0]
    assert len(choose_shots(pool, stranger, 3)) == 3  # nobody knows the subject: anything but the question
    assert choose_shots([], stranger, 0) == []
    filled = [shot.subject == pool[0].subject for shot in choose_shots(pool, pool[0], 8)]
    assert filled == [True] * 6 + [False] * 2
    two = [shot for shot in pool if shot.text.endswith("0?") and shot.subject == "sums"]
    with pytest.raises(UserError, match="1 shots are wanted and there are 0 beside the question"):
        choose_shots(two, two[0], 1)


def test_prompts_of_every_form():
    shot, item = questions(
        {"question": "1+1=?", "choices": ["2", "3"], "answer": 0},
        {"question": "1+2=?", "choices": ["2", "3"], "answer": 1},
    )
    turns, asked, answers = choice_turns(item, [shot], "letters")
    assert answers == ["A", "B"]
    assert plain_prompt(turns, asked, opening="Choose.\n\n") == (
        "Choose.\n\n1+1=?\nA. 2\nB. 3\nAnswer: A\n\n1+2=?\nA. 2\nB. 3\nAnswer:"
    )
    turns, asked, answers = choice_turns(item, [shot], "answers")
    assert answers == ["2", "3"]
    assert plain_prompt(turns, asked, question="Question: ") == (
        "Question: 1+1=?\nAnswer: 2\n\nQuestion: 1+2=?\nAnswer:"
    )
    assert plain_prompt(*choice_turns(item, [], "continuation")[:2], answer="") == "1+2=?"
    assert [message["role"] for message in chat_prompt(turns, asked)] == ["user", "assistant", "user"]
    assert chat_prompt(turns, asked)[1]["content"] == "2"


def test_problems_keep_what_the_verifier_needs():
    rows = [{"question": "1+1=?", "answer": "It is #### 2"}, {"prompt": "a", "answer": 3, "solution": "so 3"}]
    found = read_problems([Row(row, "rows") for row in rows])
    assert [problem.solution for problem in found] == ["It is #### 2", "so 3"]
    assert found[1].fields["answer"] == 3
    with pytest.raises(UserError, match="no field answer"):
        read_problems([Row({"question": "1+1=?"}, "rows:7")])


def test_the_embedded_task_as_multiple_choice():
    rows = choice_rows(LEVELS[1], "heldout", 40, 0)
    found = questions(*rows)
    assert {question.answer for question in found} == {0, 1, 2, 3}
    for question in found:
        total = sum(map(int, question.text.removesuffix("=?").split("+")))
        ends = [choice.rpartition("#### ")[2] == str(total) for choice in question.choices]
        assert ends.index(True) == question.answer
        assert ends.count(True) == 1
    assert rows == choice_rows(LEVELS[1], "heldout", 40, 0)
    assert rows != choice_rows(LEVELS[1], "heldout", 40, 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"solution": ["so 2", "or 2"]}, "field 'solution' is a list; give text or a number"),
        ({"solution": {"text": "so 2"}}, "field 'solution' is an object"),
        ({"subject": ["algebra"]}, "field 'subject' is a list"),
    ],
)
def test_a_field_of_another_type_is_not_taken_for_what_python_prints_of_it(fields, said):
    with pytest.raises(UserError, match=rf"^rows:7: {said}"):
        read_problems([Row({"question": "1+1=?", "answer": 2, **fields}, "rows:7")])


def test_labels_of_choices_are_a_list():
    row = Row({"question": "?", "choices": {"text": ["3", "4"], "label": 5}, "answer": "3"}, "rows:8")
    with pytest.raises(UserError, match=r"^rows:8: the labels of the choices are no list"):
        read_questions([row])


def test_an_answer_that_only_a_verifier_can_read_is_no_worked_one():
    (found,) = read_problems([Row({"question": "1+1=?", "answer": ["2", "two"]}, "rows:7")])
    assert (found.solution, found.fields["answer"]) == ("", ["2", "two"])
