"""Exact values of elementary algebra: quotients of polynomials with square roots, under limits.

A value is numerator / denominator, each a sum of terms `c * sqrt(r) * x^i * y^j ...` with a fraction `c`,
a square-free whole number `r`, and positive powers. Products of such terms are such terms again, and
different ones are linearly independent, so that two values are equal just when

    a.numerator * b.denominator - b.numerator * a.denominator

has no terms. Nothing is rounded. Whatever grows beyond the limits below raises `TooLarge`, which
bounds time and memory for any input.
"""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TypeAlias

MAX_BITS = 2048
"""Of a numerator or denominator of a coefficient."""
MAX_TERMS = 64
"""Of a polynomial."""
MAX_DEGREE = 64
"""Of a variable."""
MAX_WORK = 5000
"""Products of two terms in the making of a value."""
MAX_RADICAND = 10**8
"""Of square roots that are not whole; larger perfect powers have roots all the same."""

Monomial: TypeAlias = tuple[int, tuple[tuple[str, int], ...]]
Polynomial: TypeAlias = dict[Monomial, Fraction]

_UNIT: Monomial = (1, ())


class Unreadable(ValueError):
    """Not mathematics that can be read, or without a value, such as 1/0."""


class TooLarge(Unreadable):
    """Beyond the limits on size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A quotient of two polynomials; `work` counts the products that went into it."""

    numerator: Polynomial
    denominator: Polynomial
    work: int = 0

    def __add__(self, other: "Value") -> "Value":
        if self.denominator == other.denominator:
            total = _sum([*self.numerator.items(), *other.numerator.items()])
            return Value(total, self.denominator, self.work + other.work + 1)
        left, left_work = _product(self.numerator, other.denominator)
        right, right_work = _product(other.numerator, self.denominator)
        below, below_work = _product(self.denominator, other.denominator)
        work = self.work + other.work + left_work + right_work + below_work
        return _value(_sum([*left.items(), *right.items()]), below, work)

    def __neg__(self) -> "Value":
        return dataclasses.replace(self, numerator={key: -c for key, c in self.numerator.items()})

    def __sub__(self, other: "Value") -> "Value":
        return self + -other

    def __mul__(self, other: "Value") -> "Value":
        above, above_work = _product(self.numerator, other.numerator)
        below, below_work = _product(self.denominator, other.denominator)
        return _value(above, below, self.work + other.work + above_work + below_work)

    def __truediv__(self, other: "Value") -> "Value":
        if not other.numerator:
            raise Unreadable("division by zero")
        return self * Value(other.denominator, other.numerator, other.work)

    def __pow__(self, exponent: int) -> "Value":
        if exponent < 0:
            return (number(1) / self) ** -exponent
        self._refuse_power(exponent)
        result, square = number(1), self
        while exponent:
            if exponent & 1:
                result = result * square
            exponent >>= 1
            if exponent:
                square = square * square
        return result

    def _refuse_power(self, exponent: int) -> None:
        """Says at once what repeated squaring would find out slowly."""
        constant = self.rational
        if constant is not None and abs(constant) in (0, 1):
            exponent &= 1
        if exponent > MAX_BITS:
            raise TooLarge(f"an exponent of more than {MAX_BITS}")
        if constant is not None and _bits(constant) > 1 and (_bits(constant) - 1) * exponent > MAX_BITS:
            raise TooLarge(f"a power of more than {MAX_BITS} bits")

    @property
    def rational(self) -> Fraction | None:
        """The number, where it is a rational one."""
        if self.denominator != {_UNIT: Fraction(1)} or not self.numerator.keys() <= {_UNIT}:
            return None
        return self.numerator.get(_UNIT, Fraction(0))

    def equals(self, other: "Value") -> bool:
        """True if both are the same, as functions of their variables where they have any."""
        return not (self - other).numerator


def number(value: int | Fraction) -> Value:
    """A rational number."""
    fraction = Fraction(value)
    return _value({_UNIT: fraction} if fraction else {}, {_UNIT: Fraction(1)}, 1)


def variable(name: str) -> Value:
    """A variable, or a constant that is no algebraic number, such as pi."""
    return Value({(1, ((name, 1),)): Fraction(1)}, {_UNIT: Fraction(1)}, 1)


def root(value: Value, degree: int = 2) -> Value:
    """The real root of a rational number.

    Raises:
      Unreadable: of a negative number (of even degree) or of what is no number.
      TooLarge: a root beyond what is factored here.
    """
    radicand = value.rational
    if radicand is None:
        raise Unreadable("a root of what is no number")
    if not 2 <= degree <= 64 or (radicand < 0 and degree % 2 == 0):
        raise Unreadable("no real root")
    above, below = radicand.numerator, radicand.denominator
    whole = _whole_root(abs(above), degree), _whole_root(below, degree)
    if whole[0] is not None and whole[1] is not None:
        exact = number(Fraction(whole[0] if above >= 0 else -whole[0], whole[1]))
        return dataclasses.replace(exact, work=value.work + 1)
    if degree != 2:
        raise TooLarge("a higher root that is not rational")
    outside, inside = _square_free(above * below)  # sqrt(a / b) = sqrt(a b) / b
    return _value({(inside, ()): Fraction(outside, below)}, {_UNIT: Fraction(1)}, value.work + 1)


def _whole_root(value: int, degree: int) -> int | None:
    """The whole root of a whole number; None where there is none."""
    if degree == 2:
        found = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        found = low
    return found if found**degree == value else None


def _square_free(value: int) -> tuple[int, int]:
    """(a, b) with value = a^2 b and b square-free."""
    if value > MAX_RADICAND:
        raise TooLarge(f"a square root of more than {MAX_RADICAND}")
    outside, factor = 1, 2
    while factor * factor <= value:
        while value % (factor * factor) == 0:
            value //= factor * factor
            outside *= factor
        factor += 1
    return outside, value


def _value(above: Polynomial, below: Polynomial, work: int) -> Value:
    """Checks the limits, and divides by a denominator of one term without variables."""
    if work > MAX_WORK:
        raise TooLarge(f"more than {MAX_WORK} products")
    if len(below) == 1:
        ((radicand, powers), coefficient) = next(iter(below.items()))
        if not powers and (radicand, coefficient) != (1, 1):
            # 1 / (c sqrt(r)) = sqrt(r) / (c r)
            above, more = _product(above, {(radicand, ()): 1 / (coefficient * radicand)})
            below, work = {_UNIT: Fraction(1)}, work + more
    for polynomial in (above, below):
        if len(polynomial) > MAX_TERMS:
            raise TooLarge(f"more than {MAX_TERMS} terms")
        if any(_bits(coefficient) > MAX_BITS for coefficient in polynomial.values()):
            raise TooLarge(f"a number of more than {MAX_BITS} bits")
    return Value(above, below, work)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _sum(terms: Iterable[tuple[Monomial, Fraction]]) -> Polynomial:
    total: Polynomial = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, Fraction(0)) + coefficient
    return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}


def _product(left: Polynomial, right: Polynomial) -> tuple[Polynomial, int]:
    pairs = [(a, b) for a in left.items() for b in right.items()]
    if len(pairs) > MAX_WORK:
        raise TooLarge(f"more than {MAX_WORK} products")
    return _sum(_term_product(a, b) for a, b in pairs), len(pairs)


def _term_product(
    left: tuple[Monomial, Fraction], right: tuple[Monomial, Fraction]
) -> tuple[Monomial, Fraction]:
    ((left_root, left_powers), a), ((right_root, right_powers), b) = left, right
    shared = math.gcd(left_root, right_root)  # sqrt(s p) sqrt(s q) = s sqrt(p q)
    radicand = left_root // shared * (right_root // shared)
    powers = dict(left_powers)
    for name, power in right_powers:
        powers[name] = powers.get(name, 0) + power
    if radicand > MAX_RADICAND**2 or any(power > MAX_DEGREE for power in powers.values()):
        raise TooLarge("too high a power, or too large a root")
    return (radicand, tuple(sorted(powers.items()))), a * b * shared
