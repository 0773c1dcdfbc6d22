"""What stages make of answers that no reward could score: no pair, no row to imitate."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.stages import loss_options, online_dpo, rounds

LENGTHS = (1, 5, 2, 4)


def options(**given):
    defaults = {
        "method": "dpo",
        "loss": "dpo",
        "learning_rate": 1.0,
        "beta": 0.5,
        "loss_params": loss_options.LossParams(alpha=0.1 if given.get("method") == "xpo" else None),
        "mixture_coef": 0.1,
        "micro_batches": 1,
        "samples_per_prompt": 2,
        "reward_threshold": None,
    }
    return types.SimpleNamespace(**{**defaults, **given})


def answers(rewards, unscorable):
    rollout = tabular.rollout(tabular.init(), tabular.rows(1, LENGTHS), jnp.array([True, True, True, True]))
    scored = Scored(np.float32(rewards), np.array(unscorable))
    return Answers([None] * len(LENGTHS), rollout, scored)


@pytest.mark.slow
@pytest.mark.parametrize("method", few(["dpo", "xpo", "nash_md"], "dpo"))
def test_a_pair_with_an_unscored_side_does_not_count(method):
    wins, scored = np.float32([0.9, 0.5, 0.2, 0.8]), np.array([True, False, True, False])
    sides = [
        tabular.rollout(tabular.init(), tabular.rows(seed, LENGTHS), jnp.ones(4, bool)) for seed in (1, 2)
    ]
    make = online_dpo.nash_update if method == "nash_md" else online_dpo.pair_update
    init, learn = make(options(method=method), tabular.score, optax.identity())

    def step(rows, mask):
        first, second = (jax.tree.map(lambda leaf: leaf[rows], side) for side in sides)
        state = init(tabular.init(), jax.random.key(0))
        state, _ = learn(state, tabular.init(7), first, second, jnp.asarray(wins[rows]), jnp.asarray(mask))
        return np.asarray(state.learner.params["logits"])

    found = step(np.arange(4), scored)
    assert np.abs(found - tabular.init()["logits"]).max() > 1e-3
    np.testing.assert_allclose(found, step(np.flatnonzero(scored), np.ones(2, bool)), rtol=1e-5, atol=1e-6)


def test_pairs_of_a_round_need_two_scored_answers():
    found = rounds.selected(options(), answers([0, 1, 0, 1], [False, False, True, False]))
    assert found["chosen"][1].tolist() == found["rejected"][1].tolist() == [True, False]


@pytest.mark.parametrize(
    ("method", "kept"), [("raft", [True, False]), ("expert", [True, False, False, False])]
)
def test_what_is_imitated_has_a_score(method, kept):
    """The bar is the mean of the scored, 0.5: 0.9 has no score, though it stands above."""
    given = answers([0.8, 0.3, 0.9, 0.4], [False, False, True, False])
    _, counts = rounds.selected(options(method=method), given)["completion"]
    assert counts.tolist() == kept
    assert given.mean_reward() == pytest.approx(0.5)
