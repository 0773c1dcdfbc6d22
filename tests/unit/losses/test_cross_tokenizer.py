"""Losses of a teacher with another tokenizer: naive loops, one vocabulary, renamed vocabularies."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tiers import few

from rlhf_jax import losses
from rlhf_jax.core.errors import UserError

RNG = np.random.default_rng(3)
V, W, T, U = 5, 7, 4, 6


def distributions(rows, columns, width):
    logits = 1.5 * RNG.standard_normal((rows, columns, width))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


STUDENT, TEACHER = distributions(2, T, V), distributions(2, T, W)
MASK = np.array([[1, 1, 0, 1], [0, 1, 0, 0]], bool)
STUDENT_IDS, TEACHER_IDS = np.array([0, 3, 4]), np.array([6, 1, 2])


def sorted_distance(p, q):
    p, q = sorted(p, reverse=True), sorted(q, reverse=True)
    longest = max(len(p), len(q))
    p, q = p + [0.0] * (longest - len(p)), q + [0.0] * (longest - len(q))
    return sum(abs(a - b) for a, b in zip(p, q, strict=True))


def half_js(p, q):
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kls = [sum(a * math.log(a / m) for a, m in zip(side, middle, strict=True)) for side in (p, q)]
    return sum(kls) / 2


def forward_kl(p, q):
    return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


def naive_gold(student, teacher, weight, divergence):
    p, q = np.exp(student).tolist(), np.exp(teacher).tolist()
    matched = divergence([p[i] for i in STUDENT_IDS], [q[i] for i in TEACHER_IDS])
    own = [p[i] for i in range(V) if i not in STUDENT_IDS]
    theirs = [q[i] for i in range(W) if i not in TEACHER_IDS]
    return weight * matched + (1 - weight) * sorted_distance(own, theirs)


GOLD = functools.partial(losses.gold_loss, student_ids=STUDENT_IDS, teacher_ids=TEACHER_IDS)
LOSSES = {
    "uld": (losses.uld_loss, lambda s, t: sorted_distance(np.exp(s).tolist(), np.exp(t).tolist())),
    "gold": (GOLD, lambda s, t: naive_gold(s, t, 3 / 7, half_js)),
    "gold_kl": (
        functools.partial(GOLD, matched_weight=0.8, divergence_fn=losses.forward_kl_loss),
        lambda s, t: naive_gold(s, t, 0.8, forward_kl),
    ),
}
EACH = pytest.mark.parametrize("name", few(LOSSES, "gold"))


@EACH
def test_the_loss_is_the_naive_loop_under_nan(name):
    loss, oracle = LOSSES[name]
    expected = np.mean([oracle(s, t) for s, t in zip(STUDENT[MASK], TEACHER[MASK], strict=True)])
    with jax.enable_x64(True):
        mask = jnp.asarray(MASK)
        student, teacher = (jnp.asarray(np.where(MASK[..., None], x, np.nan)) for x in (STUDENT, TEACHER))
        (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(student, teacher, mask)
        held = jax.grad(lambda x: loss(student, x, mask)[0])(teacher)
        check_grads(
            lambda x: loss(x, jnp.asarray(TEACHER), mask)[0], (jnp.asarray(STUDENT),), order=1, modes=["rev"]
        )
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert float(metrics["loss"]) == float(value)
    np.testing.assert_array_equal(held, 0)
    np.testing.assert_array_equal(grad[~MASK], 0)
    assert np.isfinite(grad).all()


@EACH
def test_parts_of_a_batch_add_up(name):
    loss, _ = LOSSES[name]
    student, teacher, mask = map(jnp.asarray, (STUDENT, TEACHER, MASK))
    parts = [loss(student[i], teacher[i], mask[i], denominator=4)[0] for i in (slice(0, 1), slice(1, 2))]
    assert float(loss(student, teacher, mask)[0]) == pytest.approx(float(sum(parts)), rel=1e-6)


def test_uld_does_not_know_the_names_of_tokens():
    student, teacher, mask = map(jnp.asarray, (STUDENT, TEACHER, MASK))
    found, _ = losses.uld_loss(student[..., RNG.permutation(V)], teacher[..., RNG.permutation(W)], mask)
    assert float(found) == pytest.approx(float(losses.uld_loss(student, teacher, mask)[0]), rel=1e-6)
    assert float(losses.uld_loss(teacher[..., ::-1], teacher, mask)[0]) == 0
    other = distributions(2, T, W)
    assert float(losses.uld_loss(jnp.asarray(other), teacher, mask)[0]) > 0.01


def test_gold_knows_them_whatever_their_numbers_are():
    """Both vocabularies renumbered, and the ids with them."""
    student, teacher, mask = map(jnp.asarray, (STUDENT, TEACHER, MASK))
    new_s, new_t = RNG.permutation(V), RNG.permutation(W)
    ids = np.argsort(new_s)[STUDENT_IDS], np.argsort(new_t)[TEACHER_IDS]
    found, _ = losses.gold_loss(
        student[..., new_s], teacher[..., new_t], mask, student_ids=ids[0], teacher_ids=ids[1]
    )
    expected, metrics = GOLD(student, teacher, mask)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    crossed, _ = GOLD(student[..., [3, 1, 2, 0, 4]], teacher, mask)
    assert abs(float(crossed) - float(expected)) > 1e-3
    parts = 3 / 7 * metrics["matched_loss"] + 4 / 7 * metrics["unmatched_loss"]
    assert float(parts) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "divergence", [losses.forward_kl_loss, losses.reverse_kl_loss, losses.generalized_js_loss]
)
def test_gold_of_one_vocabulary_is_its_divergence(divergence):
    teacher, student, mask = map(jnp.asarray, (TEACHER, distributions(2, T, W), MASK))
    every = np.arange(W)
    found = jax.value_and_grad(
        lambda x: losses.gold_loss(
            x, teacher, mask, student_ids=every, teacher_ids=every, divergence_fn=divergence
        )[0]
    )(student)
    expected = jax.value_and_grad(lambda x: divergence(x, teacher, mask)[0])(student)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gold_without_a_token_in_common_is_refused():
    none = np.zeros(0, int)
    with pytest.raises(UserError, match="take uld_loss"):
        losses.gold_loss(*map(jnp.asarray, (STUDENT, TEACHER, MASK)), student_ids=none, teacher_ids=none)


# Spans -----------------------------------------------------------------------------------------------

TOKENS = np.array([[1, 0, 6, 3, 2, 5], [4, 4, 1, 0, 2, 2]])
# In columns of the student, of which there are four: the teacher's spans are 1 + 2 and 1 + 3 tokens long.
SPANS = np.array([[-1, 1, 2, 2, -1, -1], [0, 3, 3, 3, -1, -1]])


def test_spans_are_merged_by_the_chain_rule_under_nan():
    logp = distributions(2, U, W)
    there = np.where((SPANS >= 0)[..., None], logp, np.nan)

    def merged(x):
        return losses.merge_spans(x, jnp.asarray(TOKENS), jnp.asarray(SPANS), length=T)

    expected = {
        (0, 1): logp[0, 1],
        (0, 2): logp[0, 2] + logp[0, 3, 3],
        (1, 0): logp[1, 0],
        (1, 3): logp[1, 1] + logp[1, 2, 1] + logp[1, 3, 0],
    }
    found = merged(jnp.asarray(there))
    for (row, column), values in expected.items():
        np.testing.assert_allclose(found[row, column], values, rtol=1e-5, atol=1e-5)
    starts = np.zeros((2, T), bool)
    starts[tuple(zip(*expected, strict=True))] = True

    def total(x):
        return jnp.sum(jnp.where(starts[..., None], merged(x), 0))

    grad = np.zeros((2, U, W))
    for row, first in ((0, 1), (0, 2), (1, 0), (1, 1)):
        grad[row, first] += 1
    for row, later in ((0, 3), (1, 2), (1, 3)):
        grad[row, later, TOKENS[row, later]] += W
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(there)), grad, rtol=1e-6)


def test_spans_of_one_token_change_nothing():
    logp = jnp.asarray(distributions(2, T, V), jnp.float32)
    spans = jnp.where(MASK, jnp.arange(T), -1)
    merged = losses.merge_spans(logp, jnp.zeros((2, T), int), spans, length=T)
    np.testing.assert_array_equal(merged[MASK], logp[MASK])
    np.testing.assert_array_equal(losses.span_starts(spans), MASK)
