"""Weights of propositions, fitted to ranked answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms import rule_reward

RNG = np.random.default_rng(0)
TRUE = np.array([2.0, -1.0, 0.0], np.float32)
FEATURES = RNG.random((32, 4, 3)).astype(np.float32)
BASE = RNG.normal(0, 0.1, (32, 4)).astype(np.float32)
RANKS = np.argsort(np.argsort(-(BASE + FEATURES @ TRUE), axis=1), axis=1).astype(np.int32)
MASK = RNG.random((32, 4)) < 0.9
HYPER = rule_reward.Hyper(learning_rate=0.05, margin=0.1)


def rankings(features=FEATURES, base=BASE):
    return rule_reward.Rankings(*map(jnp.asarray, (features, base, RANKS, MASK)))


def test_the_fit_puts_ranked_answers_in_order_and_finds_which_rules_count():
    config = rule_reward.Config(steps=300)
    train = jax.jit(rule_reward.make_train(config, optax.scale_by_adam()))
    state, history = train(rankings(), HYPER)
    weights = np.asarray(state.learner.params["weights"])
    # Ranks were made with these weights, so order is all that can be known of them: up to a scale.
    np.testing.assert_allclose(weights / weights[0], TRUE / TRUE[0], atol=0.1)
    assert rule_reward.evaluate(state.learner.params, rankings(), HYPER)["accuracy"] > 0.97
    assert history["loss"][-1] < 0.2 * history["loss"][0]
    # What is masked may hold anything.
    poisoned = rankings(np.where(MASK[..., None], FEATURES, np.nan), np.where(MASK, BASE, np.inf))
    np.testing.assert_array_equal(train(poisoned, HYPER)[0].learner.params["weights"], weights)


def test_micro_batches_change_nothing():
    state = rule_reward.init(3, optax.identity())
    state = dataclasses.replace(
        state, learner=dataclasses.replace(state.learner, params={"weights": jnp.array([0.5, 0.1, -0.2])})
    )
    updates = (rule_reward.make_update(rule_reward.Config(count), optax.identity()) for count in (1, 4))
    whole, parts = (jax.jit(update)(state, HYPER, rankings()) for update in updates)
    np.testing.assert_allclose(
        whole[0].learner.params["weights"], parts[0].learner.params["weights"], rtol=1e-5
    )
    np.testing.assert_allclose(whole[1]["accuracy"], parts[1]["accuracy"], rtol=1e-6)
