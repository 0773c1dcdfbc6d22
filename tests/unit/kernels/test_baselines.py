"""Optimal token baselines and optimal values, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.kernels import (
    collision_probabilities,
    optimal_token_baseline_advantages,
    optimal_values,
    score_energy,
    token_logprobs,
)

N, G, T = 3, 4, 6
RNG = np.random.default_rng(1)
REWARDS = RNG.normal(size=(N, G))
ENERGY = RNG.uniform(0.1, 1.5, size=(N * G, T))
LENGTHS = np.array([6, 3, 4, 1, 2, 2, 5, 6, 3, 3, 1, 4])
MASK = np.arange(T) < LENGTHS[:, None]
SCORED = np.ones((N, G), bool)
SCORED[0, 1] = False
SCORED[2, 1:] = False  # one alone has nothing to compare with


def naive(rewards, energy, mask, scored):
    """Places of tokens are counted among those of the mask."""
    result = np.zeros(mask.shape)
    for n in range(N):
        rows = [n * G + i for i in range(G) if scored[n, i]]
        tokens = {row: np.flatnonzero(mask[row]) for row in rows}
        if len(rows) < 2:
            continue
        for row in rows:
            for place, t in enumerate(tokens[row]):
                there = [j for j in rows if len(tokens[j]) > place]
                paths = [sum(energy[j][tokens[j][: place + 1]]) for j in there]
                values = [rewards.reshape(-1)[j] for j in there]
                baseline = sum(np.multiply(paths, values)) / sum(paths) if len(there) > 1 else 0.0
                result[row, t] = rewards.reshape(-1)[row] - baseline
    return result


def test_the_baseline_of_a_place_is_the_mean_weighted_by_paths():
    found = jax.jit(optimal_token_baseline_advantages)(
        jnp.where(SCORED, REWARDS, jnp.nan), jnp.where(MASK, ENERGY, jnp.nan), MASK, SCORED
    )
    np.testing.assert_allclose(found, naive(REWARDS, ENERGY, MASK, SCORED), rtol=1e-4, atol=1e-6)


def test_gaps_in_the_mask_are_no_places():
    mask = RNG.random((N * G, T)) > 0.4
    found = optimal_token_baseline_advantages(
        jnp.asarray(REWARDS), jnp.where(mask, ENERGY, jnp.nan), jnp.asarray(mask)
    )
    expected = naive(REWARDS, ENERGY, mask, np.ones((N, G), bool))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_equal_energies_at_the_first_token_give_the_mean_of_the_group():
    whole = np.ones((N * G, T), bool)
    found = optimal_token_baseline_advantages(jnp.asarray(REWARDS), jnp.ones((N * G, T)), jnp.asarray(whole))
    expected = np.repeat((REWARDS - REWARDS.mean(axis=1, keepdims=True)).reshape(-1, 1), T, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_the_energy_is_the_squared_gradient_by_the_logits(chunk_size):
    hidden, table = RNG.normal(size=(2, 5, 4)), RNG.normal(size=(7, 4))
    tokens = RNG.integers(0, 7, (2, 5))
    options = {"temperature": 0.7, "softcap": 3.0, "chunk_size": chunk_size}
    arrays = jnp.asarray(hidden), jnp.asarray(table)
    logp, _ = token_logprobs(*arrays, jnp.asarray(tokens), **options)
    collision = collision_probabilities(*arrays, **options)
    found = score_energy(logp, collision, jnp.ones((2, 5), bool))
    logits = 3.0 * np.tanh(hidden @ table.T / 3.0) / 0.7
    score_fn = jax.vmap(jax.vmap(jax.grad(lambda z, token: jax.nn.log_softmax(z)[token])))
    scores = score_fn(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(found, np.square(scores).sum(axis=-1), rtol=1e-4, atol=1e-6)


def test_optimal_values_are_soft_maxima_of_rewards():
    for beta in (0.05, 0.5, 3.0):
        found = jax.jit(optimal_values)(jnp.where(SCORED, REWARDS, jnp.nan), SCORED, beta=beta)
        for n in range(N):
            counted = [REWARDS[n, i] for i in range(G) if SCORED[n, i]]
            expected = beta * np.log(sum(np.exp(r / beta) for r in counted) / len(counted))
            np.testing.assert_allclose(found[n], expected, rtol=1e-4)
    np.testing.assert_allclose(
        optimal_values(jnp.asarray(REWARDS), beta=1e5), REWARDS.mean(axis=1), rtol=0.05, atol=0.05
    )
    np.testing.assert_allclose(
        optimal_values(jnp.asarray(REWARDS), beta=1e-4), REWARDS.max(axis=1), rtol=1e-3
    )
    nothing = optimal_values(jnp.full((1, 2), jnp.nan), jnp.zeros((1, 2), bool), beta=0.5)
    np.testing.assert_array_equal(nothing, [0])


def test_the_optimal_policy_has_log_ratios_of_advantages_over_beta():
    """Enumerated: pi* = ref exp(r / beta) / Z, and V* = beta log Z, the two sides of A*-PO's regression."""
    beta, ref = 0.4, np.array([0.1, 0.2, 0.3, 0.4])
    rewards = np.array([1.0, -0.5, 0.3, 0.0])
    as_sampled = np.repeat(rewards, (10 * ref).round().astype(int))[None]
    value = float(optimal_values(jnp.asarray(as_sampled), beta=beta)[0])
    optimal = ref * np.exp(rewards / beta) / (ref * np.exp(rewards / beta)).sum()
    np.testing.assert_allclose(beta * np.log(optimal / ref), rewards - value, rtol=1e-4, atol=1e-5)
