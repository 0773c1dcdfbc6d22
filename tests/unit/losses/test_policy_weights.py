"""Weights of single tokens: top-entropy and off-policy masks, importance weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.policy_ratios import sequence_total_log_ratio
from rlhf_jax.losses.policy_weights import (
    masked_importance_weights,
    off_policy_mask,
    top_entropy_mask,
    truncated_importance_weights,
)

B, T = 4, 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mask():
    return np.random.default_rng(0).random((B, T)) > 0.25


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_top_entropy_mask_is_numpys_quantile(fraction, mask):
    rng = np.random.default_rng(4)
    entropy = rng.gamma(2.0, 1.0, (B, T))
    threshold = np.quantile(entropy[mask], 1 - fraction)
    dirty = jnp.asarray(np.where(mask, entropy, np.nan))
    kept = top_entropy_mask(dirty, jnp.asarray(mask), fraction=fraction)
    np.testing.assert_array_equal(kept, mask & (entropy >= threshold))


def test_top_entropy_mask_keeps_ties_and_nothing_of_nothing():
    assert top_entropy_mask(jnp.full((2, 3), 0.1), jnp.ones((2, 3), bool)).all()
    assert not top_entropy_mask(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)).any()


def test_importance_weights_match_naive_loops(mask):
    rng = np.random.default_rng(5)
    old_logp = rng.normal(size=(B, T))
    sampler_logp = old_logp + 0.5 * rng.normal(size=(B, T))
    args = [jnp.where(mask, x, jnp.nan) for x in (old_logp, sampler_logp)]
    token = np.exp(old_logp - sampler_logp)
    total = np.exp(np.where(mask, old_logp - sampler_logp, 0).sum(-1, keepdims=True)) * np.ones((B, T))
    for ratio_fn, ratio in (({}, token), ({"ratio_fn": sequence_total_log_ratio}, total)):
        bounds = {"low": 0.7, "high": 1.3, **ratio_fn}
        truncated = truncated_importance_weights(*args, jnp.asarray(mask), **bounds)
        masked = masked_importance_weights(*args, jnp.asarray(mask), **bounds)
        np.testing.assert_allclose(truncated, np.where(mask, np.clip(ratio, 0.7, 1.3), 0), atol=1e-12)
        inside = mask & (ratio >= 0.7) & (ratio <= 1.3)
        np.testing.assert_allclose(masked, np.where(inside, ratio, 0), atol=1e-12)


def test_off_policy_mask_drops_only_unlikely_rows_of_negative_advantage():
    logp = jnp.array([[-3.0, -1.0], [-3.0, -1.0], [-1.0, -1.0]])
    mask = jnp.array([[True, True], [True, True], [True, False]])
    keep = off_policy_mask(logp, jnp.full((3, 2), -1.0), jnp.array([1.0, -1.0, -1.0]), mask, threshold=0.5)
    np.testing.assert_array_equal(keep, [[True, True], [False, False], [True, False]])
