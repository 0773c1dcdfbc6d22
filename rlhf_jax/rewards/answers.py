"""Equality of final answers: numbers, expressions, lists of them, or words.

numbers      exactly: 0.5 = 1/2 = \\frac{1}{2} = 50% = 5e-1; 0.333 is not 1/3
expressions  as functions of their letters: (x+1)^2 = x^2+2x+1, \\sqrt{12} = 2\\sqrt{3}
equations    x = 5 is 5; a chain of numbers (2+3 = 5) is its last, if all are equal
percent      a percent sign on one side alone is hundredths or nothing: 50% is 0.5 and 50
units        on both sides and known: converted (500 cm = 5 m); otherwise taken off ($5 = 5 apples)
lists        (1, 2) and [0, 1) in order, with their brackets; {1, 2} and bare 1, 2 in any order
words        without case, spaces at the ends and \\text{}; only where a side is no mathematics
"""

import dataclasses
import itertools
import re
from fractions import Fraction
from typing import TypeAlias

from rlhf_jax.rewards.algebra import TooLarge, Unreadable, Value, number
from rlhf_jax.rewards.expressions import evaluate, plain
from rlhf_jax.rewards.units import Unit, split_unit

MAX_ITEMS = 32
MAX_DEPTH = 8
"""Of lists in each other."""

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|\N{DEGREE SIGN}")
_NAMED = re.compile(r"^(?:[A-Za-z]|[a-zA-Z]\([a-zA-Z]\))\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^\s=])")
_WRAPPERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")]
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_WORD_BETWEEN = re.compile(r"\s+(?:or|and)\s+")
_SPELLINGS = [
    (r"\geq", r"\ge"),
    (r"\leq", r"\le"),
    (r"\neq", r"\ne"),
    ("\N{MINUS SIGN}", "-"),
    (r"\cdot", "*"),
]
MAX_SPELLED = 200
"""Characters of a text whose spelling is compared before it is read."""
_DOLLAR: Unit = (Fraction(1), (("money in dollars", 1),))


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number or expression, with what stood around it."""

    value: Value
    is_percent: bool
    unit: Unit | None


@dataclasses.dataclass(frozen=True)
class Items:
    """Answers in brackets, or a bare list of them (brackets "")."""

    brackets: str
    items: tuple["Answer", ...]


Answer: TypeAlias = Quantity | Items | str


def answers_equal(answer: str, reference: str) -> bool:
    """True if both texts are the same answer, by the rules above.

    Raises:
      TooLarge: one of them is beyond the limits on size.
    """
    if max(len(answer), len(reference)) <= MAX_SPELLED and spelled(answer) == spelled(reference):
        return True
    return _equal(read_answer(answer), read_answer(reference))


def spelled(text: str) -> str:
    """A text without what only its typesetting differs by: spaces, sizes of brackets, names of signs."""
    text = _without_wrapping(text.strip())
    text = re.sub(r"\\(?:left|right|displaystyle|limits|[,;:! ])", " ", text)
    text = _WORD_BETWEEN.sub(", ", text)
    for long, short in _SPELLINGS:
        text = text.replace(long, short)
    text = re.sub(r"\\([dt])frac", r"\\frac", text)
    text = re.sub(r"(?<![A-Za-z])([A-Za-z])\^\{1/2\}", r"\\sqrt{\1}", text)
    text = re.sub(r"(\\(?:ln|log|exp|sin|cos|tan))\s*\(([A-Za-z0-9])\)", r"\1 \2", text)
    text = re.sub(r"(\\sqrt|\^|_)\s*\{?([A-Za-z0-9])\}?", r"\1{\2}", text)
    text = re.sub(r"(?<![0-9])([0-9]{1,3})((?: [0-9]{3})+)(?![0-9])", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)  # 1 2 is not 12
    return ",".join(sorted(text.split(","))) if _is_bare_list(text) else text


def _is_bare_list(text: str) -> bool:
    return "," in text and not re.search(r"[()\[\]{}]", text)


def read_answer(text: str, depth: int = 0) -> Answer:
    """Parsed answer of a text: a quantity, a list, or words where it is no mathematics.

    Args:
      depth: lists that it stands in.

    Raises:
      TooLarge: beyond the limits on size.
    """
    if depth > MAX_DEPTH:
        raise TooLarge(f"more than {MAX_DEPTH} lists in each other")
    text = text.strip()
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("*")
    text = _without_wrapping(plain(text))
    try:
        return _read(_NAMED.sub("", text), depth)
    except TooLarge:
        raise
    except Unreadable:
        return " ".join(text.casefold().split())


def _without_wrapping(text: str) -> str:
    """Takes off what says nothing: dollars of LaTeX, `**`, \\text{}, a full stop."""
    text = _TEXT.sub(r" \1 ", text)
    text = _DEGREES.sub(" degree ", text).replace("{,}", ",").strip()
    for _ in range(4):
        text = text.strip().rstrip(".;,:").strip()
        for opening, closing in _WRAPPERS:
            inside = text[len(opening) : len(text) - len(closing)]
            is_wrapped = len(text) > len(opening + closing) and text.startswith(opening)
            if is_wrapped and text.endswith(closing) and opening not in inside:
                text = inside
                break
        else:
            break
    return re.sub(r"\s*\^\s*", "^", text)


# Reading -------------------------------------------------------------------------------------------


def _read(text: str, depth: int) -> Answer:
    brackets, inside = "", text
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets, inside = text[0] + text[-1], text[1:-1]
    elif text.startswith(r"\{") and text.endswith(r"\}"):
        brackets, inside = "{}", text[2:-2]
    elif text.startswith("{") and text.endswith("}") and "," in text:
        brackets, inside = "{}", text[1:-1]
    parts = _split(inside)
    if (brackets and len(parts) > 1) or brackets == "{}":
        return Items(brackets, tuple(read_answer(part, depth + 1) for part in parts))
    whole = _split(text)
    if len(whole) > 1:
        return Items("", tuple(read_answer(part, depth + 1) for part in whole))
    sides = text.split("=")
    if len(sides) > 1:
        return _last_of_chain(sides)
    return _quantity(text)


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no bracket and group no thousands."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        grouped = _GROUPED.match(text, place) if not text[place - 1 : place].isdigit() else None
        if grouped:
            place = grouped.end()
            continue
        letter = text[place]
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
        place += 1
    parts.append(text[start:])
    if len(parts) > MAX_ITEMS:
        raise TooLarge(f"more than {MAX_ITEMS} parts")
    return parts


def _last_of_chain(sides: list[str]) -> Quantity:
    if len(sides) > MAX_ITEMS:
        raise TooLarge(f"more than {MAX_ITEMS} sides")
    quantities = [_quantity(side) for side in sides]
    if not all(_equal(left, right) for left, right in itertools.pairwise(quantities)):
        raise Unreadable("an equation that is not always true")
    return quantities[-1]


def _quantity(text: str) -> Quantity:
    text, unit = text.strip(), None
    sign = "-" if text.startswith("-") else ""
    amount = text.removeprefix("-").strip().removeprefix("\\")
    if amount.startswith(("$", "\N{EURO SIGN}", "\N{POUND SIGN}")):
        unit = _DOLLAR if amount[0] == "$" else None
        text = sign + amount[1:]
    text, is_percent = _without_percent(text)
    if not is_percent:
        text, written = split_unit(text)
        unit = written or unit
    return Quantity(evaluate(text), is_percent, unit)


def _without_percent(text: str) -> tuple[str, bool]:
    for ending in ("%", " percent"):
        if text.endswith(ending):
            return text.removesuffix(ending), True
    return text, False


# Comparing -----------------------------------------------------------------------------------------


def _equal(left: Answer, right: Answer) -> bool:
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        return _quantities_equal(left, right)
    if isinstance(left, Items) and isinstance(right, Items):
        return _items_equal(left, right)
    return isinstance(left, str) and left == right


def _quantities_equal(left: Quantity, right: Quantity) -> bool:
    if left.is_percent != right.is_percent:
        percent, other = (left, right) if left.is_percent else (right, left)
        return percent.value.equals(other.value) or (percent.value / number(100)).equals(other.value)
    if left.unit is None or right.unit is None:
        return left.value.equals(right.value)
    if left.unit[1] != right.unit[1]:
        return False
    return (left.value * number(left.unit[0])).equals(right.value * number(right.unit[0]))


def _items_equal(left: Items, right: Items) -> bool:
    in_order = left.brackets not in ("", "{}")
    if left.brackets != right.brackets and (in_order or right.brackets not in ("", "{}")):
        return False
    if len(left.items) != len(right.items):
        return False
    if in_order:
        return all(_equal(a, b) for a, b in zip(left.items, right.items, strict=True))
    rest = list(right.items)
    for item in left.items:
        match = next((place for place, other in enumerate(rest) if _equal(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True
