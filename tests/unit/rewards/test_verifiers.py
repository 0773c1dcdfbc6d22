"""Verifiers: strict for the embedded task, lenient and exact for GSM8K, cheap for hostile text."""

import json
import pathlib
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.rewards.verifiers import (
    exact_answer,
    exact_answer_reward,
    final_number,
    gsm8k_answer,
    gsm8k_reward,
    symbolic_answer,
    symbolic_reward,
)

GSM8K = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize("text", ["#### 21", "7+8=15\n15+6=21\n#### 21", "\n#### 21", "nonsense\n#### 21"])
def test_exact_answers_pass(text):
    assert exact_answer(text, 21)
    assert exact_answer(text, "21")
    assert not exact_answer(text, 21, finished=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "21",
        "####21",
        "####  21",
        "#### 21 ",
        "#### 21\n",
        "#### 21.",
        "#### 21.0",
        "#### 021",
        "#### +21",
        "#### -21",
        "#### 2 1",
        "#### 121",
        "#### 211",
        "##### 21",
        "x#### 21",
        "7+8=15 #### 21",
        "#### 21\n#### 21",
        "#### 20\n#### 21",
        "#\n#### 21",
        "#### 21\x00",
        "#### \N{ARABIC-INDIC DIGIT TWO}\N{ARABIC-INDIC DIGIT ONE}",
        "#### twenty-one",
        "\r#### 21",
    ],
)
def test_all_else_fails(text):
    assert not exact_answer(text, 21)


def test_negative_answers():
    assert exact_answer("5-8=-3\n#### -3", -3)
    assert not exact_answer("5-8=-3\n#### -3", 3)
    assert not exact_answer("#### -0", 0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("She pays $1,234.50.\n#### $1,234.50.", Fraction("1234.5")),
        ("#### 1,234,567", 1234567),
        ("#### -3/4", Fraction(-3, 4)),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### \N{MINUS SIGN}7", -7),
        ("#### .5", Fraction(1, 2)),
        ("#### 007", 7),
        ("#### 5 apples, not 6", 5),
        ("#### The answer is 12", 12),
        ("#### 3\nthen\n#### 4", 4),
        ("no mark: 3 + 4 = 7", 7),
        ("no mark: it is 7.", 7),
        ("no mark: 12-5", 5),
        ("no mark: 12 - 5", 5),
        ("no mark: x = -5", -5),
        ("1,2,3", 3),
        ("10%", 10),
        ("#### 1/3", Fraction(1, 3)),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "none", "####", "7\n####", "#### none", "#### 1/0", "#### " + "9" * 65, "²"]
)
def test_texts_without_a_final_number(text):
    assert final_number(text) is None
    assert not gsm8k_answer(text, "#### 7")
    assert not gsm8k_answer("#### 7", text)


@given(st.fractions(max_denominator=10**6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_written_fractions_are_read_back(number, is_marked):
    assert final_number(f"#### {number}" if is_marked else f"so it is {number}.") == number


@given(st.integers(-(10**15), 10**15), st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_grouped_and_decimal_numbers_are_read_back(number, zeros):
    assert final_number(f"#### {number:,}" + ("." + "0" * zeros if zeros else "")) == number


@pytest.mark.parametrize("answer", [18, 18.0, "18", "18.00", "x = 2 * 9\n#### 18"])
def test_references_may_be_numbers_or_worked_solutions(answer):
    assert gsm8k_answer("9 * 2 = 18\n#### 18", answer)
    assert not gsm8k_answer("#### 19", answer)


MEGABYTE = 10**6
HOSTILE = {
    "digits": "9" * MEGABYTE,
    "marked digits": "#### " + "9" * MEGABYTE,
    "digits and end": "1" * MEGABYTE + "\n#### 7",
    "marks": "####" * (MEGABYTE // 4),
    "numbers": "1 " * (MEGABYTE // 2),
    "groups": "1" + ",111" * (MEGABYTE // 4) + "1",
    "marked groups": "#### 1" + ",111" * (MEGABYTE // 4) + "1",
    "fractions": "1/" * (MEGABYTE // 2),
    "signs": "#### " + "-" * MEGABYTE,
    "dollars": "$" * MEGABYTE,
    "dots": "." * MEGABYTE,
    "NUL": "\0" * MEGABYTE,
    "brackets": "(" * MEGABYTE + "1" + ")" * MEGABYTE,
    "surrogates": "\ud800" * MEGABYTE,
    "spaces": "7" + " " * MEGABYTE,
    "exponent": "#### 1e999999999",
    "code": "#### __import__('os').abort()",
    "power": "#### 9**9**9**9",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_completions_are_cheap_and_harmless(text):
    # The best of three, so that a busy machine does not fail the test.
    times = []
    for _ in range(3):
        start = time.perf_counter()
        verdicts = exact_answer(text, 7), gsm8k_answer(text, "#### 7")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    assert verdicts == (text.endswith("\n#### 7"), text.endswith("\n#### 7"))


def test_a_number_cut_by_the_window_is_not_read():
    spaces = " " * 4090
    assert final_number("12345678" + spaces) is None
    assert final_number("1 2345" + spaces) == 2345


def test_rewards_by_row():
    texts = ["#### 1", "#### 2", "#### 3"]
    assert exact_answer_reward(["p"] * 3, texts, answer=["1", 2, 4], other=[0, 0, 0]) == [1.0, 1.0, 0.0]
    ended = [False, True, True]
    assert exact_answer_reward(["p"] * 3, texts, answer=[1, 2, 3], finished=ended) == [0.0, 1.0, 1.0]
    assert gsm8k_reward(["p"] * 3, texts, answer=["so\n#### 1", 2.0, "4"], other=[0, 0, 0]) == [1.0, 1.0, 0.0]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not at ../shared/data/gsm8k")
def test_published_verdicts_on_real_model_solutions():
    """Of each real solution the authors of the data say whether it is right; so do we."""
    questions = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text().split("\n") if line]
    assert all(gsm8k_answer(row["answer"], row["answer"]) for row in questions)
    agreements = []
    for line in (GSM8K / "model_solutions.jsonl").read_text().split("\n"):
        if line:
            row = json.loads(line)
            solutions = [value for value in row.values() if isinstance(value, dict)]
            agreements += [
                gsm8k_answer(each["solution"], row["ground_truth"]) == each["is_correct"]
                and symbolic_answer(each["solution"], row["ground_truth"]) is each["is_correct"]
                for each in solutions
            ]
    assert len(agreements) > 3000
    assert all(agreements)


@pytest.mark.parametrize("reference", [None, True, ["5"], {"x": 5}, float("nan")])
def test_a_row_without_an_answer_cannot_be_scored(reference):
    """A null would otherwise be the word None, which an answer of that word earns."""
    for reward, text in (
        (symbolic_reward, rf"\boxed{{{reference}}}"),
        (exact_answer_reward, f"#### {reference}"),
        (gsm8k_reward, "5"),
    ):
        assert reward(["q", "q"], [text, text], answer=[reference, 5])[0] is None, reward.__name__


def test_a_reference_without_a_number_cannot_be_scored():
    assert gsm8k_reward(["q"] * 2, ["5", "five"], answer=["five", "five"]) == [None, None]
