"""Ranges of numbers, which stand once, with the field that holds the number: `rate: Share = 0.5`.

A range is metadata of an annotated type, so that command lines, YAML files and Python are checked by one
function. A number without a range of its own must still be one that float32 or int32 holds.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from rlhf_jax.core.errors import UserError

MOST_FLOAT, MOST_INT = 3e38, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an option may have.

    Attributes:
      low: the least; None for no bound but the type's.
      high: the greatest; None as for `low`.
      above: `low` itself is not among them.
      below: `high` itself is not among them.
      or_zero: 0 is, too.
      infinite: infinity is, too.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    or_zero: bool = False
    infinite: bool = False

    def __contains__(self, number: float) -> bool:
        """True if an option may have this number."""
        if (self.or_zero and number == 0) or (self.infinite and number == math.inf):
            return True
        most = MOST_INT if isinstance(number, int) else MOST_FLOAT
        low = -most if self.low is None else self.low
        high = most if self.high is None else self.high
        return low <= number <= high and not (
            (self.above and number == low) or (self.below and number == high)
        )

    def __str__(self) -> str:
        """As the end of a sentence."""
        zero, infinity = "0, or " if self.or_zero else "", ", or inf" if self.infinite else ""
        low, high = (None if x is None else f"{x:,}" for x in (self.low, self.high))
        if low is None:
            inner = "a number" if high is None else f"at most {high}"
        elif high is None:
            inner = f"a number above {low}" if self.above else f"{low} or more"
        else:
            first = "above" if self.above else "from"
            last = "to below" if self.below else "to"
            inner = f"a number {first} {low} {last} {high}"
        return zero + inner + infinity


_ANY = Range()

Finite = Annotated[float, Range()]
"""Any number."""
Share = Annotated[float, Range(0, 1)]
"""A probability, a share, a discount."""
Weight = Annotated[float, Range(0)]
"""0 or more."""
Positive = Annotated[float, Range(0, above=True)]
"""Above 0."""
PositiveOrInf = Annotated[float, Range(0, above=True, infinite=True)]
"""Above 0; infinity for no bound."""
ShareInside = Annotated[float, Range(0, 1, above=True, below=True)]
"""Above 0 and below 1: a part beside which there is another."""
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
"""0 to below 1: the decay of a running mean, what is left out."""
LearningRate = Annotated[float, Range(0, 1000)]
"""In front of an update, or of a gradient."""
Temperature = Annotated[float, Range(0.01, 100)]
"""Of sampling: logits divided by less are not finite in float32, and by more all alike."""
GreedyTemperature = Annotated[float, Range(0.01, 100, or_zero=True)]
"""The same; 0 for the most likely."""
Count = Annotated[int, Range(0)]
"""0 or more."""
PositiveInt = Annotated[int, Range(1)]
"""1 or more."""
Length = Annotated[int, Range(1, 2**24)]
"""Of a row, in tokens."""
LengthOrZero = Annotated[int, Range(0, 2**24)]
"""The same; 0 for the usual one."""
Width = Annotated[int, Range(1, 2**20)]
"""Of a layer, or how many of them, heads or experts there are."""
WidthOrZero = Annotated[int, Range(0, 2**20)]
"""The same; 0 for none, or the usual one."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""Of random draws."""


def check_ranges(options: Any, name_of: Callable[[tuple[str, ...]], str] = ".".join) -> None:
    """Looks at every number in a dataclass, and in those within it.

    Args:
      name_of: what messages call a field, by its path.

    Raises:
      UserError: one is not in its range.
    """
    for path, value, allowed in _numbers(options, ()):
        if value in allowed:
            continue
        if math.isnan(value):
            raise UserError(f"{name_of(path)} is not a number: give {allowed}")
        raise UserError(f"{name_of(path)} {value:.12g} is out of range: give {allowed}")


def _numbers(options: Any, path: tuple[str, ...]) -> typing.Iterator[tuple[tuple[str, ...], float, Range]]:
    for name, allowed in ranges_of(type(options)).items():
        value, place = getattr(options, name), (*path, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _numbers(value, place)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield place, number, allowed or _ANY


@functools.cache
def ranges_of(kind: type) -> dict[str, Range | None]:
    """The range of each field of a dataclass; None where it has none."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: range_of(hints[field.name]) for field in dataclasses.fields(kind)}


def range_of(hint: Any) -> Range | None:
    """The range that an annotation has anywhere: by itself, beside None, or for each of a tuple."""
    if typing.get_origin(hint) is Annotated:
        inner, *metadata = typing.get_args(hint)
        return next((item for item in metadata if isinstance(item, Range)), None) or range_of(inner)
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list):
        return next((found for part in typing.get_args(hint) if (found := range_of(part))), None)
    return None
