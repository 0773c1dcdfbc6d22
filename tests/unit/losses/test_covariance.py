"""Tokens by the covariance of log-prob and advantage: Clip-Cov and KL-Cov, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import clip_cov_mask, grpo_loss, importance_surrogate, kl_cov_mask, token_covariance
from rlhf_jax.losses.reductions import token_mean

B, T = 4, 6
RNG = np.random.default_rng(0)
MASK = RNG.random((B, T)) > 0.3
LOGP = RNG.normal(size=(B, T)) - 1
ADVANTAGES = RNG.normal(size=B)
DIRTY = np.where(MASK, LOGP, np.nan)


def naive_covariance():
    places = [(b, t) for b in range(B) for t in range(T) if MASK[b, t]]
    mean_logp = sum(LOGP[place] for place in places) / len(places)
    mean_advantage = sum(ADVANTAGES[b] for b, _ in places) / len(places)
    return {(b, t): (LOGP[b, t] - mean_logp) * (ADVANTAGES[b] - mean_advantage) for b, t in places}


def arrays(rows=slice(None)):
    return jnp.asarray(DIRTY[rows]), jnp.asarray(ADVANTAGES[rows]), jnp.asarray(MASK[rows])


def test_covariances_of_tokens_have_the_mean_of_the_batch():
    found = np.asarray(token_covariance(*arrays()))
    for place, expected in naive_covariance().items():
        np.testing.assert_allclose(found[place], expected, rtol=1e-5)
    assert not found[~MASK].any()
    of_tokens = np.cov(LOGP[MASK], np.broadcast_to(ADVANTAGES[:, None], (B, T))[MASK], ddof=0)[0, 1]
    np.testing.assert_allclose(found[MASK].mean(), of_tokens, rtol=1e-4)


@pytest.mark.parametrize("fraction", [1e-4, 0.2, 0.5, 1.0])
def test_kl_cov_holds_the_tokens_of_highest_covariance(fraction):
    covariance = naive_covariance()
    count = max(int(fraction * len(covariance)), 1)
    expected = np.zeros((B, T), bool)
    for place in sorted(covariance, key=lambda place: -covariance[place])[:count]:
        expected[place] = True
    np.testing.assert_array_equal(kl_cov_mask(*arrays(), fraction=fraction), expected)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(kl_cov_mask(*arrays(order), fraction=fraction), expected[order])


def test_clip_cov_detaches_a_random_share_of_the_band():
    covariance = naive_covariance()
    band = {place for place, value in covariance.items() if 0.1 <= value <= 1.0}
    assert 3 < len(band) < MASK.sum() - 3
    clip = jax.jit(lambda key, fraction: clip_cov_mask(*arrays(), key, fraction=fraction, low=0.1, high=1.0))
    seen = set()
    for seed in range(40):
        kept = np.asarray(clip(jax.random.key(seed), 3.0 / float(MASK.sum())))
        detached = {tuple(map(int, place)) for place in np.argwhere(MASK & ~kept)}
        assert len(detached) == 3
        assert detached <= band
        seen |= detached
    assert seen == band  # each of them in some draw
    one = np.asarray(clip(jax.random.key(0), 1e-6))
    assert (MASK & ~one).sum() == 1
    everything = np.asarray(clip(jax.random.key(0), 1.0))
    assert {tuple(map(int, place)) for place in np.argwhere(MASK & ~everything)} == band
    assert not one[~MASK].any()
    assert clip._cache_size() == 1


def test_nothing_of_nothing():
    logp, advantages, _ = arrays()
    empty = jnp.zeros((B, T), bool)
    assert not clip_cov_mask(logp, advantages, empty, jax.random.key(0)).any()
    assert not kl_cov_mask(logp, advantages, empty).any()
    # Nothing is in the band: nothing is detached.
    kept = clip_cov_mask(*arrays(), jax.random.key(0), low=50.0, high=60.0)
    np.testing.assert_array_equal(kept, MASK)


def test_the_kl_is_to_the_old_policy_on_the_held_tokens_alone():
    """loss = -w A + beta (w - 1 - log w) where held, the mean over tokens, as a loop."""
    old = np.where(MASK, LOGP + 0.3 * RNG.normal(size=(B, T)), np.nan)
    held = MASK & (RNG.random((B, T)) > 0.5)
    total = 0.0
    for b, t in zip(*np.nonzero(MASK), strict=True):
        w = np.exp(LOGP[b, t] - old[b, t])
        total += -w * ADVANTAGES[b] + 0.7 * held[b, t] * (w - 1 - np.log(w))

    def loss(logp, coef):
        return grpo_loss(
            logp,
            jnp.asarray(old),
            None,
            jnp.asarray(ADVANTAGES),
            jnp.asarray(MASK),
            old_kl_coef=coef,
            old_kl_mask=jnp.asarray(held),
            surrogate_fn=importance_surrogate,
            reduce=token_mean,
        )[0]

    found = jax.jit(loss)(jnp.asarray(DIRTY), 0.7)
    np.testing.assert_allclose(found, total / MASK.sum(), rtol=1e-5)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(DIRTY), 0.7))
    w = np.exp(np.where(MASK, LOGP - old, 0))
    expected = np.where(MASK, -w * ADVANTAGES[:, None] + 0.7 * held * (w - 1), 0) / MASK.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
