"""The world of R1: who writes what, what rewards say of it, and what is held out."""

import collections

import numpy as np
import pytest

from rlhf_jax.rewards.rules import step_language_reward, think_answer_reward
from rlhf_jax.rewards.verifiers import symbolic_reward
from rlhf_jax.tasks import reasoning, style


@pytest.fixture(scope="module")
def rows():
    return reasoning.solution_rows(4000, 0, writers=reasoning.Writers())


def judged(rows):
    prompts, texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    answers = [str(sum(map(int, prompt.removesuffix("=?").split("+")))) for prompt in prompts]
    language = step_language_reward(prompts, texts, script=[reasoning.SCRIPT] * len(rows))
    right = symbolic_reward(prompts, texts, answer=answers)
    return [np.asarray(found) for found in (right, think_answer_reward(prompts, texts), language)]


def test_careful_writers_get_every_reward():
    for reward in judged(reasoning.solution_rows(200, 0, writers=reasoning.CAREFUL)):
        np.testing.assert_array_equal(reward, 1)


def test_the_mixture_is_what_it_says(rows):
    writers, texts = reasoning.Writers(), [row["completion"] for row in rows]
    thinks = np.asarray(["+" in text for text in texts])
    assert thinks.mean() == pytest.approx(writers.thinking, abs=0.03)
    assert np.mean(["<answer>" in text for text in texts]) == pytest.approx(writers.tagging, abs=0.03)
    right, form, language = judged(rows)
    assert form.mean() == pytest.approx(writers.thinking * writers.tagging, abs=0.03)
    # Guesses are seldom right, careless steps sometimes, and steps in the second language mostly.
    mixed = language < 1
    assert mixed.mean() == pytest.approx(writers.thinking * writers.mixing * 7 / 8, abs=0.03)
    assert right[~thinks].mean() < 0.2 < right[thinks & ~mixed].mean() < right[mixed].mean() < 0.9


def test_nothing_that_is_held_out_is_trained_on(rows):
    held_out = {row["prompt"] for row in reasoning.prompt_rows("heldout", 10**6, 3)}
    assert len(held_out) == 6**4 // 8
    assert not held_out & {row["prompt"] for row in rows}
    trained = [row["prompt"] for row in reasoning.prompt_rows("train", 10**6, 3)]
    assert len(set(trained)) == len(trained) == 6**4 - len(held_out)
    assert not held_out & set(trained)
    general = {row["prompt"] for row in reasoning.general_prompt_rows("heldout", 10**6)}
    assert not general & {row["prompt"] for row in reasoning.general_rows(2000, 0)}


def test_every_text_is_written_and_read_by_the_tokenizer(rows):
    tokenizer = reasoning.reasoning_tokenizer()
    longest = len(tokenizer.encode(reasoning.widest_completion()))
    texts = {row["completion"] for row in [*rows, *reasoning.general_rows(50, 0)]}
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= longest
    assert len(tokenizer.encode("<think>7+८</think>")) == 5


@pytest.mark.slow
def test_pairs_of_general_answers_follow_the_taste():
    def lead(row):
        wanted = row["prompt"].removesuffix("?").replace(",", "")
        return style.text_reward(row["chosen"], wanted) - style.text_reward(row["rejected"], wanted)

    shares = [
        np.mean([lead(row) > -1e-9 for row in style.preference_rows("train", 400, 0, noise=noise)])
        for noise in (1e-6, 1.0, 1e6)
    ]
    assert shares[0] == 1 > shares[1] > shares[2] > 0.4
    rows = style.preference_rows("train", 8_000, 0, noise=0.5)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    counts = collections.Counter(row["prompt"] for row in style.preference_rows("heldout", 50, 0, noise=1.0))
    assert counts.keys() <= {row["prompt"] for row in reasoning.general_prompt_rows("heldout", 10**6)}
