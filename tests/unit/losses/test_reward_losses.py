"""Rankings and process rewards; Bradley-Terry's laws are in test_preference_laws.py."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax import losses


def ranking_nll(rewards: list[float]) -> float:
    """-log of the probability of drawing the items in this order, by softmax over those left."""
    total = 0.0
    for i, reward in enumerate(rewards):
        total -= math.log(math.exp(reward) / sum(math.exp(x) for x in rewards[i:]))
    return total


REWARDS = np.random.default_rng(0).normal(0, 1.5, (4, 5))
ITEMS = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 1]], bool)


def test_plackett_luce_matches_the_naive_loop_and_skips_masked_items() -> None:
    rankings = [
        [r for r, item in zip(row, keep, strict=True) if item]
        for row, keep in zip(REWARDS, ITEMS, strict=True)
    ]
    usable = [ranking for ranking in rankings if len(ranking) > 1]
    pairs = [[a > b for a, b in itertools.combinations(ranking, 2)] for ranking in usable]
    poisoned = np.where(ITEMS, REWARDS, np.nan)
    with jax.enable_x64(True):
        loss, metrics = losses.plackett_luce_loss(jnp.asarray(poisoned), jnp.asarray(ITEMS))
        grad = jax.grad(lambda x: losses.plackett_luce_loss(x, jnp.asarray(ITEMS))[0])(jnp.asarray(poisoned))
        check_grads(
            lambda x: losses.plackett_luce_loss(x)[0], (jnp.asarray(REWARDS),), order=1, modes=["rev"]
        )
    assert float(loss) == pytest.approx(sum(map(ranking_nll, usable)) / 3, rel=1e-12)
    assert float(metrics["accuracy"]) == pytest.approx(
        np.mean([np.mean(order) for order in pairs]), rel=1e-12
    )
    np.testing.assert_array_equal(grad[~ITEMS], 0)
    assert np.isfinite(grad).all()


def test_plackett_luce_of_two_items_is_bradley_terry() -> None:
    pairs = jnp.asarray(REWARDS[:, :2])
    ranked = losses.plackett_luce_loss(pairs)
    paired = losses.bradley_terry_loss(pairs[:, 0], pairs[:, 1])
    assert float(ranked[0]) == pytest.approx(float(paired[0]), rel=1e-6)
    assert float(ranked[1]["accuracy"]) == float(paired[1]["accuracy"])


def test_plackett_luce_probabilities_of_all_orders_sum_to_one() -> None:
    orders = jnp.asarray(list(itertools.permutations([0.3, -1.0, 2.0])))
    nll = jax.vmap(lambda row: losses.plackett_luce_loss(row[None])[0])(orders)
    assert float(jnp.sum(jnp.exp(-nll))) == pytest.approx(1, rel=1e-6)


def test_plackett_luce_in_micro_batches_and_at_extremes() -> None:
    rewards, items = jnp.asarray(REWARDS), jnp.asarray(ITEMS)
    loss, metrics = losses.plackett_luce_loss(rewards, items)
    parts = [
        losses.plackett_luce_loss(rewards[s], items[s], denominator=3) for s in (slice(0, 1), slice(1, 4))
    ]
    assert float(loss) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(sum(float(p[1]["accuracy"]) for p in parts), rel=1e-6)
    extreme = jnp.array([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]], jnp.bfloat16)
    value, grad = jax.value_and_grad(lambda x: losses.plackett_luce_loss(x)[0])(extreme)
    assert value.dtype == jnp.float32
    assert math.isfinite(float(value))
    assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_process_reward_matches_the_naive_loop() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 2, (3, 4)), rng.choice([0.0, 1.0, 0.3], (3, 4))
    mask = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    terms, right = [], []
    for z, y in zip(logits[mask], labels[mask], strict=True):
        p = 1 / (1 + math.exp(-z))
        terms.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
        right.append((z > 0) == (y > 0.5))
    with jax.enable_x64(True):
        arguments = [jnp.asarray(np.where(mask, x, np.nan)) for x in (logits, labels)]
        loss, metrics = losses.process_reward_loss(*arguments, jnp.asarray(mask))
        grad = jax.grad(lambda x: losses.process_reward_loss(x, arguments[1], jnp.asarray(mask))[0])(
            arguments[0]
        )
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-12)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right), rel=1e-12)
    expected = np.where(mask, (1 / (1 + np.exp(-logits)) - labels) / mask.sum(), 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-15)


def test_process_reward_follows_the_reduction() -> None:
    logits, labels = jnp.asarray(REWARDS), jnp.ones((4, 5))
    rows = [
        losses.process_reward_loss(logits[i : i + 1], labels[:1], jnp.asarray(ITEMS[i : i + 1]))[0]
        for i in range(4)
    ]
    loss, _ = losses.process_reward_loss(logits, labels, jnp.asarray(ITEMS), reduce=losses.sequence_mean)
    assert float(loss) == pytest.approx(float(np.mean(rows)), rel=1e-6)


RANKS = np.array([[0, 1, 1, 2, 0], [1, 0, 0, 0, 2], [0, 1, 2, 0, 1], [2, 0, 1, 0, 0]])


def test_hinge_on_rankings_matches_the_naive_loop_and_skips_masked_items() -> None:
    leads = [
        row[a] - row[b]
        for row, ranks, keep in zip(REWARDS, RANKS, ITEMS, strict=True)
        for a, b in itertools.permutations(range(5), 2)
        if keep[a] and keep[b] and ranks[a] < ranks[b]
    ]

    def loss_fn(rewards):
        return losses.hinge_ranking_loss(rewards, jnp.asarray(RANKS), jnp.asarray(ITEMS), margin=0.5)

    with jax.enable_x64(True):
        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(
            jnp.asarray(np.where(ITEMS, REWARDS, np.nan))
        )
    assert float(loss) == pytest.approx(np.mean([max(0.0, 0.5 - lead) for lead in leads]), rel=1e-12)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean([lead > 0 for lead in leads]), rel=1e-12)
    np.testing.assert_array_equal(grad[~ITEMS], 0)
    assert np.isfinite(grad).all()


def test_soft_labels_are_the_mean_of_both_verdicts() -> None:
    first, second = jnp.asarray(REWARDS[:, 0]), jnp.asarray(REWARDS[:, 1])
    preference = jnp.array([1.0, 0.8, 0.5, 0.1])

    def bradley_terry(a, b, **options):
        return losses.bradley_terry_loss(a, b, centring=0.3, **options)

    def dpo(a, b, **options):
        return losses.dpo_loss(losses.PairLogps(a, b, 0 * a, 0 * b), beta=0.7, **options)

    for loss_fn in (bradley_terry, dpo):
        one = [float(loss_fn(first[i : i + 1], second[i : i + 1])[0]) for i in range(4)]
        other = [float(loss_fn(second[i : i + 1], first[i : i + 1])[0]) for i in range(4)]
        wanted = np.mean(preference * np.array(one) + (1 - preference) * np.array(other))
        loss = loss_fn(first, second, label_smoothing=1 - preference)[0]
        assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
        kept = jnp.array([True, True, True, False])
        poisoned = (1 - preference).at[3].set(jnp.nan)
        grad = jax.grad(lambda a, f=loss_fn, k=kept, p=poisoned: f(a, second, label_smoothing=p, mask=k)[0])(
            first
        )
        assert np.isfinite(grad).all()
