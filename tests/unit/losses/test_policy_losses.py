"""Policy-gradient losses and their parts: naive loops, identities, and what the docstrings claim."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kernels
from rlhf_jax.core.numerics import bounded_exp
from rlhf_jax.losses.policy import grpo_loss, ppo_clip_loss, ppo_penalty_loss, reinforce_loss
from rlhf_jax.losses.policy_ratios import (
    sequence_log_ratio,
    sequence_token_log_ratio,
    sequence_total_log_ratio,
)
from rlhf_jax.losses.policy_surrogates import (
    cispo_surrogate,
    clip_surrogate,
    dppo_kl_surrogate,
    dppo_tv_surrogate,
    dro_surrogate,
    geometric_mean_surrogate,
    importance_surrogate,
    log_likelihood_surrogate,
    sapo_surrogate,
    vespo_surrogate,
)
from rlhf_jax.losses.reductions import sequence_mean, sequence_sum, token_mean

B, T = 4, 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    mask = rng.random((B, T)) > 0.25
    logp = -rng.gamma(1.0, 1.0, (B, T))
    return {
        "logp": logp,
        "old_logp": logp + 0.3 * rng.normal(size=(B, T)),
        "ref_logp": logp + 0.3 * rng.normal(size=(B, T)),
        "advantages": rng.normal(size=(B, T)),
        "mask": mask,
    }


def arrays(example, *names):
    return [jnp.asarray(example[name]) for name in names]


def numerical_gradient(function, at, step=1e-6):
    """Central differences of a NumPy function."""
    grad = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (function(up) - function(down)) / (2 * step)
    return grad


def mean_over(mask, per_token):
    return np.mean([per_token(b, t) for b, t in np.argwhere(mask)])


def naive_ppo(logp, e, low, high, dual):
    def per_token(b, t):
        ratio, advantage = np.exp(logp[b, t] - e["old_logp"][b, t]), e["advantages"][b, t]
        objective = min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
        return -max(objective, dual * advantage) if advantage < 0 else -objective

    return mean_over(e["mask"], per_token)


def naive_penalty(logp, e, coef):
    def per_token(b, t):
        log_ratio = logp[b, t] - e["old_logp"][b, t]
        return -np.exp(log_ratio) * e["advantages"][b, t] + coef * (np.exp(log_ratio) - 1 - log_ratio)

    return mean_over(e["mask"], per_token)


def naive_reinforce(logp, e):
    return mean_over(e["mask"], lambda b, t: -e["advantages"][b, t] * logp[b, t])


def naive_grpo(logp, e, low, high, coef):
    """Shao et al. 2024, eq. 3-4: the mean over rows of the mean over their tokens."""
    rows = []
    for b in range(B):
        losses = []
        for t in np.flatnonzero(e["mask"][b]):
            ratio, advantage = np.exp(logp[b, t] - e["old_logp"][b, t]), e["advantages"][b, t]
            to_ref = e["ref_logp"][b, t] - logp[b, t]
            objective = min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
            losses.append(-objective + coef * (np.exp(to_ref) - 1 - to_ref))
        rows.append(np.mean(losses))
    return np.mean(rows)


NAMES = ("logp", "old_logp", "advantages", "mask")
LOSSES = {
    "reinforce": (lambda *a: reinforce_loss(*a), naive_reinforce),
    "ppo": (
        functools.partial(ppo_clip_loss, epsilon_low=0.1, epsilon_high=0.25, dual_clip=1.5),
        functools.partial(naive_ppo, low=0.1, high=0.25, dual=1.5),
    ),
    "penalty": (functools.partial(ppo_penalty_loss, kl_coef=0.3), functools.partial(naive_penalty, coef=0.3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_matches_naive_loop_in_value_and_gradient(name, example):
    ours, naive = LOSSES[name]
    logp, *rest = arrays(example, *NAMES)
    (loss, _), grad = jax.value_and_grad(ours, has_aux=True)(logp, *rest)
    np.testing.assert_allclose(loss, naive(example["logp"], example), rtol=0, atol=1e-12)
    expected = numerical_gradient(lambda x: naive(x, example), example["logp"])
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-8)


def test_grpo_matches_naive_loop_in_value_and_gradient(example):
    logp, *rest = arrays(example, "logp", "old_logp", "ref_logp", "advantages", "mask")
    ours = functools.partial(grpo_loss, epsilon_low=0.1, epsilon_high=0.25, kl_coef=0.3)
    (loss, _), grad = jax.value_and_grad(ours, has_aux=True)(logp, *rest)
    naive = functools.partial(naive_grpo, e=example, low=0.1, high=0.25, coef=0.3)
    np.testing.assert_allclose(loss, naive(example["logp"]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(grad, numerical_gradient(naive, example["logp"]), rtol=0, atol=1e-8)


def test_metrics_match_naive_loops(example):
    _, metrics = ppo_clip_loss(*arrays(example, *NAMES), epsilon_low=0.1, epsilon_high=0.25)
    e, mask = example, example["mask"]
    ratio = np.exp(e["logp"] - e["old_logp"])
    low = (ratio < 0.9) & (e["advantages"] < 0)
    high = (ratio > 1.25) & (e["advantages"] > 0)
    expected = {
        "ratio": ratio[mask].mean(),
        "approx_kl": (ratio - 1 - np.log(ratio))[mask].mean(),
        "clip_fraction": (low | high)[mask].mean(),
        "clip_fraction_low": low[mask].mean(),
        "clip_fraction_high": high[mask].mean(),
    }
    assert 0 < expected["clip_fraction_low"] < expected["clip_fraction"] < 1
    for name, result in expected.items():
        np.testing.assert_allclose(metrics[name], result, rtol=0, atol=1e-12, err_msg=name)


def test_the_bounds_hold_back_exactly_the_tokens_that_clip_fraction_counts(example):
    logp, *rest = arrays(example, *NAMES)
    (_, metrics), grad = jax.value_and_grad(ppo_clip_loss, has_aux=True)(logp, *rest)
    held = np.asarray(grad)[example["mask"]] == 0
    np.testing.assert_allclose(held.mean(), metrics["clip_fraction"], atol=1e-12)


# Identities ---------------------------------------------------------------------------------------------


def value_and_grad_of(example, advantages=None, mask=None, **options):
    logp, old_logp, ref_logp = arrays(example, "logp", "old_logp", "ref_logp")
    advantages = jnp.asarray(example["advantages"] if advantages is None else advantages)
    mask = jnp.asarray(example["mask"] if mask is None else mask)
    (loss, _), grad = jax.value_and_grad(grpo_loss, has_aux=True)(
        logp, old_logp, ref_logp, advantages, mask, **options
    )
    return loss, grad


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio_fn", [sequence_log_ratio, sequence_token_log_ratio, sequence_total_log_ratio])
def test_with_one_token_a_sequence_is_a_token(ratio_fn, example):
    mask = np.arange(T) == np.array([0, 3, 5, 2])[:, None]
    one = value_and_grad_of(example, mask=mask, ratio_fn=ratio_fn, kl_coef=0.1)
    assert_equal(one, value_and_grad_of(example, mask=mask, kl_coef=0.1))


def test_gspo_token_is_gspo_for_equal_advantages(example):
    advantages = example["advantages"][:, 0]
    options = {"advantages": advantages, "epsilon_low": 0.05, "epsilon_high": 0.05}
    one = value_and_grad_of(example, ratio_fn=sequence_token_log_ratio, **options)
    other = value_and_grad_of(example, ratio_fn=sequence_log_ratio, **options)
    assert_equal(one, other)
    assert np.abs(one[1]).max() > 0


def test_gmpo_is_gspo_where_neither_clips(example):
    advantages = example["advantages"][:, 0]
    options = {"advantages": advantages, "epsilon_low": 50.0, "epsilon_high": 50.0}
    one = value_and_grad_of(example, surrogate_fn=geometric_mean_surrogate, **options)
    assert_equal(one, value_and_grad_of(example, ratio_fn=sequence_log_ratio, **options))


def test_luspo_weighs_gspo_by_length():
    rng = np.random.default_rng(1)
    logp, old_logp = jnp.asarray(rng.normal(size=(2, 1, T)))
    mask = jnp.arange(T)[None] < 4
    options = {"ratio_fn": sequence_log_ratio, "epsilon_low": 3e-4, "epsilon_high": 4e-4}
    gspo, _ = grpo_loss(logp, old_logp, None, jnp.ones(1), mask, **options)
    luspo, _ = grpo_loss(logp, old_logp, None, jnp.ones(1), mask, reduce=sequence_sum, **options)
    np.testing.assert_allclose(luspo, 4 * gspo, rtol=1e-12)


@pytest.mark.parametrize(
    "surrogate_fn",
    [
        clip_surrogate,
        cispo_surrogate,
        sapo_surrogate,
        geometric_mean_surrogate,
        vespo_surrogate,
        importance_surrogate,
        log_likelihood_surrogate,
        dppo_tv_surrogate,
        dppo_kl_surrogate,
        dro_surrogate,
    ],
)
def test_every_surrogate_has_the_policy_gradient_on_policy(surrogate_fn, example):
    """At pi = pi_old all descendants agree with REINFORCE, whatever their bounds."""
    logp, advantages, mask = arrays(example, "logp", "advantages", "mask")
    advantages = advantages[:, 0]

    def loss(x):
        return grpo_loss(x, logp, None, advantages, mask, surrogate_fn=surrogate_fn)[0]

    def reinforce(x):
        return reinforce_loss(x, logp, advantages, mask, reduce=sequence_mean)[0]

    np.testing.assert_allclose(jax.grad(loss)(logp), jax.grad(reinforce)(logp), rtol=0, atol=1e-12)


def binary_divergence(new, old, kind):
    if kind == "tv":
        return abs(new - old)
    return old * np.log(old / new) + (1 - old) * np.log((1 - old) / (1 - new))


@pytest.mark.parametrize(("surrogate_fn", "kind"), [(dppo_tv_surrogate, "tv"), (dppo_kl_surrogate, "kl")])
def test_dppo_masks_tokens_that_have_moved_too_far_the_way_they_are_pushed(surrogate_fn, kind, example):
    """Its gradient, against loops; bounds and the cap of the weight all act."""
    low, high, cap = (0.03, 0.05, 1.4) if kind == "tv" else (0.004, 0.008, 1.4)
    logp, old_logp, mask = (example[name] for name in ("logp", "old_logp", "mask"))
    old_logp = np.minimum(old_logp, -0.01)
    expected, held, capped = np.zeros((B, T)), 0, 0
    for b, t in np.argwhere(mask):
        new, old, advantage = np.exp(logp[b, t]), np.exp(old_logp[b, t]), example["advantages"][b, t]
        away = (new > old) if advantage > 0 else (new < old)
        if away and binary_divergence(new, old, kind) > (high if advantage > 0 else low):
            held += 1
            continue
        expected[b, t] = -min(new / old, cap) * advantage / mask.sum()
        capped += new / old > cap
    assert 0 < held < mask.sum()
    assert capped > 0
    options = {"epsilon_low": low, "epsilon_high": high, "reduce": token_mean}
    advantages = jnp.asarray(example["advantages"])

    def loss(x):
        surrogate = functools.partial(surrogate_fn, max_ratio=cap)
        dirty = (jnp.where(mask, y, jnp.nan) for y in (x, old_logp))
        return grpo_loss(*dirty, None, advantages, jnp.asarray(mask), surrogate_fn=surrogate, **options)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logp)), expected, rtol=0, atol=1e-6)


def test_dro_has_the_gradient_of_its_squared_error(example):
    """-(A - tau L)^2 / (2 tau) of each answer, L the sum of its log-ratios (Richemond et al. 2024)."""
    logp, old_logp, mask = (example[name] for name in ("logp", "old_logp", "mask"))
    advantages, tau = example["advantages"][:, 0], 0.7

    def squared_error(x):
        drift = np.where(mask, x - old_logp, 0).sum(axis=1)
        return np.mean((advantages - tau * drift) ** 2 / (2 * tau))

    def loss(x):
        surrogate = functools.partial(dro_surrogate, tau=tau)
        arrays = (x, jnp.asarray(old_logp), None, jnp.asarray(advantages), jnp.asarray(mask))
        return grpo_loss(*arrays, surrogate_fn=surrogate, reduce=sequence_sum)[0]

    found = jax.grad(loss)(jnp.asarray(logp))
    np.testing.assert_allclose(found, numerical_gradient(squared_error, logp), rtol=0, atol=1e-8)
    assert np.abs(found).max() > 0.1


def test_delta_is_the_dual_clip(example):
    options = {"epsilon_low": 0.1, "epsilon_high": 0.2}
    delta = functools.partial(clip_surrogate, delta=1.3)
    logp, old_logp, advantages, mask = arrays(example, *NAMES)
    one, _ = grpo_loss(
        logp, old_logp, None, advantages, mask, surrogate_fn=delta, reduce=token_mean, **options
    )
    other, _ = ppo_clip_loss(logp, old_logp, advantages, mask, dual_clip=1.3, **options)
    plain, _ = ppo_clip_loss(logp, old_logp, advantages, mask, **options)
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert plain > other


def test_grpo_without_its_extras_is_ppo(example):
    logp, old_logp, advantages, mask = arrays(example, *NAMES)
    one, _ = grpo_loss(logp, old_logp, None, advantages, mask, reduce=token_mean)
    np.testing.assert_allclose(one, ppo_clip_loss(logp, old_logp, advantages, mask)[0], rtol=1e-12)


def test_a_group_of_one_gives_no_gradient(example):
    advantages = kernels.group_relative_advantages(jnp.array([[3.0]] * B)).reshape(-1)
    loss, grad = value_and_grad_of(example, advantages=advantages)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)


def test_sapo_decays_on_both_sides_and_faster_for_negative_advantages():
    def weight(log_ratio, advantage):
        one = jnp.ones((1, 1))
        return jax.grad(
            lambda x: sapo_surrogate(x, x, advantage * one, one > 0, epsilon_low=0.2, epsilon_high=0.2).sum()
        )(log_ratio * one)[0, 0] / (advantage * jnp.exp(log_ratio))

    for advantage in (1.0, -1.0):
        np.testing.assert_allclose(weight(0.0, advantage), 1, rtol=1e-12)
        assert weight(1.0, advantage) < 1
        assert weight(-1.0, advantage) < 1
    assert weight(1.0, -1.0) < weight(1.0, 1.0)


def test_vespo_weight_peaks_where_its_formula_does():
    """phi(w) = w^k exp(lambda (1 - w)) at w = 1 is 1; its maximum is at w = k / lambda."""

    def phi(w, advantage):
        log_ratio = jnp.full((1, 1), jnp.log(w))
        args = (jnp.ones((1, 1)), log_ratio, jnp.full((1, 1), advantage), jnp.ones((1, 1), bool))
        return vespo_surrogate(*args, epsilon_low=0.2, epsilon_high=0.2)[0, 0] / advantage

    for advantage, k, decay in ((1.0, 2.0, 3.0), (-1.0, 3.0, 2.0)):
        for w in (0.3, 1.0, 2.5):
            np.testing.assert_allclose(phi(w, advantage), w**k * np.exp(decay * (1 - w)), rtol=1e-9)
        lowest = np.exp(decay + k * np.log(1e-8) - decay * 1e-8)
        np.testing.assert_allclose(phi(1e-12, advantage), lowest, rtol=1e-9, err_msg="clamped as in TRL")
        assert phi(k / decay, advantage) > max(
            phi(0.9 * k / decay, advantage), phi(1.1 * k / decay, advantage)
        )


# KL terms, by enumeration of a small vocabulary --------------------------------------------------------

VOCABULARY = np.random.default_rng(2).normal(size=(3, 5))


def expected_loss(loss_of_row, logits, old_logits):
    """E over actions of pi_old of a loss, each action a row of one token; the samples are held fixed."""
    logp, old_logp = jax.nn.log_softmax(logits), jax.nn.log_softmax(old_logits)
    probs = jax.lax.stop_gradient(jnp.exp(old_logp))
    each = jax.vmap(
        lambda action: loss_of_row(logp[action][None, None], old_logp[action][None, None], action)
    )
    return jnp.sum(probs * each(jnp.arange(len(logits))))


def expected_gradient_of_kl_term(kl_fn, correction, old_logits):
    logits, _, ref_logits = jnp.asarray(VOCABULARY)
    ref_logp = jax.nn.log_softmax(ref_logits)

    def loss_of_row(logp, old_logp, action):
        loss, _ = grpo_loss(
            logp,
            old_logp,
            ref_logp[action][None, None],
            jnp.zeros(1),
            jnp.ones((1, 1), bool),
            kl_coef=1.0,
            kl_fn=kl_fn,
            kl_ratio_correction=correction,
        )
        return loss

    return jax.grad(lambda x: expected_loss(loss_of_row, x, old_logits))(logits)


@pytest.mark.slow
def test_gradient_of_the_kl_term_with_and_without_ratio_correction():
    logits, old_logits, ref_logits = jnp.asarray(VOCABULARY)
    exact = jax.grad(kernels.reverse_kl)(logits, ref_logits)
    off_policy = functools.partial(expected_gradient_of_kl_term, old_logits=old_logits)
    for kl_fn in (kernels.k1, kernels.k3):
        np.testing.assert_allclose(off_policy(kl_fn, True), exact, rtol=0, atol=1e-12)
        assert jnp.linalg.norm(off_policy(kl_fn, False) - exact) > 0.1 * jnp.linalg.norm(exact)
    assert jnp.linalg.norm(off_policy(kernels.k2, True) - exact) > 0.1 * jnp.linalg.norm(exact)
    on_policy = functools.partial(expected_gradient_of_kl_term, old_logits=logits)
    np.testing.assert_allclose(on_policy(kernels.k2, False), exact, rtol=0, atol=1e-12)


def test_the_penalty_of_ppo_is_unbiased():
    """E over pi_old of the penalty is KL(pi_old || pi), and so is its gradient."""
    logits, old_logits, _ = jnp.asarray(VOCABULARY)

    def loss_of_row(logp, old_logp, action):
        del action
        return ppo_penalty_loss(logp, old_logp, jnp.zeros(1), jnp.ones((1, 1), bool), kl_coef=1.0)[0]

    value, grad = jax.value_and_grad(lambda x: expected_loss(loss_of_row, x, old_logits))(logits)
    exact, exact_grad = jax.value_and_grad(lambda x: kernels.reverse_kl(old_logits, x))(logits)
    np.testing.assert_allclose(value, exact, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grad, exact_grad, rtol=0, atol=1e-12)


def test_bounded_exp_is_exp_then_its_tangent():
    x = jnp.array([-1e4, -1.0, 0.0, 19.9])
    np.testing.assert_array_equal(bounded_exp(x), jnp.exp(x))
    slope = jax.vmap(jax.grad(bounded_exp))(jnp.array([21.0, 1e4]))
    np.testing.assert_allclose(slope, np.exp(20.0), rtol=1e-12)


# Weights, KL and entropy in the composition -------------------------------------------------------------


def test_weights_multiply_the_surrogate(example):
    """So does scaling the advantages by them, because the clipped surrogate is homogeneous."""
    weights = np.random.default_rng(6).uniform(0, 2, (B, T))
    dirty = jnp.asarray(np.where(example["mask"], weights, np.nan))
    one = value_and_grad_of(example, weights=dirty, kl_coef=0.1)
    assert_equal(one, value_and_grad_of(example, advantages=weights * example["advantages"], kl_coef=0.1))


def test_weights_of_zero_leave_the_kl_and_the_denominator(example):
    nothing = jnp.zeros((B, T))
    loss, grad = value_and_grad_of(example, weights=nothing, kl_coef=0.1)
    logp, ref_logp, mask = arrays(example, "logp", "ref_logp", "mask")
    only_kl = jax.value_and_grad(lambda x: 0.1 * sequence_mean(kernels.k3(x, ref_logp), mask))
    assert_equal((loss, grad), only_kl(logp))


def test_the_entropy_bonus_raises_entropy(example):
    logp, old_logp, advantages, mask = arrays(example, *NAMES)
    entropy = jnp.ones((B, T))

    def loss(x):
        return grpo_loss(logp, old_logp, None, advantages, mask, entropy=x, entropy_coef=0.5)[0]

    grad = jax.grad(loss)(entropy)
    np.testing.assert_allclose(grad.sum(), -0.5, rtol=1e-12)
    assert (grad[~mask] == 0).all()
