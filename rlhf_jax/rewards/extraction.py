"""Answer extraction from completions. Each rule is a function from a text to a text, or None.

Rules look for the answer that the writer ends with: of several marks of one kind the last counts, but
tags must stand exactly once. Time is linear in the text.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

from rlhf_jax.data.examples import ANSWER_MARK

Rule: TypeAlias = Callable[[str], str | None]

# Only this much of a text is searched for a number, and longer numbers are none: both keep hostile
# completions cheap, and no honest answer comes near.
_WINDOW = 4096
_LONGEST_NUMBER = 64

# A sign counts only where it cannot be a minus between two numbers; grouping commas only in threes.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])-)?\$?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?P<decimals>\.[0-9]+)?"
    r"(?:/(?P<denominator>[0-9]+))?"
)
_PHRASE = re.compile(r"\banswer(?: is|:)[ \t:]*([^\n]{1,1000})", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")


def tagged(text: str) -> str | None:
    """Text between `<answer>` and `</answer>`, where each stands exactly once and in this order."""
    before, opening, rest = text.partition("<answer>")
    inside, closing, after = rest.partition("</answer>")
    again = any(mark in part for part in (before, inside, after) for mark in ("<answer>", "</answer>"))
    return inside.strip() if opening and closing and not again else None


def boxed(text: str) -> str | None:
    r"""Text in the last `\boxed{...}`, with its brackets balanced; None where it is not closed."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for found in re.finditer(r"[{}]", text[begin : begin + _WINDOW]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[begin : begin + found.start()].strip()
    return None


def marked(text: str) -> str | None:
    """Text behind the last `####`, up to the end of its line."""
    _, mark, tail = text.rpartition(ANSWER_MARK)
    return tail.split("\n", 1)[0].strip() or None if mark else None


def said(text: str) -> str | None:
    """Text behind the last `answer is` or `answer:`, up to the end of the sentence or line."""
    found = _PHRASE.findall(text[-_WINDOW:])
    return _SENTENCE_END.split(found[-1], maxsplit=1)[0].strip() or None if found else None


def last_number(text: str) -> str | None:
    """The last number in the last 4,096 characters: integer, decimal or fraction such as `3/4`."""
    window = text[-_WINDOW:].replace("\N{MINUS SIGN}", "-")
    numbers = list(_NUMBER.finditer(window))
    # A number that starts where the window does may have lost its first digits.
    if not numbers or (numbers[-1].start() == 0 and len(text) > _WINDOW):
        return None
    return numbers[-1][0] if len(numbers[-1][0]) <= _LONGEST_NUMBER else None


def final_answer(text: str) -> str | None:
    """The first of these rules that finds an answer: tagged, boxed, marked, said, last number."""
    for rule in (tagged, boxed, marked, said, last_number):
        answer = rule(text)
        if answer is not None:
            return answer
    return None


def reference_answer(reference: str | int | float) -> str | None:
    """The answer that a data row gives: as marked by tag, box or `####`, else the text as it stands.

    A text of several lines without a mark is a worked solution: the last number of it.
    """
    text = str(reference).strip()
    for rule in (tagged, boxed, marked):
        answer = rule(text)
        if answer is not None:
            return answer
    return (last_number(text) if "\n" in text else text) or None


def final_number(text: str) -> Fraction | None:
    """The number a worked solution ends with: the first behind the last `####`, without one the last of all.

    Reads integers, decimals, fractions such as `3/4`, grouping commas and `$`. Only the last 4,096
    characters of a text without `####` are searched, and a number of more than 64 characters is none.
    """
    _, mark, tail = text.rpartition(ANSWER_MARK)
    if mark:
        found = _NUMBER.search(tail[:_WINDOW].replace("\N{MINUS SIGN}", "-"))
        return None if found is None else _fraction(found)
    number = last_number(text)
    if number is None:
        return None
    found = _NUMBER.match(number)
    assert found is not None
    return _fraction(found)


def _fraction(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _LONGEST_NUMBER:
        return None
    number = Fraction((found["whole"].replace(",", "") or "0") + (found["decimals"] or ""))
    denominator = int(found["denominator"] or 1)
    if denominator == 0:
        return None
    return (-number if found["sign"] else number) / denominator
