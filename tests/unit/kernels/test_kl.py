"""KL estimators by enumeration of a small vocabulary, and exact divergences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax import kernels

RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS = RNG.normal(size=(2, 6))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def expected_value(estimator, logits, ref_logits):
    """E_{a ~ pi} of the estimate: exact, because the sum runs over every action."""
    logp, ref_logp = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    return jnp.sum(jnp.exp(logp) * estimator(logp, ref_logp))


def expected_gradient(estimator, logits, ref_logits):
    """E_{a ~ pi} of the gradient through log pi(a), the sample held fixed: what training on it does."""
    probs = jax.lax.stop_gradient(jax.nn.softmax(logits))

    def sampled_loss(x):
        return jnp.sum(probs * estimator(jax.nn.log_softmax(x), jax.nn.log_softmax(ref_logits)))

    return jax.grad(sampled_loss)(logits)


def test_value_bias():
    logits, ref_logits = jnp.asarray(LOGITS), jnp.asarray(REF_LOGITS)
    exact = kernels.reverse_kl(logits, ref_logits)
    np.testing.assert_allclose(expected_value(kernels.k1, logits, ref_logits), exact, atol=1e-12)
    np.testing.assert_allclose(expected_value(kernels.k3, logits, ref_logits), exact, atol=1e-12)
    assert abs(expected_value(kernels.k2, logits, ref_logits) - exact) > 0.05 * exact


def test_gradient_bias():
    logits, ref_logits = jnp.asarray(LOGITS), jnp.asarray(REF_LOGITS)
    reverse = jax.grad(kernels.reverse_kl)(logits, ref_logits)
    forward = jax.grad(kernels.forward_kl)(logits, ref_logits)
    np.testing.assert_allclose(expected_gradient(kernels.k1, logits, ref_logits), 0, atol=1e-12)
    np.testing.assert_allclose(expected_gradient(kernels.k2, logits, ref_logits), reverse, atol=1e-12)
    np.testing.assert_allclose(expected_gradient(kernels.k3, logits, ref_logits), forward, atol=1e-12)
    assert jnp.linalg.norm(forward - reverse) > 0.05 * jnp.linalg.norm(reverse)


@pytest.mark.parametrize("estimator", [kernels.k2, kernels.k3])
def test_bias_vanishes_as_the_policies_approach(estimator):
    """Second order: the relative errors of k2's value and of k3's gradient halve with the distance."""
    logits = jnp.asarray(LOGITS)
    errors = []
    for step in (0.02, 0.01):
        ref_logits = logits + step * jnp.asarray(REF_LOGITS)
        exact_gradient = jax.grad(kernels.reverse_kl)(logits, ref_logits)
        exact = kernels.reverse_kl(logits, ref_logits)
        value_error = abs(expected_value(estimator, logits, ref_logits) / exact - 1)
        difference = expected_gradient(estimator, logits, ref_logits) - exact_gradient
        errors.append(value_error + jnp.linalg.norm(difference) / jnp.linalg.norm(exact_gradient))
    assert errors[0] < 0.05
    np.testing.assert_allclose(errors[1] / errors[0], 0.5, atol=0.05)


def test_k3_has_less_variance_than_k1_and_neither_k2_nor_k3_is_negative():
    logp, ref_logp = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(LOGITS + 0.2 * REF_LOGITS)
    probs = jnp.exp(logp)

    def variance(x):
        return jnp.sum(probs * x**2) - jnp.sum(probs * x) ** 2

    assert variance(kernels.k3(logp, ref_logp)) < 0.1 * variance(kernels.k1(logp, ref_logp))
    assert (kernels.k2(logp, ref_logp) >= 0).all()
    assert (kernels.k3(logp, ref_logp) >= 0).all()


def test_k3_is_precise_near_zero_and_finite_far_away():
    gap = 1e-4
    with jax.enable_x64(False):
        near = kernels.k3(jnp.float32(0), jnp.float32(gap))
        far = jnp.array([-1e4, 1e4, 0.0], jnp.float32)
        value, grad = jax.value_and_grad(lambda x: jnp.sum(kernels.k3(x, jnp.zeros_like(x))))(far)
    np.testing.assert_allclose(near, np.expm1(gap) - gap, rtol=1e-2)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()
    assert (jnp.sign(grad) == jnp.array([-1, 1, 0])).all(), "descent leads back to the reference"


def test_exact_divergences_match_naive_sums():
    p, q = (np.exp(x) / np.exp(x).sum() for x in (LOGITS, REF_LOGITS))
    logits, ref_logits = jnp.asarray(LOGITS), jnp.asarray(REF_LOGITS)

    def kl(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))

    m = 0.3 * p + 0.7 * q
    expected = {
        "entropy": (kernels.entropy(logits), -sum(x * np.log(x) for x in p)),
        "reverse": (kernels.reverse_kl(logits, ref_logits), kl(p, q)),
        "forward": (kernels.forward_kl(logits, ref_logits), kl(q, p)),
        "js": (
            kernels.jensen_shannon(logits, ref_logits, mixture=0.3),
            0.3 * kl(p, m) + 0.7 * kl(q, m),
        ),
    }
    for name, (result, value) in expected.items():
        np.testing.assert_allclose(result, value, rtol=0, atol=1e-12, err_msg=name)


def test_exact_divergences_have_the_right_gradients():
    arguments = (jnp.asarray(LOGITS), jnp.asarray(REF_LOGITS))
    for divergence in (kernels.reverse_kl, kernels.forward_kl, kernels.jensen_shannon):
        check_grads(divergence, arguments, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_impossible_tokens_count_nothing_in_value_and_gradient():
    logits = jnp.array([0.0, 1.0, -jnp.inf, -jnp.inf])
    ref_logits = jnp.array([0.5, 0.0, -jnp.inf, 1.0])
    short = (jnp.array([0.0, 1.0, -800.0]), jnp.array([0.5, 0.0, 1.0]))
    np.testing.assert_allclose(kernels.entropy(logits), kernels.entropy(logits[:2]), atol=1e-12)
    np.testing.assert_allclose(kernels.reverse_kl(logits, ref_logits), kernels.reverse_kl(*short), atol=1e-12)
    np.testing.assert_allclose(
        kernels.jensen_shannon(logits, ref_logits), kernels.jensen_shannon(*short), atol=1e-12
    )
    assert kernels.forward_kl(logits, ref_logits) == jnp.inf
    for divergence in (kernels.reverse_kl, kernels.jensen_shannon):
        for argument in (0, 1):
            assert jnp.isfinite(jax.grad(divergence, argnums=argument)(logits, ref_logits)).all()


def test_jensen_shannon_is_symmetric_and_bounded():
    a, b = jnp.array([1e3, 0.0]), jnp.array([0.0, 1e3])
    np.testing.assert_allclose(kernels.jensen_shannon(a, b), np.log(2), atol=1e-12)
    x, y = jnp.asarray(LOGITS), jnp.asarray(REF_LOGITS)
    np.testing.assert_allclose(kernels.jensen_shannon(x, y), kernels.jensen_shannon(y, x), atol=1e-12)
