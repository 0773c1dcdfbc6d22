import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import byte_tokenizer, character_tokenizer
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout import completions
from rlhf_jax.rollout.completions import LastCompletions, describe_rows

MASK = jnp.array([[False, True, True], [False, True, False]])


LETTERS = character_tokenizer("abcdefg")


def rollout():
    tokens = jnp.array([LETTERS.encode("abc"), LETTERS.encode("ade")])
    positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
    sequences = Sequences(tokens, positions, jnp.ones((2, 3), jnp.int32), MASK)
    return Rollout(sequences, jnp.zeros((2, 3)), jnp.array([True, True]))


def test_numbers_of_rows_sum_over_what_was_sampled():
    old = jnp.array([[jnp.nan, -1.0, -2.0], [9.0, -3.0, jnp.nan]])
    ref = jnp.array([[0.0, -1.5, -2.5], [0.0, -1.0, 0.0]])
    by_token = jnp.array([[7.0, 1.0, 2.0], [7.0, 5.0, 7.0]])
    found = describe_rows(by_token, old, ref, MASK)
    np.testing.assert_allclose(found["completions/logp"], [-3.0, -3.0])
    np.testing.assert_allclose(found["completions/kl"], [1.0, -2.0])
    np.testing.assert_allclose(found["completions/advantage"], [1.5, 5.0])
    np.testing.assert_allclose(found["completions/token/kl"][MASK], [0.5, 0.5, -2.0])
    np.testing.assert_allclose(found["completions/token/advantage"][MASK], [1.0, 2.0, 5.0])
    alone = describe_rows(jnp.array([0.5, -0.5]), old, None, MASK)
    of_tokens = {"completions/token/logp", "completions/token/advantage"}
    assert set(alone) == {"completions/logp", "completions/advantage"} | of_tokens
    np.testing.assert_allclose(alone["completions/advantage"], [0.5, -0.5])
    np.testing.assert_allclose(alone["completions/token/advantage"][MASK], [0.5, 0.5, -0.5])
    assert set(describe_rows(None, old, None, MASK)) == {"completions/logp", "completions/token/logp"}


def test_rows_say_what_was_asked_written_and_worth():
    prompts = [
        PromptExample(np.array([0]), "say b", {"prompt": "say b", "answer": "b"}, "row 1"),
        PromptExample(np.array([0]), "say d", {"question": "say d", "level": 2}, "row 2"),
    ]
    terms = {"exact": np.array([1.0, np.nan]), "brief": np.array([0.5, 0.25])}
    scored = Scored(np.array([1.5, 0.0]), np.array([False, True]), terms)
    last = LastCompletions(LETTERS)
    assert last() == []
    per_row = {"completions/kl": jnp.array([0.5, jnp.nan])}
    assert last.keep(prompts, rollout(), scored, {"loss": 1.0, **per_row}) == {"loss": 1.0}
    first, second = last()
    assert first == {
        "prompt": "say b",
        "completion": "bc",
        "reward": 1.5,
        "reward/exact": 1.0,
        "reward/brief": 0.5,
        "length": 2,
        "kl": 0.5,
        "answer": "b",
    }
    assert second["reward"] is None  # no reward could score it
    assert second["reward/exact"] is None  # not meant for this row
    assert second["kl"] is None
    assert second["level"] == 2
    assert "question" not in second


def test_a_single_reward_has_no_column_of_its_own():
    scored = Scored(np.array([1.0, 2.0]), np.zeros(2, bool), {"exact": np.array([1.0, 2.0])})
    prompts = [PromptExample(np.array([0]), "x", {}, "row")] * 2
    last = LastCompletions(LETTERS)
    last.keep(prompts, rollout(), scored, {})
    assert [row["reward"] for row in last()] == pytest.approx([1.0, 2.0])
    assert not [name for row in last() for name in row if name.startswith("reward/")]


def test_tokens_of_the_best_and_the_worst_are_described(monkeypatch):
    monkeypatch.setattr(completions, "_MOST_WITH_TOKENS", 2)
    tokens = jnp.array([LETTERS.encode(text) for text in ("abc", "ade", "afg")])
    mask = jnp.concatenate([MASK, MASK[:1]])
    sequences = Sequences(tokens, tokens, mask, mask)
    written = Rollout(sequences, jnp.zeros((3, 3)), jnp.ones(3, bool))
    logp = jnp.array([[7.0, -1.0, jnp.nan], [7.0, -3.0, 7.0], [7.0, -4.0, -5.0]])
    scored = Scored(np.array([0.0, 2.0, 1.0]), np.zeros(3, bool))
    last = LastCompletions(LETTERS)
    last.keep(
        [PromptExample(np.array([0]), "x", {}, "")] * 3,
        written,
        scored,
        describe_rows(None, logp, None, mask),
    )
    worst, best, between = last()
    assert (worst["token/text"], worst["token/logp"]) == (["b", "c"], [-1.0, None])
    assert (best["token/text"], best["token/logp"]) == (["d"], [-3.0])
    assert not any(name.startswith("token/") for name in between)
    assert between["logp"] == -9.0


def test_answers_that_are_compared_and_who_wrote_them():
    other = byte_tokenizer()
    tokens = jnp.array([other.encode("xyz"), other.encode("uvw")])
    opponents = Rollout(Sequences(tokens, tokens, MASK, MASK), jnp.zeros((2, 3)), jnp.ones(2, bool))
    prompts = [PromptExample(np.array([0]), "x", {"answer": "b"}, "")] * 2
    last = LastCompletions(LETTERS)
    last.keep(
        prompts, opponents, None, {}, opponents=opponents, fields={"preference": [0.75, 0.5]}, tokenizer=other
    )
    assert last() == [
        {
            "prompt": "x",
            "completion": text,
            "length": length,
            "opponent": text,
            "preference": p,
            "answer": "b",
        }
        for text, length, p in (("yz", 2, 0.75), ("v", 1, 0.5))
    ]
