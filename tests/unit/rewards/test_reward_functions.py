"""Reward functions of users: found by path, called with care, combined."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rewards.functions import (
    UNSCORABLE_SCORE,
    call_reward,
    load_reward,
    score_rows,
)
from rlhf_jax.rewards.verifiers import exact_answer_reward

MODULE = """
LIMIT = 3

def brevity(prompts, completions, **_):
    return [-float(len(text)) for text in completions]

def exact_match(prompts, completions, *, answer, **_):
    return [float(text == right) for text, right in zip(completions, answer)]
"""


class Unprintable:
    """Says nothing of itself."""

    def __repr__(self):
        raise RuntimeError


@pytest.fixture
def rewards_folder(tmp_path, monkeypatch):
    """The current folder, with modules of the user's that no other test sees."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "some_rewards.py").write_text(MODULE)
    (tmp_path / "unreadable_rewards.py").write_text("def f(:\n")
    (tmp_path / "failing_rewards.py").write_text("\n1 / 0\n")
    (tmp_path / "leaving_rewards.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "needy_rewards.py").write_text("import no_such_package_at_all\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_rewards"):
            del sys.modules[name]


def test_rewards_are_found_by_path(rewards_folder):
    reward_fn = load_reward("some_rewards:exact_match")
    assert reward_fn(["p"], ["a"], answer=["a"]) == [1.0]
    assert load_reward("rlhf_jax.rewards.verifiers:exact_answer_reward") is exact_answer_reward


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("exact_match", ["module:function", "exact_match"]),
        ("some_rewards:", ["module:function"]),
        (":exact_match", ["module:function"]),
        ("some_rewards:exact_mach", ["exact_mach does not exist", "some_rewards.py", "exact_match"]),
        ("some_rewards:LIMIT", ["LIMIT is not a function"]),
        ("leaving_rewards:f", ["importing leaving_rewards fails", "leaving_rewards.py:2", "SystemExit"]),
        ("some_reward:exact_match", ["no module some_reward", "nearest name is some_rewards"]),
        ("rlhf_jax.rewards.verifier:f", ["nearest name is rlhf_jax.rewards.verifiers"]),
        ("no.such.thing:f", ["no module no"]),
        ("unreadable_rewards:f", ["unreadable_rewards.py:1", "SyntaxError"]),
        ("failing_rewards:f", ["failing_rewards.py:2", "ZeroDivisionError"]),
        ("needy_rewards:f", ["needs the module no_such_package_at_all", "install"]),
        ("rlhf_jax.reward.verifiers:f", ["no module rlhf_jax.reward ", "nearest name is rlhf_jax.rewards"]),
        ("..:f", ["module:function"]),
        ("some_rewards.py:brevity", ["no module some_rewards.py"]),
    ],
)
def test_paths_that_name_nothing_are_refused_in_one_sentence(rewards_folder, path, words):
    with pytest.raises(UserError) as caught:
        load_reward(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [path, *words]:
        assert word in message


def lengths(prompts, completions, **_):
    return [len(text) for text in completions]


@pytest.mark.parametrize("wrap", [list, tuple, np.asarray, jnp.asarray, lambda x: np.asarray(x, bool)])
def test_numbers_of_any_kind_become_float32(wrap):
    rewards = call_reward(lambda *_: wrap([1, 0, 1]), ["p"] * 3, ["a", "b", "c"], {})
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1.0, 0.0, 1.0]


def test_fields_reach_the_function_as_lists():
    seen = {}

    def remember(prompts, completions, **fields):
        seen.update(fields, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    call_reward(
        remember, ("p", "q"), ("a", "b"), {"answer": ("1", "2"), "finished": np.asarray([True, False])}
    )
    assert seen["prompts"] == ["p", "q"]
    assert seen["completions"] == ["a", "b"]
    assert seen["answer"] == ["1", "2"]
    assert seen["finished"] == [True, False]


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ([1.0, float("nan"), 0.0], ["nan", "row 1 (rows.jsonl:8)", "'bb'"]),
        ([1.0, 0.0, float("inf")], ["inf", "row 2 (rows.jsonl:9)"]),
        ([1e39, 0.0, 0.0], ["1e+39", "row 0 (rows.jsonl:7)"]),
        ([0.0, -1e25, 0.0], ["-1e+25", "row 1 (rows.jsonl:8)"]),
        ([10**400, 0.0, 0.0], ["[1000000"]),
        ([Unprintable(), 0.0, 0.0], ["a list (whose repr raises RuntimeError)"]),
        ([1.0, 0.0], ["shape (2,)", "3 finite numbers"]),
        ([[1.0, 0.0, 0.0]], ["shape (1, 3)"]),
        (1.0, ["shape ()"]),
        ([[1.0], [2.0, 3.0], 4.0], ["[[1.0], [2.0, 3.0], 4.0]"]),
        (["yes", "no", "no"], ["['yes', 'no', 'no']"]),
        (None, ["None", "shape ()"]),
        (np.array([1.0, np.nan, 0.0]), ["nan", "row 1"]),
        ({}, ["{}"]),
        ([1j, 0, 0], ["1j"]),
    ],
)
def test_values_that_are_no_rewards_are_refused(returned, shown):
    def judge(prompts, completions, **_):
        return returned

    where = ["rows.jsonl:7", "rows.jsonl:8", "rows.jsonl:9"]
    with pytest.raises(UserError) as caught:
        call_reward(judge, ["p"] * 3, ["a", "bb", "c"], {}, where=where)
    message = str(caught.value)
    assert "judge" in message
    assert "\n" not in message
    for word in shown:
        assert word in message


def test_an_exception_names_function_place_row_and_completion():
    def fragile(prompts, completions, *, answer, **_):
        return [float(int(text) == right) for text, right in zip(completions, answer, strict=True)]

    with pytest.raises(UserError) as caught:
        call_reward(
            fragile, ["p"] * 3, ["1", "two\nlines", "3"], {"answer": [1, 2, 3]}, where=["a:1", "a:2", "a:3"]
        )
    message = str(caught.value)
    words = ["fragile", "ValueError", "test_reward_functions.py:", "row 1 (a:2)", repr("two\nlines")]
    for word in words:
        assert word in message
    assert "\n" not in message


def test_an_exception_of_the_whole_batch_names_no_row():
    def whole(prompts, completions, **_):
        if len(completions) > 1:
            raise RuntimeError
        return [0.0]

    with pytest.raises(UserError, match=r"whole raised RuntimeError at .*:\d+: mend") as caught:
        call_reward(whole, ["p"] * 2, ["a", "b"], {})
    assert "on row" not in str(caught.value)


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"exact_answer_reward .*prompts, completions, question .*'answer'"):
        call_reward(exact_answer_reward, ["p"], ["#### 1"], {"question": ["1"]})
    with pytest.raises(UserError, match=r"unexpected.*'answer'.*\*\*_"):
        call_reward(lambda prompts, completions: [0.0], ["p"], ["a"], {"answer": ["1"]})


def test_long_values_are_shown_short():
    def angry(prompts, completions, **_):
        raise ValueError("x" * 10_000)

    with pytest.raises(UserError) as caught:
        call_reward(angry, ["p"], ["y" * 10_000], {})
    assert len(str(caught.value)) < 600


def test_interrupts_pass_through():
    def stopped(prompts, completions, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward(stopped, ["p"], ["a"], {})


class EndOfTheWorld(BaseException):
    """No Exception."""


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("x"), EndOfTheWorld("now"), GeneratorExit()])
def test_whatever_else_a_reward_raises_is_said(error):
    def leaving(prompts, completions, **_):
        raise error

    with pytest.raises(UserError, match=rf"leaving raised {type(error).__name__}.* on row 0, completion 'a'"):
        call_reward(leaving, ["p"], ["a"], {})


def test_an_error_without_words_is_said():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def failing(prompts, completions, **_):
        raise Mute

    with pytest.raises(UserError, match="failing raised Mute at"):
        call_reward(failing, ["p"], ["a"], {})


def test_what_cannot_be_scored_gets_the_stated_score_and_is_counted():
    def unsure(prompts, completions, **_):
        return [None if text == "?" else 1.0 for text in completions]

    scored = score_rows(unsure, ["p"] * 3, ["a", "?", "b"], {})
    assert scored.rewards.tolist() == [1.0, UNSCORABLE_SCORE, 1.0]
    assert scored.rewards.dtype == np.float32
    assert scored.unscorable.tolist() == [False, True, False]


def test_a_function_that_fails_is_named():
    def half(prompts, completions, **_):
        return [float("nan")] * len(completions)

    with pytest.raises(UserError, match="half returned nan"):
        call_reward(half, ["p"], ["a"], {})
