import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax import kernels

VALUES = np.random.default_rng(0).normal(3, 5, (3, 7))
MASK = np.random.default_rng(1).random((3, 7)) > 0.4
DIRTY = np.where(MASK, VALUES, np.nan)


def test_whitened_values_have_mean_0_and_variance_1():
    with jax.enable_x64(True):
        whitened = np.asarray(kernels.whiten(jnp.asarray(DIRTY), jnp.asarray(MASK)))
        scaled = kernels.whiten(jnp.asarray(DIRTY), jnp.asarray(MASK), shift_mean=False)
    np.testing.assert_allclose(whitened[MASK].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(whitened[MASK].std(), 1, atol=1e-8)
    np.testing.assert_array_equal(whitened[~MASK], 0)
    np.testing.assert_allclose(scaled, np.where(MASK, whitened + VALUES[MASK].mean(), 0), atol=1e-12)


def test_whitening_is_exact_far_from_zero():
    """One-pass variances lose everything here: the mean is 1e4 standard deviations away."""
    values = jnp.asarray(np.random.default_rng(2).normal(1e4, 1, (1, 1000)), jnp.float32)
    whitened = kernels.whiten(values, jnp.ones(values.shape, bool))
    np.testing.assert_allclose(whitened.std(), 1, atol=1e-4)


def test_nothing_to_whiten_and_equal_values_give_zero():
    assert (kernels.whiten(jnp.full((2, 2), jnp.nan), jnp.zeros((2, 2), bool)) == 0).all()
    assert (kernels.whiten(jnp.full((2, 2), 5.0), jnp.ones((2, 2), bool)) == 0).all()
    assert kernels.whiten(jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 2), bool)).dtype == jnp.float32


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 21), max_size=4))
def test_merging_any_split_gives_the_moments_of_the_whole(cuts):
    bounds = [0, *sorted(cuts), 21]
    with jax.enable_x64(True):
        values, mask = jnp.asarray(DIRTY.ravel()), jnp.asarray(MASK.ravel())
        padded = [
            kernels.batch_moments(values, mask & (jnp.arange(21) >= low) & (jnp.arange(21) < high))
            for low, high in itertools.pairwise(bounds)
        ]
        moments = functools.reduce(kernels.merge_moments, padded, kernels.init_moments())
        variance = kernels.moments_variance(moments)
    np.testing.assert_array_equal(moments.count, MASK.sum())
    np.testing.assert_allclose(moments.mean, VALUES[MASK].mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(variance, VALUES[MASK].var(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e25])
def test_moments_take_no_batch_that_would_spoil_them(bad):
    mask = jnp.ones((1, 7), bool)
    good = kernels.add_to_moments(kernels.init_moments(), jnp.float32(VALUES[:1]), mask)
    np.testing.assert_allclose(good.mean, VALUES[0].mean(), rtol=1e-6)
    after = kernels.add_to_moments(good, jnp.float32(VALUES[1:2]).at[0, 3].set(bad), mask)
    jax.tree.map(np.testing.assert_array_equal, after, good)


def test_normalising_with_moments_of_the_batch_is_whitening():
    with jax.enable_x64(True):
        values, mask = jnp.asarray(DIRTY), jnp.asarray(MASK)
        moments = kernels.batch_moments(values, mask)
        normalised = kernels.normalize(jnp.asarray(VALUES), moments)
        np.testing.assert_allclose(
            np.asarray(normalised)[MASK], np.asarray(kernels.whiten(values, mask))[MASK], atol=1e-12
        )
        scaled = kernels.normalize(jnp.asarray(VALUES), moments, shift_mean=False)
    np.testing.assert_allclose(scaled, VALUES / np.sqrt(VALUES[MASK].var() + 1e-8), atol=1e-12)


def test_normalising_before_anything_was_seen_changes_nothing():
    values = jnp.asarray(VALUES, jnp.float32)
    np.testing.assert_allclose(kernels.normalize(values, kernels.init_moments()), values, rtol=1e-6)


def test_moments_can_be_carried_by_a_scan():
    batches = jnp.asarray(VALUES.reshape(3, 7), jnp.float32)

    def step(moments, batch):
        return kernels.merge_moments(moments, kernels.batch_moments(batch, jnp.ones(7, bool))), None

    moments, _ = jax.lax.scan(step, kernels.init_moments(), batches)
    np.testing.assert_allclose(kernels.moments_variance(moments), VALUES.var(), rtol=1e-5)
