import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.kernels import generalized_advantage_estimation


def naive_gae(rewards, values, discounts, bootstrap_value, mask, gae_lambda):
    """Schulman et al. 2016, eq. 16, row by row over the unmasked steps only."""
    advantages = np.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        following_value, following_advantage = bootstrap_value[b], 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            delta = rewards[b, t] + discounts[b, t] * following_value - values[b, t]
            following_advantage = delta + discounts[b, t] * gae_lambda * following_advantage
            following_value = values[b, t]
            advantages[b, t] = following_advantage
    return advantages


def example(seed=0, shape=(4, 9)):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *shape))
    discounts = 0.9 * (rng.random(shape) > 0.2)
    mask = rng.random(shape) > 0.3
    mask[-1] = False
    return rewards, values, discounts, rng.normal(size=shape[0]), mask


def test_matches_naive_loop_and_skips_masked_steps():
    *arrays, bootstrap_value, mask = example()
    expected = naive_gae(*arrays, bootstrap_value, mask, 0.8)
    with jax.enable_x64(True):
        dirty = [np.where(mask, x, np.nan) for x in arrays]
        advantages, returns = generalized_advantage_estimation(
            *map(jnp.asarray, dirty), jnp.asarray(bootstrap_value), jnp.asarray(mask), gae_lambda=0.8
        )
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(returns, expected + np.where(mask, arrays[1], 0), rtol=0, atol=1e-12)
