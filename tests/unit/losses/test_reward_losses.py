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


IN_ORDER = jnp.broadcast_to(jnp.arange(5), (4, 5))
TIED = np.array([[0, 1, 1, 2, 0], [1, 0, 0, 0, 2], [0, 1, 2, 0, 1], [2, 0, 1, 0, 0]])
MARGINS, CENTRING = np.array([0.3, 0.0, 1.0, -0.2]), 0.07
ON_RANKINGS = {
    "all_pairs": jax.jit(losses.all_pairs_loss),
    "plackett_luce": jax.jit(losses.plackett_luce_loss),
}
every_ranking_loss = pytest.mark.parametrize("name", ON_RANKINGS)


def test_plackett_luce_matches_the_naive_loop_and_skips_masked_items() -> None:
    rankings = [
        [r for r, item in zip(row, keep, strict=True) if item]
        for row, keep in zip(REWARDS, ITEMS, strict=True)
    ]
    usable = [ranking for ranking in rankings if len(ranking) > 1]
    pairs = [[a > b for a, b in itertools.combinations(ranking, 2)] for ranking in usable]
    poisoned = np.where(ITEMS, REWARDS, np.nan)
    items = jnp.asarray(ITEMS)
    with jax.enable_x64(True):
        loss, metrics = losses.plackett_luce_loss(jnp.asarray(poisoned), IN_ORDER, items)
        grad = jax.grad(lambda x: losses.plackett_luce_loss(x, IN_ORDER, items)[0])(jnp.asarray(poisoned))
        check_grads(
            lambda x: losses.plackett_luce_loss(x, IN_ORDER)[0],
            (jnp.asarray(REWARDS),),
            order=1,
            modes=["rev"],
        )
    assert float(loss) == pytest.approx(sum(map(ranking_nll, usable)) / 3, rel=1e-12)
    assert float(metrics["accuracy"]) == pytest.approx(
        np.mean([np.mean(order) for order in pairs]), rel=1e-12
    )
    np.testing.assert_array_equal(grad[~ITEMS], 0)
    assert np.isfinite(grad).all()


def naive(name: str, scores: list[float], ranks: list[int], margin: float) -> tuple[float, list[float]]:
    """(loss of one ranking, leads of its pairs), by loops; what is not there is left out before."""
    count = range(len(scores))
    pairs = [(a, b) for a in count for b in count if ranks[a] < ranks[b]]
    if name == "all_pairs":
        loss = sum(math.log(1 + math.exp(-(scores[a] - scores[b] - margin))) for a, b in pairs) / len(pairs)
    else:
        loss = 0.0
        for a in count:
            behind = sum(math.exp(scores[b] + margin) for b in count if ranks[b] > ranks[a])
            loss -= math.log(math.exp(scores[a]) / (math.exp(scores[a]) + behind))
    loss += CENTRING * sum((scores[a] + scores[b]) ** 2 for a, b in pairs) / len(pairs)
    return loss, [scores[a] - scores[b] for a, b in pairs]


@every_ranking_loss
def test_a_loss_on_rankings_with_ties_and_margins_matches_the_naive_loop(name: str) -> None:
    expected = []
    for row, ranks, keep, margin in zip(REWARDS, TIED, ITEMS, MARGINS, strict=True):
        if keep.sum() > 1:
            expected.append(naive(name, row[keep].tolist(), ranks[keep].tolist(), margin))

    def loss_fn(rewards: jax.Array, margins: jax.Array):
        options = {"margin": margins, "centring": CENTRING}
        return ON_RANKINGS[name](rewards, jnp.asarray(TIED), jnp.asarray(ITEMS), **options)

    with jax.enable_x64(True):
        rewards, margins = jnp.asarray(np.where(ITEMS, REWARDS, np.nan)), jnp.asarray(MARGINS)
        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(rewards, margins)
        check_grads(
            lambda x: loss_fn(x, margins)[0], (jnp.asarray(REWARDS),), order=1, modes=["rev"], rtol=1e-4
        )
    assert float(loss) == pytest.approx(np.mean([loss for loss, _ in expected]), rel=1e-12)
    assert float(metrics["margin"]) == pytest.approx(np.mean([np.mean(x) for _, x in expected]), rel=1e-12)
    right = [np.mean(np.array(leads) > 0) for _, leads in expected]
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right), rel=1e-12)
    np.testing.assert_array_equal(grad[~ITEMS], 0)
    assert np.isfinite(grad).all()
    # A row with one answer has no pair, and none of its entries moves the loss.
    np.testing.assert_array_equal(grad[2], 0)


@every_ranking_loss
def test_of_two_items_a_loss_on_rankings_is_bradley_terry(name: str) -> None:
    scores, margin = jnp.asarray(REWARDS[:, :2]), jnp.asarray(MARGINS)
    ranks = jnp.array([[0, 1], [0, 1], [1, 0], [2, 5]])
    better = jnp.where(ranks[:, 0] < ranks[:, 1], scores[:, 0], scores[:, 1])
    options = {"margin": margin, "centring": CENTRING}
    loss, metrics = ON_RANKINGS[name](scores, ranks, **options)
    paired, wanted = losses.bradley_terry_loss(better, scores.sum(1) - better, **options)
    assert float(loss) == pytest.approx(float(paired), rel=1e-6)
    assert metrics.keys() == wanted.keys()
    for metric, value in wanted.items():
        assert float(metrics[metric]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), metric


def test_plackett_luce_probabilities_of_all_orders_sum_to_one() -> None:
    rewards = jnp.array([0.3, -1.0, 2.0, 0.7])
    orders = jnp.asarray(list(itertools.permutations(range(4))))
    nll = jax.vmap(lambda ranks: losses.plackett_luce_loss(rewards[None], ranks[None])[0])(orders)
    assert float(jnp.sum(jnp.exp(-nll))) == pytest.approx(1, rel=1e-6)


@pytest.mark.slow
def test_plackett_luce_of_one_before_equal_others_is_the_sum_over_their_orders() -> None:
    rewards = jnp.array([[0.3, -1.0, 2.0, 0.7]])
    orders = jnp.asarray([[0, *rest] for rest in itertools.permutations([1, 2, 3])])
    nll = jax.vmap(lambda ranks: losses.plackett_luce_loss(rewards, ranks[None])[0])(orders)
    tied, _ = losses.plackett_luce_loss(rewards, jnp.array([[0, 4, 4, 4]]))
    assert float(jnp.exp(-tied)) == pytest.approx(float(jnp.sum(jnp.exp(-nll))), rel=1e-6)


@every_ranking_loss
def test_padding_and_order_of_the_items_change_nothing(name: str) -> None:
    order = np.random.default_rng(3).permutation(5)
    wide = [np.pad(x, ((0, 0), (0, 2)), constant_values=v) for x, v in ((REWARDS, np.nan), (TIED, 0))]
    present = np.pad(ITEMS, ((0, 0), (0, 2)))
    options = {"margin": jnp.asarray(MARGINS, jnp.float32), "centring": CENTRING}
    plain, *others = (
        ON_RANKINGS[name](*map(jnp.asarray, arrays), **options)
        for arrays in (
            (REWARDS, TIED, ITEMS),
            (*wide, present),
            (REWARDS[:, order], TIED[:, order], ITEMS[:, order]),
        )
    )
    for other in others:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), other, plain)


@every_ranking_loss
def test_a_loss_on_rankings_in_micro_batches_and_at_extremes(name: str) -> None:
    loss_fn = ON_RANKINGS[name]
    rewards, ranks, items, margins = (jnp.asarray(x) for x in (REWARDS, TIED, ITEMS, MARGINS))
    loss, metrics = loss_fn(rewards, ranks, items, margin=margins)
    parts = [
        loss_fn(rewards[s], ranks[s], items[s], margin=margins[s], denominator=3)
        for s in (slice(0, 1), slice(1, 4))
    ]
    assert float(loss) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-6)
    for metric, value in metrics.items():
        assert float(value) == pytest.approx(sum(float(p[1][metric]) for p in parts), rel=1e-5), metric
    extreme = jnp.array([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]], jnp.bfloat16)
    value, grad = jax.value_and_grad(lambda x: loss_fn(x, IN_ORDER[:2, :3])[0])(extreme)
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


def test_hinge_on_rankings_matches_the_naive_loop_and_skips_masked_items() -> None:
    leads = [
        row[a] - row[b]
        for row, ranks, keep in zip(REWARDS, TIED, ITEMS, strict=True)
        for a, b in itertools.permutations(range(5), 2)
        if keep[a] and keep[b] and ranks[a] < ranks[b]
    ]

    def loss_fn(rewards):
        return losses.hinge_ranking_loss(rewards, jnp.asarray(TIED), jnp.asarray(ITEMS), margin=0.5)

    with jax.enable_x64(True):
        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(
            jnp.asarray(np.where(ITEMS, REWARDS, np.nan))
        )
    assert float(loss) == pytest.approx(np.mean([max(0.0, 0.5 - lead) for lead in leads]), rel=1e-12)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean([lead > 0 for lead in leads]), rel=1e-12)
    np.testing.assert_array_equal(grad[~ITEMS], 0)
    assert np.isfinite(grad).all()


@pytest.mark.slow
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
