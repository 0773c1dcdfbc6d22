"""Choosing among samples, and its expected accuracy, against enumeration."""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import search
from rlhf_jax.evaluation import pass_at_k

ANSWERS = np.array([[3, 7, 7, 3, 9], [1, 2, 3, 4, 5], [5, 5, 5, 5, 5], [8, 1, 1, 8, 1]])
CORRECT = np.array([[7], [2], [6], [8]]) == ANSWERS
SCORES = np.array([[1, 4, 2, 4, 0], [5, 4, 3, 2, 1], [0, 0, 0, 0, 0], [1, 2, 1, 2, 0.5]], np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0]], bool)


def naive_vote(answers, weights, allowed):
    totals = Counter()
    for answer, weight, is_there in zip(answers, weights, allowed, strict=True):
        if is_there:
            totals[answer] += weight
    if not totals:
        return None
    best = max(totals.values())
    return next(a for a, there in zip(answers, allowed, strict=True) if there and totals[a] == best)


def test_choices():
    assert search.best_of_n(SCORES).tolist() == [1, 0, 0, 1]  # ties: the earliest
    assert search.majority_vote(ANSWERS).tolist() == [0, 0, 0, 1]
    assert search.majority_vote(ANSWERS, MASK).tolist() == [0, 1, 0, 0]
    assert search.weighted_vote(ANSWERS, SCORES).tolist() == [1, 0, 0, 1]
    poisoned = jnp.where(MASK, SCORES, jnp.nan)
    assert search.weighted_vote(ANSWERS, poisoned, MASK).tolist() == [1, 1, 0, 0]
    assert search.best_of_n(poisoned, MASK).tolist() == [1, 1, 0, 0]
    assert search.best_of_n(poisoned, jnp.zeros_like(MASK)).tolist() == [0, 0, 0, 0]


def test_votes_against_counting():
    rng = np.random.default_rng(0)
    answers, allowed = rng.integers(4, size=(64, 9)), rng.random((64, 9)) < 0.8
    weights = rng.integers(1, 5, size=(64, 9)).astype(np.float32)
    for cast in (np.ones_like(weights), weights):
        places = np.asarray(search.weighted_vote(answers, cast, allowed))
        for row in range(64):
            expected = naive_vote(answers[row], cast[row], allowed[row])
            assert expected is None or answers[row, places[row]] == expected
    relabelled = np.asarray([17, -3, 40, 2])[answers]  # ids mean nothing but equality
    np.testing.assert_array_equal(search.majority_vote(answers), search.majority_vote(relabelled))


def test_equal_weights_of_any_size_are_a_majority():
    answers = jnp.array([[0, 1, 0, 1, 1, 0, 1]])
    for weight in (0.1, 1 / 3, 1e-6, 1e6):
        assert int(search.weighted_vote(answers, jnp.full(answers.shape, weight))[0]) == 1
        assert int(search.weighted_vote(answers[:, :6], jnp.full((1, 6), weight))[0]) == 0  # a tie


def subsets(total, size):
    return list(itertools.combinations(range(total), size))


def test_best_of_n_and_pass_at_k_against_all_subsets():
    rng = np.random.default_rng(1)
    scores = np.concatenate([SCORES, rng.integers(3, size=(20, 5))])
    correct, allowed = rng.random((24, 5)) < 0.5, rng.random((24, 5)) < 0.7
    ours = np.asarray(pass_at_k.best_of_n_accuracy(scores, correct, allowed))
    unmasked = np.asarray(pass_at_k.best_of_n_accuracy(scores, correct))
    passes = np.asarray(pass_at_k.pass_at_k(correct))
    for row, size in itertools.product(range(24), range(1, 6)):
        found, plain, any_right = [], [], []
        for subset in map(list, subsets(5, size)):
            kept = [i for i in subset if allowed[row, i]]
            found.append(bool(kept) and correct[row, max(kept, key=lambda i: (scores[row, i], -i))])
            plain.append(correct[row, max(subset, key=lambda i: (scores[row, i], -i))])
            any_right.append(correct[row, subset].any())
        assert ours[row, size - 1] == pytest.approx(np.mean(found), abs=1e-6)
        assert unmasked[row, size - 1] == pytest.approx(np.mean(plain), abs=1e-6)
        assert passes[row, size - 1] == pytest.approx(np.mean(any_right), abs=1e-6)


def test_best_of_n_value_against_all_subsets():
    rng = np.random.default_rng(2)
    scores, gold = rng.normal(size=(2, 3, 6)).astype(np.float32)
    ours, proxy = pass_at_k.best_of_n_value(scores, gold), pass_at_k.best_of_n_value(scores, scores)
    for row, size in itertools.product(range(3), range(1, 7)):
        best = [max(subset, key=lambda i: scores[row, i]) for subset in subsets(6, size)]
        assert ours[row, size - 1] == pytest.approx(gold[row, best].mean(), abs=1e-5)
        assert proxy[row, size - 1] == pytest.approx(scores[row, best].mean(), abs=1e-5)


def test_best_of_n_kl_is_that_of_the_best_of_many_different_answers():
    """Against the exact divergence for M equally likely answers, which comes near the bound as M grows."""
    sizes = jnp.array([1, 2, 5, 16])
    bound = np.asarray(pass_at_k.best_of_n_kl(sizes))
    assert bound[0] == 0
    for total, room in ((8, 0.5), (4096, 0.005)):
        for size, most in zip(sizes.tolist(), bound, strict=True):
            ranks = np.arange(1, total + 1) / total
            chosen = ranks**size - (ranks - 1 / total) ** size
            exact = np.sum(chosen * np.log(np.maximum(chosen, 1e-300) * total))
            assert most - room - 1e-6 <= exact <= most + 1e-6


@pytest.mark.parametrize("total", [7, 200, 1000])
def test_pass_at_k_is_the_formula(total):
    counts = [0, 1, total // 3, total - 1, total]
    correct = np.arange(total) < np.array(counts)[:, None]
    passes = np.asarray(pass_at_k.pass_at_k(correct))
    for row, count in enumerate(counts):
        for k in (1, 2, total // 2, total):
            exact = 1 - math.comb(total - count, k) / math.comb(total, k)
            assert passes[row, k - 1] == pytest.approx(exact, abs=2e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_vote_accuracy_against_all_orders(weighted):
    weights = np.maximum(SCORES, 0.25) if weighted else np.ones_like(SCORES)
    given = {"weights": jnp.asarray(weights)} if weighted else {}
    ours = np.asarray(
        pass_at_k.vote_accuracy(ANSWERS, CORRECT, jax.random.key(0), mask=MASK, resamples=4000, **given)
    )
    for row in range(4):
        exact = np.zeros(5)
        for order in map(list, itertools.permutations(range(5))):
            for size in range(1, 6):
                part = order[:size]
                winner = naive_vote(ANSWERS[row][part], weights[row][part], MASK[row][part])
                exact[size - 1] += winner is not None and CORRECT[row][ANSWERS[row] == winner].any()
        np.testing.assert_allclose(ours[row], exact / 120, atol=0.03)  # 4 standard errors of 4,000 orders


def test_estimates_are_unbiased():
    """From pools of 6, the expected accuracy of 3 fresh samples of a known distribution."""
    probabilities = np.array([0.45, 0.35, 0.2])  # of answers 0, 1, 2; answer 0 is right
    exact = 0.0
    for triple in itertools.product(range(3), repeat=3):
        exact += (naive_vote(triple, (1, 1, 1), (1, 1, 1)) == 0) * np.prod(probabilities[list(triple)])
    pools = np.random.default_rng(0).choice(3, size=(4000, 6), p=probabilities)
    estimate = pass_at_k.vote_accuracy(pools, pools == 0, jax.random.key(1), resamples=8)[:, 2]
    assert float(jnp.mean(estimate)) == pytest.approx(exact, abs=4 * 0.5 / math.sqrt(4000))
    assert float(jnp.mean(pass_at_k.pass_at_k(pools == 0)[:, 2])) == pytest.approx(1 - 0.55**3, abs=0.03)


def test_scores_of_chains_and_steps():
    logp = jnp.log(jnp.array([[0.5, 0.25, jnp.nan], [0.9, 0.8, 0.7]]))
    mask = jnp.array([[True, True, False], [True, True, True]])
    assert search.likelihood_scores(logp, mask, length_power=0)[0] == pytest.approx(math.log(0.125))
    assert search.length_normalized_probs(logp, mask)[0] == pytest.approx(math.sqrt(0.125))
    odds = jnp.log(
        jnp.array([[1.0, 3.0, jnp.nan], [9.0, 1.0, 3.0]])
    )  # probabilities 1/2, 3/4; 9/10, 1/2, 3/4
    found = {
        a: search.process_scores(odds, mask, aggregate=a) for a in ("minimum", "product", "mean", "last")
    }
    np.testing.assert_allclose(found["minimum"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found["product"], [0.375, 0.3375], rtol=1e-6)
    np.testing.assert_allclose(found["mean"], [0.625, 2.15 / 3], rtol=1e-6)
    np.testing.assert_allclose(found["last"], [0.75, 0.75], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(search.process_scores(x, mask)))(odds)
    assert bool(jnp.all(jnp.isfinite(gradient)))
