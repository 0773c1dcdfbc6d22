"""Units behind a number: which word is one, and how many of the basic unit it is."""

import re
from fractions import Fraction
from typing import TypeAlias

Unit: TypeAlias = tuple[Fraction, tuple[tuple[str, int], ...]]
"""How many basic units one is, and the powers of the dimensions."""

_TABLE = {
    "length in m": "mm 0.001, millimeter 0.001, cm 0.01, centimeter 0.01, m 1, meter 1, metre 1, km 1000, "
    "kilometer 1000, in 0.0254, inch 0.0254, inche 0.0254, ft 0.3048, foot 0.3048, feet 0.3048, yd 0.9144, "
    "yard 0.9144, mi 1609.344, mile 1609.344",
    "mass in g": "mg 0.001, g 1, gram 1, kg 1000, kilogram 1000, lb 453.59237, pound 453.59237, "
    "oz 28.349523125, ounce 28.349523125",
    "time in s": "s 1, sec 1, second 1, min 60, minute 60, h 3600, hr 3600, hour 3600, "
    "day 86400, week 604800",
    "volume in l": "ml 0.001, l 1, liter 1, litre 1",
    "money in dollars": "dollar 1, usd 1, cent 0.01",
    "angle in degrees": "degree 1, deg 1",
}
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, entries in _TABLE.items()
    for name, size in (entry.split() for entry in entries.split(", "))
}

_WINDOW = 48
_WORDS = re.compile(r"(?:[A-Za-z]{1,20}(?:\^?[23])?(?: ?/ ?| |\.$|$)){1,6}$")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """(value, unit) of such as `5 cm^2`, `60 miles per hour` or `12 apples`.

    A unit is the words at the end, of three letters and more or in the table, behind a space or (if in the
    table and of two letters) a digit or bracket. Words that are not in the table are taken off and are None.
    """
    start = max(0, len(text) - _WINDOW)
    for place in range(start + 1, len(text)):
        before, letter = text[place - 1], text[place]
        if not letter.isalpha() or before.isalpha() or before == "\\" or not _WORDS.match(text, place):
            continue
        first = re.match("[A-Za-z]+", text[place:])
        assert first is not None
        known = _known(first[0])
        spaced = before.isspace() and (known is not None or len(first[0]) >= 3)
        joined = (before.isdigit() or before in ")}") and known is not None and len(first[0]) >= 2
        value = text[:place].rstrip()
        if (spaced or joined) and first[0] not in ("pi", "infinity") and value and value[-1] not in "+-*/^=,":
            return value, _unit(text[place:])
    return text, None


def _unit(text: str) -> Unit | None:
    """The unit that the words are; None where one of them is not in the table."""
    size, powers = Fraction(1), dict[str, int]()
    for side, part in enumerate(re.split(r" ?/ ?| per ", text.rstrip(". "))):
        sign = -1 if side else 1
        for word in part.split():
            if word in ("square", "sq", "cubic"):
                sign *= 3 if word == "cubic" else 2
                continue
            name, _, power = word.partition("^")
            if not power and name[-1:] in ("2", "3"):
                name, power = name[:-1], name[-1]
            known = _known(name)
            if known is None:
                return None
            exponent = sign * int(power or 1)
            sign = -1 if side else 1
            size *= known[1] ** exponent
            powers[known[0]] = powers.get(known[0], 0) + exponent
    return size, tuple(sorted(powers.items()))


def _known(name: str) -> tuple[str, Fraction] | None:
    lower = name.lower() if len(name) > 2 else name
    if len(lower) > 3 and lower not in _UNITS:
        lower = lower.removesuffix("s")
    return _UNITS.get(lower)
