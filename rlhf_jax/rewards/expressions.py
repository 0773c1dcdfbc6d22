"""Reads elementary mathematics, plain or LaTeX, as exact values: a tokenizer and a parser, nothing else.

    sum      := product (("+" | "-") product)*
    product  := signed ((("*" | "/") signed) | power)*       2x, 3(x+1) and 2\\sqrt{3} are products
    signed   := ("+" | "-")* power                           -2^2 is -4
    power    := primary "%"* ("^" ("+" | "-")* power)?       2^3^2 is 2^9
    primary  := number | mixed number | letter | "pi" | "infinity" | bracketed sum
              | "\\frac" group group | ("\\sqrt" | "sqrt") ("[" number "]")? group

Only ASCII digits are digits, and characters that cannot be seen are never skipped. `1/2x` is `(1/2) x`.
"""

import re
import unicodedata
from fractions import Fraction

from rlhf_jax.rewards.algebra import MAX_BITS, TooLarge, Unreadable, Value, number, root, variable

MAX_CHARACTERS = 1000
MAX_TOKENS = 300
MAX_DEPTH = 32
MAX_EXPONENT = 300
"""Of ten, in scientific notation."""

_LETTERS = frozenset("abcxyzmnkpqr")  # of which two or three different ones, such as xy, are a product
_NUMBER = re.compile(
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?P<decimals>\.[0-9]*)?"
    r"(?:[eE](?P<exponent>[+-]?[0-9]+))?"
)
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>{_NUMBER.pattern})|(?P<word>\\?[A-Za-z]+)|(?P<sign>[-+*/^()\[\]{{}}%]))"
)
_VULGAR = re.compile("[\N{VULGAR FRACTION ONE QUARTER}-\N{VULGAR FRACTION THREE QUARTERS}⅐-⅞]")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹]+")
_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{MIDDLE DOT}": "*",
        "\N{DOT OPERATOR}": "*",
        "\N{DIVISION SIGN}": "/",
        "\N{FRACTION SLASH}": "/",
        "\N{SQUARE ROOT}": r"\sqrt ",
        "\N{GREEK SMALL LETTER PI}": " pi ",
        "\N{INFINITY}": " infinity ",
        "\N{NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
    }
)
# In this order: each is a pattern of fixed length or of one repeated class, so that time stays linear.
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=[0-9])(?:\{,\}|\\,|\\!,|,\\!)(?=[0-9]{3}(?![0-9]))", ","),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?", ""),
        (r"\\[!]", ""),
        (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\%", "%"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
        (r"\*\*", "^"),
    ]
]


def plain(text: str) -> str:
    """The text with other spellings of signs made one.

    Raises:
      TooLarge: more than 1,000 characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"more than {MAX_CHARACTERS} characters")
    text = _VULGAR.sub(lambda found: f" {unicodedata.normalize('NFKC', found[0])} ", text)
    text = _SUPERSCRIPTS.sub(lambda found: f"^{unicodedata.normalize('NFKC', found[0])}", text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def evaluate(text: str) -> Value:
    """The value of an expression.

    Raises:
      Unreadable: it is none, or has no value.
      TooLarge: its text, depth, or a number on the way is beyond the limits.
    """
    return _Parser(_tokens(plain(text))).whole()


def calculate(text: str) -> Fraction:
    """The value of an expression, where it is a rational number.

    Raises: as `evaluate`.
    """
    value = evaluate(text).rational
    if value is None:
        raise Unreadable("not a rational number")
    return value


def read_number(found: re.Match[str]) -> Fraction:
    """The value of a match of a number pattern with groups whole, decimals, exponent.

    Raises: TooLarge
    """
    exponent = found["exponent"] or "0"
    if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
        raise TooLarge(f"an exponent of ten beyond {MAX_EXPONENT}")
    if len(found[0]) > MAX_BITS // 3:
        raise TooLarge("a number of too many digits")
    digits = (found["whole"] or "").replace(",", "") or "0"
    decimals = found["decimals"] or ""
    return Fraction(digits + (decimals if len(decimals) > 1 else "")) * Fraction(10) ** int(exponent)


def _tokens(text: str) -> list[str | Fraction]:
    tokens: list[str | Fraction] = []
    place, end = 0, len(text.rstrip())
    while place < end:
        found = _TOKEN.match(text, place)
        if found is None:
            raise Unreadable(f"a character that is no mathematics at {place}")
        tokens.append(read_number(found) if found["number"] else found["word"] or found["sign"])
        if len(tokens) > MAX_TOKENS:
            raise TooLarge(f"more than {MAX_TOKENS} numbers and signs")
        place = found.end()
    return tokens


class _Parser:
    """Recursive descent that computes as it reads; one object reads one expression."""

    def __init__(self, tokens: list[str | Fraction]) -> None:
        self._tokens = tokens
        self._place = 0
        self._depth = 0

    def whole(self) -> Value:
        value = self._sum()
        if self._place < len(self._tokens):
            raise Unreadable(f"{self._peek()} where the expression should end")
        return value

    def _peek(self, ahead: int = 0) -> str | Fraction | None:
        place = self._place + ahead
        return self._tokens[place] if place < len(self._tokens) else None

    def _take(self, *wanted: str) -> str | None:
        token = self._peek()
        if isinstance(token, str) and token in wanted:
            self._place += 1
            return token
        return None

    def _demand(self, wanted: str) -> None:
        if not self._take(wanted):
            raise Unreadable(f"{wanted} is missing")

    def _descend(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooLarge(f"more than {MAX_DEPTH} brackets, powers or roots in each other")

    def _sum(self) -> Value:
        self._descend()
        value = self._product()
        while sign := self._take("+", "-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        self._depth -= 1
        return value

    def _product(self) -> Value:
        value = self._signed()
        while True:
            if sign := self._take("*", "/"):
                factor = self._signed()
                value = value * factor if sign == "*" else value / factor
            elif self._starts_factor():
                value = value * self._power()
            else:
                return value

    def _starts_factor(self) -> bool:
        token = self._peek()
        return isinstance(token, str) and (token in ("(", "{") or token.lstrip("\\").isalpha())

    def _signed(self) -> Value:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Value:
        base = self._primary()
        while self._take("%"):
            base = base / number(100)
        if not self._take("^"):
            return base
        self._descend()
        exponent = self._signed().rational
        self._depth -= 1
        if exponent is None:
            raise Unreadable("an exponent that is no rational number")
        if exponent.denominator > 1:
            base = root(base, exponent.denominator)
        return base**exponent.numerator

    def _primary(self) -> Value:
        token = self._peek()
        if token is None:
            raise Unreadable("the expression ends too early")
        self._place += 1
        if isinstance(token, Fraction):
            return number(token + self._fraction_behind(token))
        if token in ("(", "{", "["):
            return self._closed({"(": ")", "{": "}", "[": "]"}[token])
        return self._word(token)

    def _closed(self, closing: str) -> Value:
        value = self._sum()
        self._demand(closing)
        return value

    def _group(self) -> Value:
        self._descend()
        closing = {"(": ")", "{": "}"}.get(str(self._take("(", "{")))
        value = self._closed(closing) if closing else self._primary()
        self._depth -= 1
        return value

    def _word(self, word: str) -> Value:
        name = word.removeprefix("\\")
        if name == "frac" and name != word:
            above = self._group()
            return above / self._group()
        if name == "sqrt":
            return self._root()
        if name in ("pi", "infinity") or word == "\\infty":
            return variable("infinity" if word == "\\infty" else name)
        is_product = len(word) <= 3 and len(set(word)) == len(word) and _LETTERS.issuperset(word)
        if name != word or not (len(word) == 1 or is_product):
            raise Unreadable(f"the word {word[:20]}")
        value = variable(word[0])
        for letter in word[1:]:
            value = value * variable(letter)
        return value

    def _root(self) -> Value:
        degree = Fraction(2)
        if self._take("["):
            degree = self._closed("]").rational or Fraction(0)
        if degree.denominator > 1 or not 2 <= degree <= 64:
            raise Unreadable("a root of no whole degree")
        return root(self._group(), int(degree))

    def _fraction_behind(self, whole: Fraction) -> Fraction:
        """The fraction of a mixed number (2 1/2, 2\\frac{1}{2}), whose place is then behind it; else 0."""
        ahead = [self._peek(place) for place in range(7)]
        if isinstance(ahead[0], Fraction) and ahead[1] == "/":
            above, below, length = ahead[0], ahead[2], 3
        elif ahead[0] == "\\frac" and [ahead[i] for i in (1, 3, 4, 6)] == ["{", "}", "{", "}"]:
            above, below, length = ahead[2], ahead[5], 7
        else:
            return Fraction(0)
        parts = [part for part in (whole, above, below) if isinstance(part, Fraction)]
        if len(parts) < 3 or any(part.denominator > 1 for part in parts) or not 0 < parts[1] < parts[2]:
            return Fraction(0)
        self._place += length
        return parts[1] / parts[2]
