"""Distillation: naive oracles, limits, and sampled forms against exact enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax import losses

RNG = np.random.default_rng(0)
LOGITS = 1.5 * RNG.standard_normal((2, 3, 4, 5))
STUDENT, TEACHER = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
MASK = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], bool)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def js(student: np.ndarray, teacher: np.ndarray, beta: float) -> float:
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


jitted = functools.partial(jax.jit, static_argnames="reduce")
DIVERGENCES = {
    "forward_kl": (jitted(losses.forward_kl_loss), lambda s, t: kl(t, s)),
    "reverse_kl": (jitted(losses.reverse_kl_loss), lambda s, t: kl(s, t)),
    "js_0.3": (jitted(functools.partial(losses.generalized_js_loss, beta=0.3)), lambda s, t: js(s, t, 0.3)),
}
EACH = pytest.mark.parametrize("name", DIVERGENCES)


@EACH
def test_divergence_matches_the_naive_loop_under_nan(name: str) -> None:
    loss, oracle = DIVERGENCES[name]
    expected = np.mean(
        [oracle(np.exp(s), np.exp(t)) for s, t in zip(STUDENT[MASK], TEACHER[MASK], strict=True)]
    )
    with jax.enable_x64(True):
        mask = jnp.asarray(MASK)
        student, teacher = (jnp.asarray(np.where(MASK[..., None], x, np.nan)) for x in (STUDENT, TEACHER))
        (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(student, teacher, mask)
        check_grads(
            lambda x: loss(x, jnp.asarray(TEACHER), mask)[0], (jnp.asarray(STUDENT),), order=1, modes=["rev"]
        )
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert float(metrics["loss"]) == float(value)
    np.testing.assert_array_equal(grad[~MASK], 0)
    assert np.isfinite(grad).all()


@EACH
def test_divergence_of_equals_is_zero_and_teacher_has_no_gradient(name: str) -> None:
    loss, _ = DIVERGENCES[name]
    student, mask = jnp.asarray(STUDENT), jnp.asarray(MASK)
    assert float(loss(student, student, mask)[0]) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda t: loss(student, t, mask)[0])(jnp.asarray(TEACHER)), 0)


@EACH
def test_divergence_in_micro_batches(name: str) -> None:
    loss, _ = DIVERGENCES[name]
    student, teacher, mask = jnp.asarray(STUDENT), jnp.asarray(TEACHER), jnp.asarray(MASK)
    for reduce in (losses.token_mean, losses.sequence_mean):
        total = reduce.total(mask)
        parts = [
            loss(student[s], teacher[s], mask[s], reduce=reduce, denominator=total)[0]
            for s in (slice(0, 1), slice(1, 3))
        ]
        whole = loss(student, teacher, mask, reduce=reduce)[0]
        assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-6)


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_divergence_stays_finite_where_tokens_are_ruled_out(name: str, dtype) -> None:
    loss, _ = DIVERGENCES[name]
    student = jax.nn.log_softmax(jnp.array([[[0.0, 1e4, -1e4], [0.0, 0.0, -jnp.inf]]])).astype(dtype)
    teacher = jax.nn.log_softmax(jnp.array([[[1e4, 0.0, -jnp.inf], [-jnp.inf, 0.0, 0.0]]])).astype(dtype)
    value, grad = jax.value_and_grad(lambda x: loss(x, teacher, jnp.ones((1, 2), bool))[0])(student)
    assert value.dtype == jnp.float32
    assert math.isfinite(float(value))
    assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_generalized_js_tends_to_both_kls_and_may_be_traced() -> None:
    with jax.enable_x64(True):
        student, teacher, mask = jnp.asarray(STUDENT), jnp.asarray(TEACHER), jnp.asarray(MASK)
        betas = jnp.array([1e-5, 0.5, 1 - 1e-5])
        low, middle, high = jax.jit(
            jax.vmap(lambda beta: losses.generalized_js_loss(student, teacher, mask, beta=beta)[0])
        )(betas)
        forward, reverse = (
            f(student, teacher, mask)[0] for f in (losses.forward_kl_loss, losses.reverse_kl_loss)
        )
        swapped = losses.generalized_js_loss(teacher, student, mask, beta=0.5)[0]
    assert float(low) / 1e-5 == pytest.approx(float(forward), rel=1e-3)
    assert float(high) / 1e-5 == pytest.approx(float(reverse), rel=1e-3)
    assert float(middle) == pytest.approx(float(swapped), rel=1e-12)


def test_top_k_is_a_lower_bound_that_is_exact_with_every_token() -> None:
    with jax.enable_x64(True):
        student, teacher, mask = jnp.asarray(STUDENT), jnp.asarray(TEACHER), jnp.asarray(MASK)
        full = losses.forward_kl_loss(student, teacher, mask)[0]
        bounds = []
        for k in range(1, 6):
            token_ids = jnp.argsort(-teacher, axis=-1)[..., :k]
            top = jnp.take_along_axis(teacher, token_ids, axis=-1)
            student_top = jnp.take_along_axis(student, token_ids, axis=-1)
            pair = losses.top_k_distributions(student_top, top, mask)
            np.testing.assert_allclose(np.exp(pair[0][MASK]).sum(-1), 1, rtol=1e-9)
            bounds.append(float(losses.forward_kl_loss(*pair, mask)[0]))
    assert (np.diff(bounds) >= -1e-12).all()
    assert bounds[0] < bounds[3]
    # With four of five tokens the rest is the fifth, and with all five there is no rest.
    assert bounds[3] == pytest.approx(float(full), rel=1e-12)
    assert bounds[4] == pytest.approx(float(full), rel=1e-9)


def test_top_k_ignores_masked_tokens() -> None:
    student, teacher = (
        jnp.asarray(np.where(MASK[..., None], x[..., [0, 2]], np.nan)) for x in (STUDENT, TEACHER)
    )
    mask = jnp.asarray(MASK)

    def value(x):
        return losses.reverse_kl_loss(*losses.top_k_distributions(x, teacher, mask), mask)[0]

    loss, grad = jax.value_and_grad(value)(student)
    assert math.isfinite(float(loss))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[~MASK], 0)


# Temperature and hard labels


def test_temperature_divides_logits() -> None:
    with jax.enable_x64(True):
        found = losses.at_temperature(
            jnp.asarray(np.where(MASK[..., None], STUDENT, np.nan)), jnp.asarray(MASK), temperature=2.5
        )
    for place in zip(*np.nonzero(MASK), strict=True):
        weights = [math.exp(z / 2.5) for z in LOGITS[0][place]]
        np.testing.assert_allclose(np.exp(found[place]), np.array(weights) / sum(weights), rtol=1e-12)


def test_at_high_temperature_the_gradient_matches_logits() -> None:
    """Hinton et al. 2015, eq. 4: T^2 dC/dz_i -> (z_i - v_i) / N, for logits of mean zero."""
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x - x.mean(-1, keepdims=True)) for x in (STUDENT, TEACHER))
        mask, temperature = jnp.asarray(MASK), 1e4

        def loss(logits):
            pair = [losses.at_temperature(x, mask, temperature=temperature) for x in (logits, teacher)]
            soft, _ = losses.forward_kl_loss(*pair, mask)
            return losses.with_hard_labels(soft, jnp.zeros(MASK.shape), mask, temperature=temperature)[0]

        grad = np.asarray(jax.grad(loss)(student)) * MASK.sum()
        expected = np.asarray(student - teacher) / 5
    np.testing.assert_allclose(grad[MASK], expected[MASK], atol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hard_labels_are_averaged_in_under_nan_and_in_parts(weight: float) -> None:
    labels = STUDENT[..., 1]
    soft = [0.7, 0.2]
    expected = (1 - weight) * 4 * 0.9 - weight * float(np.mean(labels[MASK]))
    dirty, mask = jnp.asarray(np.where(MASK, labels, np.nan)), jnp.asarray(MASK)
    total = losses.token_mean.total(mask)
    parts = [
        losses.with_hard_labels(
            jnp.float32(part), dirty[s], mask[s], temperature=2.0, hard_label_weight=weight, denominator=total
        )[0]
        for part, s in zip(soft, (slice(0, 1), slice(1, 3)), strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-6)
    grad = jax.grad(
        lambda x: losses.with_hard_labels(jnp.float32(0.9), x, mask, hard_label_weight=weight)[0]
    )(dirty)
    np.testing.assert_allclose(grad, np.where(MASK, -weight / MASK.sum(), 0), rtol=1e-6)


# Exact enumeration: sequences of two tokens over a vocabulary of three. The logits are [1 + 3, 3]: of the
# first token, and of the second given the first.


def sequence_logps(logits: jax.Array) -> jax.Array:
    """[9, 2]: log-probabilities of both tokens in each of the nine sequences."""
    logp = jax.nn.log_softmax(logits)
    return jnp.stack(
        [jnp.stack([logp[0, a], logp[1 + a, b]]) for a, b in itertools.product(range(3), repeat=2)]
    )


def sequence_kl(p: jax.Array, q: jax.Array) -> jax.Array:
    log_p, log_q = jnp.sum(sequence_logps(p), axis=1), jnp.sum(sequence_logps(q), axis=1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


@pytest.mark.parametrize("name", ["sampled_forward_kl_loss", "sequence_reverse_kl_loss"])
def test_sampled_loss_is_unbiased_for_the_sequence_kl(name: str) -> None:
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(RNG.standard_normal((4, 3))) for _ in "st")
        forward = name == "sampled_forward_kl_loss"
        probabilities = jnp.exp(jnp.sum(sequence_logps(teacher if forward else student), axis=1))

        def expected_loss(logits):
            rows = sequence_logps(logits)
            each = [
                getattr(losses, name)(
                    rows[i : i + 1],
                    sequence_logps(teacher)[i : i + 1],
                    jnp.ones((1, 2), bool),
                    reduce=losses.constant_length(1),
                )[0]
                for i in range(9)
            ]
            return jnp.sum(probabilities * jnp.stack(each))

        def exact(logits):
            return sequence_kl(teacher, logits) if forward else sequence_kl(logits, teacher)

        value, grad = jax.value_and_grad(expected_loss)(student)
        exact_value, exact_grad = jax.value_and_grad(exact)(student)
    assert float(value) == pytest.approx(float(exact_value), rel=1e-12)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-10, atol=1e-14)


def test_sampled_reverse_kl_is_unbiased_for_the_kl_of_one_token() -> None:
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(RNG.standard_normal(5)) for _ in "st")
        teacher_logp = jax.nn.log_softmax(teacher)
        probabilities = jax.nn.softmax(student)

        def expected_loss(logits):
            each = [
                losses.sampled_reverse_kl_loss(
                    jax.nn.log_softmax(logits)[None, v : v + 1],
                    teacher_logp[None, v : v + 1],
                    jnp.ones((1, 1), bool),
                )[0]
                for v in range(5)
            ]
            return jnp.sum(probabilities * jnp.stack(each))

        def exact(logits):
            logp = jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(logp) * (logp - teacher_logp))

        value, grad = jax.value_and_grad(expected_loss)(student)
        exact_value, exact_grad = jax.value_and_grad(exact)(student)
    assert float(value) == pytest.approx(float(exact_value), rel=1e-12)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "loss", [losses.sampled_forward_kl_loss, losses.sampled_reverse_kl_loss, losses.sequence_reverse_kl_loss]
)
def test_sampled_losses_skip_masked_tokens(loss) -> None:
    student, teacher, mask = STUDENT[..., 0], TEACHER[..., 0], jnp.asarray(MASK)
    poisoned = [jnp.asarray(np.where(MASK, x, np.nan)) for x in (student, teacher)]
    value, grad = jax.value_and_grad(lambda s: loss(s, poisoned[1], mask)[0])(poisoned[0])
    sign = 1 if loss is losses.sampled_forward_kl_loss else -1
    assert float(value) == pytest.approx(float(np.mean(sign * (teacher - student)[MASK])), rel=1e-5)
    np.testing.assert_array_equal(grad[~MASK], 0)
    assert np.isfinite(grad).all()
