"""Preferences between two answers: by rewards, and by a judge who is asked in both orders."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.feedback.pairwise import compare_by_judge, compare_by_rewards
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer

PROMPTS = [PromptExample(np.array([1]), "1+1=?", {"answer": str(n)}, f"row {n}") for n in range(3)]


def rollout(*texts):
    tokenizer = arithmetic_tokenizer()
    ids = [tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    tokens = jnp.array([row + [0] * (width - len(row)) for row in ids])
    mask = jnp.array([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    sequences = Sequences(tokens, tokens, mask.astype(jnp.int32), mask)
    return Rollout(sequences, jnp.zeros(mask.shape), jnp.ones(len(texts), bool))


def longer(prompts, completions, *, opponents, answer, **_):
    """Sure of the longer answer, and fond of what it sees first."""
    assert answer == ["0", "1", "2"]
    pairs = zip(completions, opponents, strict=True)
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.8 for a, b in pairs]


def unsure(prompts, completions, **_):
    return [None, 0.5, 0.5]


def impossible(prompts, completions, **_):
    return [0.5, 1.5, 0.5]


@pytest.fixture(autouse=True)
def judges(monkeypatch):
    import sys

    module = types.ModuleType("some_judges")
    vars(module).update(longer=longer, unsure=unsure, impossible=impossible, __file__="judges.py")
    monkeypatch.setitem(sys.modules, "some_judges", module)


def test_a_judge_is_asked_in_both_orders():
    compare = compare_by_judge("some_judges:longer", arithmetic_tokenizer())
    compared = compare(PROMPTS, rollout("1", "12", "3"), rollout("12", "1", "4"))
    np.testing.assert_allclose(compared.preference, [0, 1, 0.5], atol=1e-7)
    assert compared.metrics["order_bias"] == pytest.approx(0.2)


def test_what_a_judge_cannot_tell_does_not_count_and_no_probability_is_an_error():
    sides = rollout("1", "2", "3"), rollout("4", "5", "6")
    compared = compare_by_judge("some_judges:unsure", arithmetic_tokenizer())(PROMPTS, *sides)
    assert compared.preference.tolist() == [0.5, 0.5, 0.5]
    assert compared.scored.tolist() == [False, True, True]
    assert compared.metrics["unscorable"] == 1
    with pytest.raises(UserError, match=r"returned 1.5 for row 1 \(row 1\)"):
        compare_by_judge("some_judges:impossible", arithmetic_tokenizer())(PROMPTS, *sides)


def test_rewards_prefer_as_bradley_and_terry_do():
    sides = rollout("1", "2", "3"), rollout("4", "5", "6")

    class Reward:
        def score(self, answers, prompts):
            values = [1.0, 0.0, 0.5] if answers is sides[0] else [0.75, 1.0, 0.5]
            return Scored(np.float32(values), np.array([False, answers is sides[1], False]))

    compared = compare_by_rewards(Reward(), noise=0.25)(PROMPTS, *sides)
    np.testing.assert_allclose(compared.preference, [1 / (1 + np.exp(-1.0)), 0.5, 0.5], rtol=1e-6)
    assert compared.scored.tolist() == [True, False, True]
    assert compared.metrics == {
        "reward": pytest.approx(0.5),
        "opponent_reward": pytest.approx(0.625),
        "unscorable": 1,
    }
