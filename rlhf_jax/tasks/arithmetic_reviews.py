"""The embedded task with reviews: a small decoder learns to answer, to criticise, to revise and to judge.

    user        5+4+3=?
    assistant   5+4=9
                9+3=2
                #### 2
    user        Which line is wrong first?
    assistant   9+3=2 is wrong
    user        Write it again.
    assistant   5+4=9
                9+3=12
                #### 12

The answers are those of the task's careless demonstrators; critics and judges are right. Who imitates all of
it answers carelessly and knows better when asked, which is what AI feedback lives on. Requests are one token
each, and so are numbers, so that a conversation stays short and a sum is looked up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.constitution import Principle
from rlhf_jax.tasks.arithmetic import (
    LEVELS,
    Level,
    Problem,
    Row,
    Solution,
    Split,
    arithmetic_tokenizer,
    demonstrator_slips,
    draw_problems,
    solution,
    wrong_solution,
)

REVIEW_LEVEL = LEVELS[0]
"""A little smaller than level 1 of the task, since a comparison holds two solutions."""

ALL_RIGHT = "all is right"
WRONG = " is wrong"
CONSTITUTION = (
    Principle(
        name="lines",
        critique="Which line is wrong first?",
        revision="Write it again.",
        comparison="Which is better?\n{prompt}\nA\n{first}\nB\n{second}",
        choices=("A", "B"),
        rating="How many lines are right?\n{prompt}\n{answer}",
        ratings=("0", "1", "2", "3", "4"),
    ),
)
"""What the tiny critics and judges are asked; the ratings are for `REVIEW_LEVEL`, answers of four lines."""

PROPOSITIONS = {
    "steps": "Is every step right?\n{prompt}\n{answer}",
    "follows": "Is the answer what the steps reach?\n{prompt}\n{answer}",
}
"""Questions that are answered by `yes` or `no`, by the name of the proposition."""

_WORDS = (
    *(CONSTITUTION[0].critique, CONSTITUTION[0].revision, ALL_RIGHT, WRONG, "yes", "no"),
    *(text.split("\n")[0] for text in (CONSTITUTION[0].comparison, CONSTITUTION[0].rating)),
    *(text.split("\n")[0] for text in PROPOSITIONS.values()),
    *map(str, range(10, REVIEW_LEVEL.operands * REVIEW_LEVEL.high + 1)),
)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Number of rows of each skill.

    Attributes:
      reviews: conversations of an answer, its critique and its revision.
      comparisons: which of two answers is better.
      ratings: how many lines of an answer are right.
      propositions: whether something is true of an answer.
    """

    reviews: int
    comparisons: int
    ratings: int
    propositions: int


def review_tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """The embedded task's characters, and requests, verdicts and numbers as one token each.

    Args:
      words: more of what is one token each.
    """
    return arithmetic_tokenizer((*_WORDS, *words))


def skill_rows(
    level: Level,
    split: Split,
    mixture: Mixture,
    seed: int,
    *,
    slip_rate: float,
    late_slip_rate: float | None = None,
) -> list[Row]:
    """Rows for supervised fine-tuning in all skills: `messages`, and what they train as `skill`, shuffled.

    Verdicts are followed by their reason, the first wrong line: who learns to give it learns to see it.

    Args:
      slip_rate: how careless those are who answer, see `arithmetic.demonstration_rows`.
      late_slip_rate: the same in the second half of the steps.
    """
    rng = np.random.default_rng([seed, *b"review"])
    rates: dict[str, Any] = {"slip_rate": slip_rate, "late_slip_rate": late_slip_rate}

    def problems(count: int):
        return draw_problems(rng, level, split, count) if count else ()

    def careless(drawn: Problem) -> Solution:
        return solution(drawn, demonstrator_slips(rng, level, **rates))

    def any_answer(drawn: Problem) -> Solution:
        """Careless, or with or without every other mistake."""
        return careless(drawn) if rng.random() < 0.5 else graded_answer(drawn, rng)

    rows = []
    for drawn in problems(mixture.reviews):
        answer = careless(drawn)
        turns = drawn.text, answer.text, critique(answer), solution(drawn).text
        rows.append(review_row(CONSTITUTION[0], *turns))
    for drawn in problems(mixture.comparisons):
        wrong = wrong_solution(drawn, rng)
        sides = [solution(drawn).text, wrong.text]
        first = int(rng.integers(2))
        question = CONSTITUTION[0].compare(drawn.text, sides[first], sides[1 - first])
        verdict = f"{CONSTITUTION[0].choices[first]}\n{critique(wrong)}"
        rows.append(verdict_row("comparison", question, verdict))
    for drawn in problems(mixture.ratings):
        answer = any_answer(drawn)
        question = CONSTITUTION[0].rate(drawn.text, answer.text)
        rows.append(verdict_row("rating", question, f"{sum(right_lines(answer))}\n{critique(answer)}"))
    for number, drawn in enumerate(problems(mixture.propositions)):
        name, answer = list(PROPOSITIONS)[number % len(PROPOSITIONS)], graded_answer(drawn, rng)
        question = PROPOSITIONS[name].format(prompt=drawn.text, answer=answer.text)
        verdict = "yes" if is_true(name, answer) else "no"
        rows.append(verdict_row(name, question, f"{verdict}\n{critique(answer)}"))
    return [rows[place] for place in rng.permutation(len(rows))]


def ranked_rows(level: Level, split: Split, count: int, seed: int) -> list[Row]:
    """Rows to fit a rule-based reward to: `prompt`, `completions`, and their `ranks`, 0 the best.

    A right solution, right steps with another last line, a step that is off, and both mistakes at once.
    """
    rng, rows = np.random.default_rng([seed, *b"ranked"]), []
    for drawn in draw_problems(rng, level, split, count):
        right, wrong = solution(drawn), _with_wrong_step(drawn, rng)
        other = [dataclasses.replace(side, answer=side.answer + 10) for side in (right, wrong)]
        texts = [side.text for side in (right, other[0], wrong, other[1])]
        rows.append({"prompt": drawn.text, "completions": texts, "ranks": [0, 1, 1, 2]})
    return rows


def graded_answer(drawn: Problem, rng: np.random.Generator) -> Solution:
    """An answer of which each of `PROPOSITIONS` is true half of the time, whatever the other is.

    The mistakes of `wrong_solution` leave the last line what the steps reach seven times in eight: a grader
    who is shown no others learns to say yes.
    """
    answer = _with_wrong_step(drawn, rng) if rng.random() < 0.5 else solution(drawn)
    if rng.random() < 0.5:
        return answer
    off = int(rng.choice([-10, 10, -1, 1]))
    stated = answer.answer + off if answer.answer + off >= 0 else answer.answer - off
    return dataclasses.replace(answer, answer=stated)


def _with_wrong_step(drawn: Problem, rng: np.random.Generator) -> Solution:
    wrong = wrong_solution(drawn, rng)
    while all(wrong.step_labels):
        wrong = wrong_solution(drawn, rng)
    return wrong


# What is true of an answer ---------------------------------------------------------------------------


def right_lines(answer: Solution) -> list[bool]:
    """For each line whether it is right: a step given its own left-hand side, the last given the steps."""
    return [*answer.step_labels, follows(answer)]


def follows(answer: Solution) -> bool:
    """True if the last line states what the steps reach."""
    return int(answer.steps[-1].rpartition("=")[2]) == answer.answer


def is_true(name: str, answer: Solution) -> bool:
    """The truth of one of `PROPOSITIONS`."""
    return all(answer.step_labels) if name == "steps" else follows(answer)


def critique(answer: Solution) -> str:
    """Names the first line that is wrong."""
    lines = zip(answer.text.split("\n"), right_lines(answer), strict=True)
    wrong = next((line for line, right in lines if not right), None)
    return ALL_RIGHT if wrong is None else wrong + WRONG


def review_row(principle: Principle, prompt: str, answer: str, critique: str, revision: str) -> Row:
    """Conversation of an answer, its critique and its revision by a principle."""
    turns = (prompt, answer, principle.critique, critique, principle.revision, revision)
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(turns)]
    return {"messages": messages, "skill": "review"}


def verdict_row(skill: str, question: str, verdict: str) -> Row:
    """A question to a judge or a grader, and the answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": verdict}]
    return {"messages": messages, "skill": skill}
