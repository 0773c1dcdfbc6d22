"""Dynamic sampling: draws until enough groups differ, whatever the order in which they come."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import Answers, filter_zero_std_groups, term_means

# Three prompts with two answers each, in each of four draws; group 1 of draw 0 is the first that differs.
REWARDS = np.float32(
    [
        [[0, 0], [0, 1], [1, 1]],
        [[1, 1], [0, 0], [0, 0]],
        [[1, 0], [0.5, 0.25], [1, 0]],
        [[1, 0], [1, 0], [1, 0]],
    ]
)


def draw(number):
    rewards = REWARDS[number].reshape(-1)
    tokens = jnp.arange(6)[:, None] + 10 * number
    rows = Sequences(tokens, tokens, tokens, tokens > 0)
    prompts = [types.SimpleNamespace(name=(number, group)) for group in range(3) for _ in range(2)]
    rollout = Rollout(rows, jnp.float32(tokens), tokens[:, 0] > 0)
    terms = {"right": rewards, "kind": np.where(rewards > 0.25, rewards, np.nan)}
    return Answers(prompts, rollout, Scored(rewards, rewards == 0.25, terms))


def drawn(most):
    seen = []

    def watched(number):
        seen.append(number)
        return draw(number)

    answers, metrics = filter_zero_std_groups(watched, groups=3, group_size=2, most=most)
    return answers, metrics, seen


def test_it_draws_until_enough_groups_differ():
    answers, metrics, seen = drawn(4)
    assert seen == [0, 1, 2]
    # Of (0.5, 0.25) the second has no score, so nothing differs from the first.
    assert [prompt.name for prompt in answers.prompts[::2]] == [(0, 1), (2, 0), (2, 2)]
    assert answers.rewards.tolist() == [0, 1, 1, 0, 1, 0]
    assert answers.rollout.sequences.tokens[:, 0].tolist() == [2, 3, 20, 21, 24, 25]
    assert answers.scored.terms["right"].tolist() == answers.rewards.tolist()
    assert metrics == {
        "draws": 3,
        "drawn_reward": pytest.approx(float(REWARDS[:3][REWARDS[:3] != 0.25].mean())),
        "drawn_frac_reward_zero_std": pytest.approx(6 / 9),
    }


def test_what_no_reward_could_score_stays_marked():
    answers, _ = filter_zero_std_groups(lambda _: draw(2), groups=3, group_size=2, most=1)
    assert [prompt.name for prompt in answers.prompts[::2]] == [(2, 0), (2, 2), (2, 1)]
    assert answers.scored.unscorable.tolist() == [False] * 5 + [True]
    assert answers.mean_reward() == pytest.approx((1 + 0 + 1 + 0 + 0.5) / 5)


def test_with_too_few_tries_idle_groups_fill_the_batch():
    answers, metrics, seen = drawn(2)
    assert seen == [0, 1]
    assert [prompt.name for prompt in answers.prompts[::2]] == [(0, 1), (0, 0), (0, 2)]
    assert metrics["draws"] == 2


def test_one_draw_of_groups_that_all_differ_stays_as_it_is():
    answers, metrics = filter_zero_std_groups(lambda _: draw(3), groups=3, group_size=2, most=8)
    assert metrics["draws"] == 1
    assert answers.rollout.sequences.tokens[:, 0].tolist() == list(range(30, 36))


def test_means_of_terms_are_over_the_rows_they_are_meant_for():
    scored = Scored(
        np.float32([2, 1]),
        np.zeros(2, bool),
        {"all": np.float32([1, 0]), "some": np.float32([np.nan, 1]), "none": np.float32([np.nan] * 2)},
    )
    assert term_means(scored) == {"reward/all": 0.5, "reward/some": 1.0}
    assert term_means(Scored(np.float32([2]), np.zeros(1, bool), {"all": np.float32([2])})) == {}
