"""Benchmark items and their prompts: multiple choice, and open questions. Text only.

Multiple choice comes in three forms: `letters` lists the choices and asks for a letter (MMLU, Hendrycks et
al. 2021), `answers` asks the question and compares whole answers (ARC), `continuation` compares how a text
goes on (HellaSwag). Shots are worked examples before the question; none is ever the question itself.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import Row, is_reference, reference_of

Form = Literal["letters", "answers", "continuation"]
NO_SUBJECT = "all"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with choices.

    Attributes:
      text: the question.
      choices: what may be answered.
      answer: place of the right choice, from 0.
      subject: what it is about; `NO_SUBJECT` where the row does not say.
      where: the row it came from.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    where: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question that is answered in words.

    Attributes:
      text: the question.
      solution: a right answer in words, for shots; empty where the row has none.
      fields: the whole row, for the verifier.
      subject: what it is about; `NO_SUBJECT` where the row does not say.
      where: the row it came from.
    """

    text: str
    solution: str
    fields: dict[str, Any]
    subject: str
    where: str


@runtime_checkable
class Item(Protocol):
    """Benchmark item by which few-shot examples are chosen."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def subject(self) -> str: ...  # noqa: D102


Shot = TypeVar("Shot", bound=Item)


# Rows ----------------------------------------------------------------------------------------------


def read_questions(rows: Sequence[Row]) -> list[Question]:
    """Questions of rows with `question`, `choices` and `answer`, as MMLU, ARC and HellaSwag have them.

    The question may be called `ctx`, the choices `endings`, the answer `answerKey` or `label`. Choices are
    a list of texts, or `{"text": [...], "label": [...]}`. The answer is a place from 0, a letter, a label or
    the text of a choice. A `subject` is kept.

    Raises:
      UserError: a field is missing, choices are fewer than two or alike, or the answer is none of them, or
        could be read in two ways.
    """
    return [_question(row) for row in rows]


def read_problems(rows: Sequence[Row]) -> list[Problem]:
    """Problems of rows with `question` or `prompt`, and `answer`, as GSM8K has them.

    For shots, what a `solution` or, without one, the `answer` says is the worked answer.

    Raises:
      UserError: a field is missing, or of another type.
    """
    found = []
    for row in rows:
        text, answer = _field(row, ("question", "prompt")), _field(row, ("answer",))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row.where}: the question is not a text; write one")
        solution = reference_of(row, "solution")
        if solution in (None, ""):
            # What else a verifier may compare with is no worked answer.
            solution = answer if is_reference(answer) else ""
        found.append(Problem(text, str(solution), row.fields, _subject(row), row.where))
    return found


def _question(row: Row) -> Question:
    text: Any = _field(row, ("question", "ctx"))
    given: Any = _field(row, ("choices", "endings"))
    labels: Any = ()
    if isinstance(given, dict):
        held: Mapping[str, Any] = given
        given, labels = held.get("text", []), held.get("label", [])
        if not isinstance(labels, list):
            raise UserError(f"{row.where}: the labels of the choices are no list; give one to each choice")
    several = isinstance(given, list) and len(given) > 1 and all(isinstance(each, str) for each in given)
    if not isinstance(text, str) or not several or not all(each.strip() for each in [text, *given]):
        raise UserError(f"{row.where}: a question needs a text and two texts or more to choose from")
    if len(set(given)) < len(given):
        raise UserError(f"{row.where}: two choices are the same; make them differ, or remove the row")
    answer = _place(_field(row, ("answer", "answerKey", "label")), given, labels, row.where)
    return Question(text, tuple(given), answer, _subject(row), row.where)


def _place(answer: Any, choices: Sequence[str], labels: Sequence[Any], where: str) -> int:
    """The place that an answer means.

    Raises:
      UserError: it means none, or more than one.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        readings = {answer}
    elif answer in labels:
        readings = {list(labels).index(answer)}
    else:
        readings = {place for place, choice in enumerate(choices) if choice == answer}
        if isinstance(answer, str) and len(answer) == 1 and answer in string.ascii_uppercase:
            readings.add(string.ascii_uppercase.index(answer))
        elif isinstance(answer, str) and answer.isdecimal() and answer.isascii():
            readings.add(int(answer))
    inside = [place for place in readings if 0 <= place < len(choices)]
    if len(inside) != 1:
        problem = "none of the choices" if not inside else "two of the choices, as a place and as a text"
        raise UserError(f"{where}: the answer {answer!r:.40} is {problem}; give its place from 0")
    return inside[0]


def _field(row: Row, names: Sequence[str]) -> Any:
    for name in names:
        if row.fields.get(name) is not None:
            return row.fields[name]
    known = ", ".join(sorted(row.fields)) or "none"
    raise UserError(f"{row.where}: no field {' or '.join(names)} (the row has: {known}); add it")


def _subject(row: Row) -> str:
    return str(reference_of(row, "subject") or NO_SUBJECT)


# Shots ---------------------------------------------------------------------------------------------


def choose_shots(pool: Sequence[Shot], item: Item, count: int) -> list[Shot]:
    """The first `count` examples of the pool, those of the item's subject first, and never the item itself.

    An example whose question is that of the item, but for case and space, is passed over: the pool may be the
    benchmark's own file. Other subjects fill up where the pool has too few of the item's.

    Raises:
      UserError: too few are left.
    """
    if not count:
        return []
    asked = _normalized(item.text)
    others = [shot for shot in pool if _normalized(shot.text) != asked]
    if len(others) < count:
        raise UserError(
            f"{count} shots are wanted and there are {len(others)} beside the question: lower --shots, or "
            "give more examples"
        )
    return sorted(others, key=lambda shot: shot.subject != item.subject)[:count]


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


# Prompts -------------------------------------------------------------------------------------------

Turns = list[tuple[str, str]]
"""(what is asked, what is answered) of each shot."""


def choice_turns(question: Question, shots: Sequence[Question], form: Form) -> tuple[Turns, str, list[str]]:
    """(shots, what is asked, what each choice would answer) in a form."""

    def asked(each: Question) -> str:
        if form != "letters":
            return each.text
        lines = [f"{string.ascii_uppercase[place]}. {choice}" for place, choice in enumerate(each.choices)]
        return "\n".join([each.text, *lines])

    def answers(each: Question) -> list[str]:
        return list(string.ascii_uppercase[: len(each.choices)] if form == "letters" else each.choices)

    if form == "letters" and len(question.choices) > len(string.ascii_uppercase):
        raise UserError(f"{question.where}: more choices than letters; give --form answers")
    return [(asked(shot), answers(shot)[shot.answer]) for shot in shots], asked(question), answers(question)


def plain_prompt(
    turns: Turns, text: str, *, opening: str = "", question: str = "", answer: str = "\nAnswer:"
) -> str:
    """A prompt for a model without chat: shots and question one after the other, an empty line between them.

    Args:
      opening: what stands before all of it.
      question: what stands before each question.
      answer: what stands between a question and its answer, which follows after a space.
    """
    parts = [f"{question}{asked}{answer} {said}" for asked, said in turns]
    return opening + "\n\n".join([*parts, f"{question}{text}{answer}"])


def chat_prompt(turns: Turns, text: str) -> list[dict[str, str]]:
    """The same as a conversation: shots are turns of their own."""
    said = [(role, words) for turn in turns for role, words in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": words} for role, words in [*said, ("user", text)]]
