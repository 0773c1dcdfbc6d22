"""MPO: weights against NumPy, the temperature's dual at its least, gradients of the Lagrangian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.mpo import (
    lagrangian_losses,
    mpo_weights,
    temperature_dual_loss,
    weighted_likelihood_loss,
)

VALUES = np.random.default_rng(0).normal(size=(6, 4)) * np.array([0.3, 1.0, 2.0, 5.0])


def test_the_best_temperature_meets_the_bound():
    """At the dual's least the weights' mean KL from the samples' own, 1/M each, is epsilon."""
    temperatures = np.geomspace(0.05, 50, 20_000)
    duals = jax.vmap(lambda eta: temperature_dual_loss(jnp.asarray(VALUES), temperature=eta, epsilon=0.2))
    best = temperatures[int(np.argmin(duals(jnp.asarray(temperatures))))]
    weights = np.exp(VALUES / best) / np.exp(VALUES / best).sum(0)
    assert np.mean(np.sum(weights * np.log(6 * weights), axis=0)) == pytest.approx(0.2, abs=5e-3)
    found = mpo_weights(jnp.asarray(VALUES, jnp.float32), temperature=best)
    np.testing.assert_allclose(found, weights, rtol=1e-4)


def test_the_likeliest_gaussian_has_the_weighted_mean():
    actions = np.random.default_rng(1).normal(size=(6, 4))
    weights = mpo_weights(jnp.asarray(VALUES), temperature=1.0)

    def loss(mean):
        return weighted_likelihood_loss(-jnp.square(actions - mean) / 2, weights)

    mean = np.sum(np.asarray(weights) * actions, axis=0)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(mean)), 0, atol=1e-6)
    expected = [np.asarray(weights)[:, s] @ (actions[:, s] - mean[s]) ** 2 / 2 for s in range(4)]
    np.testing.assert_allclose(loss(jnp.asarray(mean)), np.mean(expected), rtol=1e-5)


def test_policy_and_multiplier_hold_each_other_still():
    kl = jnp.array([0.1, 0.3])

    def total(kl, multiplier):
        return sum(lagrangian_losses(kl, multiplier=multiplier, epsilon=0.05))

    of_kl, of_multiplier = jax.grad(total, (0, 1))(kl, jnp.float32(3.0))
    np.testing.assert_allclose(of_kl, [1.5, 1.5])
    np.testing.assert_allclose(of_multiplier, 0.05 - 0.2, rtol=1e-5)
