"""When answers are equal: exactly, as mathematics, and never by accident."""

from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.rewards.algebra import TooLarge, Unreadable, number, root, variable
from rlhf_jax.rewards.answers import answers_equal
from rlhf_jax.rewards.expressions import calculate, evaluate
from rlhf_jax.rewards.extraction import (
    boxed,
    final_answer,
    last_number,
    marked,
    reference_answer,
    said,
    tagged,
)
from rlhf_jax.rewards.verifiers import symbolic_answer

EQUAL = [
    [
        "1/2",
        "0.5",
        ".5",
        "50%",
        r"\frac{1}{2}",
        r"\frac12",
        r"\dfrac{2}{4}",
        "5e-1",
        "½",
        r"$\frac{1}{2}$",
        "2^-1",
    ],
    ["2 1/2", "2.5", r"2\frac{1}{2}", "2½", "5/2", r"\frac52", "250%", "10^{-1} * 25"],
    [
        "1234567",
        "1,234,567",
        "1{,}234{,}567",
        r"1\,234\,567",
        "1.234567e6",
        r"1.234567 \times 10^{6}",
        "1234567.",
    ],
    ["-3/4", r"-\frac{3}{4}", r"\frac{-3}{4}", "\N{MINUS SIGN}0.75", "-(3/4)", "x = -0.75"],
    [
        "$18",
        r"\$18.00",
        "18 dollars",
        "18",
        "$18$",
        "**18**",
        r"\boxed{18}",
        r"\text{18}",
        "1800 cents",
        "9+9=18",
    ],
    ["5 m", "500 cm", "0.005 km", "5 meters", r"5\text{ m}"],
    ["60 miles per hour", "60 miles/hour", "1 mile per minute"],
    ["12 square feet", "12 ft^2", r"12\text{ ft}^2", "1728 square inches"],
    [r"\sqrt{12}", r"2\sqrt{3}", "2√3", "sqrt(12)", r"\frac{6}{\sqrt{3}}", "12^{1/2}", r"\sqrt3+\sqrt3"],
    [r"\sqrt{16}", "4", r"\sqrt[3]{64}", "256^(1/4)"],
    [r"\frac{1}{1+\sqrt{2}}", r"\sqrt{2}-1"],
    ["(x+1)^2", "x^2+2x+1", "(1+x)(x+1)", "y = x² + 2x + 1", r"\frac{(x+1)^3}{x+1}"],
    [r"2\pi r", "2πr", r"\pi \cdot 2 r"],
    ["(1, 2)", r"\left(1,2\right)", r"(\frac{2}{2}, 2.0)"],
    [r"\{1, 2\}", r"\{2,1\}", "{1, 2}", "2, 1", "1,2"],
    ["[0, 1)", "[0,1)", r"x \in [0, 1)"],
    [r"(-\infty, 3]", "(-∞,3]"],
    [r"30^\circ", "30°", r"30^{\circ}", "30 degrees", "30"],
    [r"\text{Evelyn}", "evelyn", " Evelyn. "],
    ["(A)", "A", r"\text{(A)}", "A."],
]
DIFFERENT = [
    ("0.333", "1/3"),
    ("1/2", "1/3"),
    ("5 m", "5 kg"),
    ("5 m", "5 m^2"),
    ("[0, 1]", "[0, 1)"),
    ("(1, 2)", "(2, 1)"),
    ("1, 2", "1, 2, 2"),
    ("1, 1, 2", "1, 2, 2"),
    ("(1, 2)", "[1, 2]"),
    ("x", "y"),
    ("3xy", "3"),
    ("x + 1", "x"),
    ("2+3=6", "6"),
    ("x^2", "x2"),
    ("1 or 2", "1"),
    (r"\pm 2", "2"),
    ("five", "5"),
    ("50%", "5"),
    ("10:30", "10"),
    ("cat", "act"),
    ("1.2.3", "1.2"),
    ("1 2", "12"),
    ("1,23", "123"),
    ("\uff14\uff12", "42"),
    ("4\u200b2", "42"),
    (r"\sqrt{2}", "1.41421356"),
    (r"\pi", "3.14159"),
    ("-2^2", "4"),
    ("", "0"),
    ("1/0", "2/0 + 1"),
]


@pytest.mark.parametrize("spellings", EQUAL, ids=lambda spellings: spellings[0])
def test_spellings_of_one_answer(spellings):
    for answer in spellings:
        assert answers_equal(answer, spellings[0]), answer
        assert answers_equal(spellings[0], answer), answer


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_answers(answer, reference):
    assert not answers_equal(answer, reference)
    assert not answers_equal(reference, answer)


@given(st.fractions(max_denominator=10**6), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_canonical_forms_of_fractions_are_equal(value, form):
    whole, part = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    written = [
        str(value),
        rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",
        f"{sign}{whole} {part}" if whole and part else str(value),
        f"{value * 100}%",
    ][form]
    assert answers_equal(written, str(value))
    assert not answers_equal(written, str(value + 1)) or form == 3


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_canonical_forms_of_integers_are_equal(value, zeros):
    for written in (f"{value:,}", f"{value}." + "0" * zeros, f"{value}e0", rf"\boxed{{{value}}}"):
        assert answers_equal(written, str(value))


polynomials = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


@given(polynomials, polynomials)
@settings(max_examples=60, deadline=None)
def test_products_of_polynomials_are_expanded(left, right):
    def written(coefficients):
        return " + ".join(f"({c})x^{power}" for power, c in enumerate(coefficients))

    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    assert answers_equal(f"({written(left)})({written(right)})", written(product))
    product[0] += 1
    assert not answers_equal(f"({written(left)})({written(right)})", written(product))


@given(st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_square_roots_multiply(a, b):
    product = root(number(a)) * root(number(b))
    assert product.equals(root(number(a * b)))
    assert (product * product).rational == a * b


def test_powers_of_quotients():
    x = variable("x")
    assert (number(1) / x**3 * x).equals(x**-2)
    assert not (x**2).equals(x)
    assert (number(Fraction(2, 3)) ** -2).rational == Fraction(9, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("7/2/2", Fraction(7, 4)),
        ("1/2(3)", Fraction(3, 2)),
        ("12.5% * 80", 10),
        ("--3", 3),
        ("2 - -3", 5),
        ("123456789 * 987654321", 121932631112635269),
        ("0^0", 1),
    ],
)
def test_calculations(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "2 3",
        "(",
        "())",
        "1/0",
        "0^-1",
        "sqrt(-1)",
        "2x",
        "a",
        "import os",
        "1 + é",
        "5 // 2",
        "2 ^ x",
    ],
)
def test_texts_without_a_value(text):
    with pytest.raises(Unreadable):
        calculate(text)


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9",
        "10^400*10^400",
        "1e301",
        "sqrt(10^9+7)",
        "(" * 50,
        "1+" * 400 + "1",
        "x^65",
        "(x+y+a+b)^30",
        "9" * 999,
    ],
)
def test_texts_beyond_the_limits(text):
    with pytest.raises(TooLarge):
        evaluate(text)


def test_extraction_rules():
    assert tagged("a <answer> 42\n</answer> b") == "42"
    assert tagged("<answer>1</answer><answer>2</answer>") is None
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert marked("#### 1\n#### 2 apples\nend") == "2 apples"
    assert said("The answer is 3. Yes.\nAnswer: 4.5, I think") == "4.5, I think"
    assert last_number("1 then 3/4.") == "3/4"
    assert final_answer("#### 1 but the answer is 2") == "1 but the answer is 2"
    assert final_answer("The answer is 2, not 3") == "2, not 3"
    assert final_answer("nothing") is None
    assert reference_answer("9 - 2 = 7\nso 7") == "7"
    assert reference_answer("text\n#### 1,234") == "1,234"
    assert reference_answer(18.0) == "18.0"
    assert reference_answer("  ") is None


def test_what_cannot_be_told_is_none():
    assert symbolic_answer("42", "") is None
    assert symbolic_answer(r"\boxed{9^9^9}", "42") is None
    assert symbolic_answer("42", "9^9^9") is None
    assert symbolic_answer("no idea", "42") is False


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\sqrt[3]{2}", r"\sqrt[3]{2}"),
        (r"\sqrt{n}", "n^{1/2}"),
        ("2^n", "2^{n}"),
        ("x + y = 5", "x+y=5"),
        ("x>5", "x > 5"),
        (r"x \geq 5", r"x\ge5"),
        (r"-1\pm\sqrt2", r"-1 \pm \sqrt{2}"),
        (r"(-\infty,1)\cup(2,\infty)", r"(-\infty, 1) \cup (2, \infty)"),
        (r"2\sin x", r"2 \sin x"),
        (r"\ln 2", r"\ln(2)"),
        (r"x=5 \text{ or } x=-5", r"x=-5 \text{ or } x=5"),
        (r"1 \text{ and } 2", "1, 2"),
        (r"5\text{ cm}^{2}", r"5\text{ cm}^2"),
        ("1 000 000", "1000000"),
        (r"\left(1, 2\right]", "(1,2]"),
        (r"\dfrac{a}{b}", r"\frac{a}{b}"),
    ],
)
def test_what_is_spelled_alike_is_equal_though_it_cannot_be_read(left, right):
    assert answers_equal(left, right)
    assert answers_equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1 2", "12"),
        ("x>5", "x<5"),
        ("2^{12}", "2^12 3"),
        ("(1, 2)", "(2, 1)"),
        ("[1, 2)", "(1, 2]"),
        (r"\sqrt{n}", r"\sqrt{m}"),
        (r"x \geq 5", r"x \leq 5"),
        ("1 and 2", "1 and 3"),
        ("1 00", "100"),
    ],
)
def test_what_is_spelled_otherwise_is_not(left, right):
    assert not answers_equal(left, right)
