"""The laws of reductions: a weighted sum over a denominator that adds up over parts of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.losses.reductions import (
    constant_length,
    packed_sequence_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)

B, T = 4, 5
REDUCTIONS = {
    "token": token_mean,
    "sequence": sequence_mean,
    "constant": constant_length(7),
    "sum": sequence_sum,
}
laws = settings(max_examples=25, deadline=None)
masks = st.lists(st.booleans(), min_size=B * T, max_size=B * T).map(lambda bits: np.reshape(bits, (B, T)))


def values_of(seed):
    return np.random.default_rng(seed).normal(size=(B, T))


def loop(name, values, mask):
    """Each reduction as a loop over rows."""
    rows = [values[b][mask[b]] for b in range(B) if mask[b].any()]
    if not rows:
        return 0.0
    if name == "token":
        return np.concatenate(rows).mean()
    if name == "sequence":
        return np.mean([row.mean() for row in rows])
    return sum(row.sum() for row in rows) / (len(rows) * (7 if name == "constant" else 1))


@laws
@given(seed=st.integers(0, 99), mask=masks)
def test_loops_over_rows_agree(seed, mask):
    values = values_of(seed)
    with jax.enable_x64(True):
        for name, reduce in REDUCTIONS.items():
            found = reduce(jnp.asarray(np.where(mask, values, np.nan)), jnp.asarray(mask))
            np.testing.assert_allclose(found, loop(name, values, mask), rtol=0, atol=1e-12, err_msg=name)


@laws
@given(seed=st.integers(0, 99), mask=masks, cut=st.integers(1, B - 1))
def test_parts_over_the_whole_denominator_sum_to_the_whole(seed, mask, cut):
    with jax.enable_x64(True):
        values, mask = jnp.asarray(values_of(seed)), jnp.asarray(mask)
        for name, reduce in REDUCTIONS.items():
            total = reduce.total(mask)
            parts = [
                jax.value_and_grad(lambda v, m=m, r=reduce, t=total: r(v, m, denominator=t))(v)
                for v, m in ((values[:cut], mask[:cut]), (values[cut:], mask[cut:]))
            ]
            whole, gradient = jax.value_and_grad(reduce)(values, mask)
            np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=0, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(
                np.concatenate([p[1] for p in parts]), gradient, rtol=0, atol=1e-12, err_msg=name
            )
            np.testing.assert_allclose(
                reduce.total(mask[:cut]) + reduce.total(mask[cut:]), total, err_msg=name
            )


@pytest.mark.parametrize("dirt", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_masked_entries_reach_neither_value_nor_gradient(name, dirt):
    mask = jnp.array([[True, False] + [False] * 3, [True] * 5, [False] * 5, [False, True] * 2 + [False]])
    values = jnp.asarray(values_of(0), jnp.float32)
    clean, gradient = jax.value_and_grad(REDUCTIONS[name])(values, mask)
    dirty, dirty_gradient = jax.value_and_grad(REDUCTIONS[name])(jnp.where(mask, values, dirt), mask)
    assert float(clean) == float(dirty) != 0
    np.testing.assert_array_equal(dirty_gradient, gradient)
    np.testing.assert_array_equal(np.asarray(gradient)[~np.asarray(mask)], 0)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_nothing_unmasked_is_zero_with_no_gradient(name):
    value, gradient = jax.value_and_grad(REDUCTIONS[name])(jnp.full((B, T), jnp.nan), jnp.zeros((B, T), bool))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_sequence_and_token_means_agree_where_lengths_are_equal_and_constant_length_scales():
    values, full = jnp.asarray(values_of(1), jnp.float32), jnp.ones((B, T), bool)
    expected = token_mean(values, full)
    np.testing.assert_allclose(sequence_mean(values, full), expected, rtol=1e-6)
    np.testing.assert_allclose(constant_length(T)(values, full), expected, rtol=1e-6)
    assert constant_length(9) is constant_length(9)  # one object, so that a jit on it compiles once


def test_weight_of_a_token_under_constant_length_does_not_depend_on_its_row():
    mask = jnp.arange(T) < jnp.array([1, 2, 4, 5])[:, None]
    gradient = jax.grad(lambda v: constant_length(7)(v, mask))(jnp.zeros((B, T)))
    np.testing.assert_allclose(gradient, mask / (7 * B), rtol=1e-6)


def test_packed_rows_have_the_mean_of_their_samples():
    """Samples of 3, 2, 1 and 4 tokens, one of which has no token that counts."""
    values = values_of(2)
    segments = jnp.array([[1, 1, 1, 2, 2], [1, 2, 2, 2, 2], [0, 0, 1, 1, 0]])
    mask = jnp.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 0, 1]], bool) & (segments > 0)
    dirty = jnp.where(mask, values[:3], jnp.nan)
    means = [
        values[row][np.asarray(mask[row]) & (np.asarray(segments[row]) == segment)].mean()
        for row, segment in ((0, 1), (0, 2), (1, 2), (2, 1))
    ]
    reduce = packed_sequence_mean(segments, 2)
    assert float(reduce.total(mask)) == 4
    np.testing.assert_allclose(reduce(dirty, mask), np.mean(means), rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(reduce.weights(mask), axis=1), [2, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bfloat16_counts_as_float32_does(name):
    """257 rows of 3 tokens: in bfloat16 neither 257 nor 771 is a number."""
    mask = jnp.ones((257, 3), bool)
    value = REDUCTIONS[name](jnp.ones((257, 3), jnp.bfloat16), mask)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, {"constant": 3 / 7, "sum": 3.0}.get(name, 1.0), rtol=1e-6)
    gradient = jax.grad(REDUCTIONS[name])(jnp.ones((257, 3), jnp.bfloat16), mask)
    assert gradient.dtype == jnp.bfloat16
