"""Rewards for format, length, language, code and repetition."""

import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.rewards import rules
from rlhf_jax.rewards.functions import load_reward


def one(reward, text, prompt="p", **fields):
    return reward([prompt], [text], **{name: [value] for name, value in fields.items()}, other=[0])[0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n <answer> b </answer>\n", 1),
        ("<think>a</think><answer>b</answer> more", 0),
        ("first <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think><answer>b</answer></think>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("<THINK>a</THINK><answer>b</answer>", 0),
        ("", 0),
        ("<think>" * 10**5, 0),
    ],
)
def test_thought_and_answer(text, reward):
    assert one(rules.think_answer_reward, text) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("a</think>b", 1),
        ("</think>b", 0),
        ("a</think>", 0),
        ("<think>a</think>b", 0),
        ("a</think>b</think>c", 0),
    ],
)
def test_thought_that_the_prompt_opens(text, reward):
    assert one(rules.think_reward, text) == reward


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0), (16_384, 0), (16_385, -1 / 4096), (18_432, -0.5), (20_480, -1), (30_000, -1)],
)
def test_soft_overlong_punishment_of_the_paper(length, penalty):
    assert float(rules.overlong_penalties(np.asarray(length), 20_480)) == pytest.approx(penalty)
    reward = one(rules.soft_overlong_reward, "", token_count=length, token_limit=20_480)
    assert reward == pytest.approx(penalty)


def test_target_length():
    assert one(rules.target_length_reward, "", token_count=90, target_length=100) == -10
    assert one(rules.target_length_reward, "", token_count=110, target_length=100) == -10


@pytest.mark.parametrize(
    ("prompt", "text", "script", "share"),
    [
        ("How much?", "It is four.", None, 1),
        ("Сколько?", "It is four.", None, 0),
        ("Сколько?", "четыре", None, 1),
        ("How much?", "четыре four", None, 0.4),
        ("How much?", "42 = 6 * 7", None, 1),
        ("多少?", r"答案 \boxed{42}", None, 1),
        ("いくつ?", "答えはヨンです", None, 1),
        ("How much?", "p\u0430y", None, 2 / 3),
        ("42?", "words", None, 1),
        ("How much?", "четыре", "cyrillic", 1),
        ("How much?", "four", "GREEK", 0),
    ],
)
def test_language(prompt, text, script, share):
    fields = {} if script is None else {"script": script}
    assert one(rules.language_reward, text, prompt, **fields) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>7+8=15\n15+6=21</think><answer>21</answer>", 1),
        ("<think>7+8=15\n१५+६=२१</think><answer>21</answer>", 2 / 3),
        ("<think>७+8=15\n१५+६=२१</think><answer>21</answer>", 1 / 3),  # one foreign digit costs its step
        ("<think>seven and восемь</think>15", 1 / 2),
        ("<think>\u0663+\u0662=\u0665</think><answer>\u0665</answer>", 0),
        ("7+8=15\n\n  \n#### 15", 1),  # empty lines are no steps
        ("", 0),
        ("<think></think><answer></answer>", 0),
        ("\n+-=\n", 0),
        ("<think>" * 1000, 0),
        ("x² = 4", 1),
    ],
)
def test_steps_in_the_language_of_the_prompt(text, share):
    assert one(rules.step_language_reward, text, script="LATIN") == pytest.approx(share)
    assert one(rules.step_language_reward, text, "How much?") == pytest.approx(share)


def test_steps_in_a_language_with_digits_of_its_own():
    for text in ("७+८=१५ सात", "7+8=15"):
        assert one(rules.step_language_reward, text, script="DEVANAGARI") == 1
    assert one(rules.step_language_reward, "\u0663+\u0662=\u0665", script="ARABIC") == 1
    assert one(rules.step_language_reward, "seven", script="DEVANAGARI") == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("I import apples from Spain, and return home.", 1),
        ("for all of us, the class is over", 1),
        ("so\n```\n1\n```", 0),
        ("x\nimport os", 0),
        ("  def f(x):", 0),
        ("for i in range(3):\n  pass", 0),
        ("#include <stdio.h>", 0),
        ("let x = 3", 0),
    ],
)
def test_code(text, reward):
    assert one(rules.code_free_reward, text) == reward


def test_repetition():
    assert one(rules.repetition_reward, "one two three four five") == 0
    assert one(rules.repetition_reward, "a b c d " * 2) == pytest.approx(-1 / 5)
    assert one(rules.repetition_reward, "a b c d " * 1000) < -0.99
    assert one(rules.repetition_reward, "x" * 1000) < -0.99
    assert one(rules.repetition_reward, "") == 0


RULES = [
    "answer_line_reward",
    "think_answer_reward",
    "think_reward",
    "language_reward",
    "step_language_reward",
    "code_free_reward",
    "repetition_reward",
]


@given(st.text(max_size=300), st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_gets_a_bounded_reward(text, prompt):
    for name in RULES:
        reward = load_reward(f"rlhf_jax.rewards.rules:{name}")
        assert -1 <= one(reward, text, prompt) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2+2=4\n#### 4", 1),
        ("#### -1,234.5", 1),
        ("a\n#### $18", 1),
        ("2+2=4\n#### 4\n", 0),
        ("so #### 4", 0),
        ("#### 4\n#### 4", 0),
        ("a\n#### four", 0),
        ("a\n#### ٤", 0),
        ("a\n####4", 0),
        ("", 0),
    ],
)
def test_an_answer_stands_in_the_last_line(text, expected):
    assert rules.answer_line_reward([""], [text]) == [expected]


def test_the_answer_line_takes_linear_time():
    began = time.perf_counter()
    rules.answer_line_reward([""], ["\n#### " + "9," * 500_000 + "x"])
    assert time.perf_counter() - began < 1
