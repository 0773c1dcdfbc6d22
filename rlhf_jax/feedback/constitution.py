"""Principles: what a critic, a reviser and a judge are asked (Bai et al. 2022, Lee et al. 2023).

A constitution is a text file with a principle a line, or a JSONL file of rows that say all or part of how
each is asked:

    {"principle": "The answer is honest about what it does not know.", "name": "honesty"}
    {"critique": "Which line is wrong first?", "revision": "Write it again.", "comparison": "...", ...}
"""

import dataclasses
import string
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import PathLike
from rlhf_jax.data.sources import read_rows

_PLACES = {"comparison": {"prompt", "first", "second"}, "rating": {"prompt", "answer"}}


@dataclasses.dataclass(frozen=True)
class Principle:
    """Prompts of one principle of a constitution.

    Attributes:
      name: for tables and rows.
      critique: said after an answer, to have it criticised.
      revision: said after the critique, to have the answer written anew.
      comparison: a question with the places {prompt}, {first} and {second}.
      choices: what the model says for the first and for the second.
      rating: a question with the places {prompt} and {answer}.
      ratings: what the model may say to it, the worst first.
    """

    name: str
    critique: str
    revision: str
    comparison: str
    choices: tuple[str, str]
    rating: str
    ratings: tuple[str, ...]

    def compare(self, prompt: str, first: str, second: str) -> str:
        """The question which of two answers is better."""
        return self.comparison.format(prompt=prompt, first=first, second=second)

    def rate(self, prompt: str, answer: str) -> str:
        """The question how good an answer is."""
        return self.rating.format(prompt=prompt, answer=answer)


def principle_of(text: str, name: str = "") -> Principle:
    """A principle in words, asked in plain sentences."""
    quoted = text.strip().replace("{", "{{").replace("}", "}}")
    return Principle(
        name=name or text.strip()[:40],
        critique=f"Say in what your last answer falls short of this principle, if it does: {text.strip()}",
        revision=f"Write your answer again, so that it keeps to the principle: {text.strip()}",
        comparison=f"{quoted}\n\nWhich of two answers keeps better to that?\n\nQuestion: {{prompt}}\n\n"
        "Answer A: {first}\n\nAnswer B: {second}\n\nSay A or B and nothing else.",
        choices=("A", "B"),
        rating=f"{quoted}\n\nHow well does an answer keep to that?\n\nQuestion: {{prompt}}\n\n"
        "Answer: {answer}\n\nSay a number from 1, not at all, to 9, wholly, and nothing else.",
        ratings=tuple("123456789"),
    )


def read_constitution(path: PathLike) -> list[Principle]:
    """Principles of a file: a line each, or JSONL rows (see the module's text).

    Raises:
      UserError: the file cannot be read, has no principle, or one that cannot be asked; with its line.
    """
    path = files.as_path(path)
    if path.suffix in (".jsonl", ".json"):
        return [_checked(_from_row(row.fields, row.where), row.where) for row in read_rows(path)]
    try:
        lines = files.read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): give a text file with a principle a line"
        ) from error
    found = [principle_of(line) for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path}: holds no principle: write one on each line")
    return found


def constitution_rows(principles: Iterable[Principle]) -> list[dict[str, Any]]:
    """Rows that `read_constitution` reads back."""
    return [dataclasses.asdict(principle) for principle in principles]


def _from_row(fields: Mapping[str, Any], where: str) -> Principle:
    names = [field.name for field in dataclasses.fields(Principle)]
    unknown = sorted(fields.keys() - {*names, "principle"})
    if unknown:
        raise UserError(f"{where}: no part of a principle: {unknown[0]}; its parts are {', '.join(names)}")
    given = {name: fields[name] for name in names if name in fields}
    texts = [fields.get("principle", ""), *(given[n] for n in given if n not in ("choices", "ratings"))]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: a part of the principle is not text; write it as text")
    for name, most in (("choices", 2), ("ratings", 100)):
        words = given.get(name, ["A", "B"])
        good = isinstance(words, list | tuple) and all(isinstance(word, str) and word for word in words)
        if not good or not 2 <= len(words) <= most or len(set(words)) < len(words):
            raise UserError(f"{where}: {name} {words!r}: give a list of different words")
        if name in given:
            given[name] = tuple(words)
    if "principle" in fields:
        return dataclasses.replace(principle_of(fields["principle"], fields.get("name", "")), **given)
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(
            f"{where}: neither `principle` nor {missing[0]}: give the principle in words, or all parts"
        )
    return Principle(**given)


def _checked(principle: Principle, where: str) -> Principle:
    for name, places in _PLACES.items():
        check_template(getattr(principle, name), places, f"{where}: {name}")
    return principle


def check_template(template: str, places: set[str], what: str) -> None:
    """Raises: UserError where a template does not have exactly these places."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{what} is no template ({error}): write {{{{ for a brace that is meant") from error
    # Texts are put in as they are: another form would fail at the first of them, or fill the memory.
    found = {name for _, name, *_ in parts}
    if found != places or any(form or conversion for _, _, form, conversion in parts):
        wanted = ", ".join(f"{{{place}}}" for place in sorted(places))
        forms = sorted(f"{{{n}{(c and '!' + c) or ''}{f and ':' + f}}}" for _, n, f, c in parts)
        raise UserError(f"{what} has the places {', '.join(forms) or 'none'}: give it {wanted}")
