import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.kernels import (
    adaptive_entropy_update,
    adaptive_kl_update,
    entropy_bonus_coef,
    fixed_kl_update,
)

SETTINGS = {"target": 6.0, "horizon": 10_000, "num_steps": 256}


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)]
)
def test_the_error_is_proportional_and_clipped(kl, error):
    coef = adaptive_kl_update(0.15, kl, **SETTINGS)
    np.testing.assert_allclose(coef, 0.15 * (1 + error * 256 / 10_000), rtol=1e-6)


@pytest.mark.parametrize("kl", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl):
    np.testing.assert_allclose(adaptive_kl_update(0.15, kl, **SETTINGS), 0.15, rtol=1e-6)


def test_it_finds_the_coefficient_that_holds_the_target():
    """A policy whose KL is 3 / coefficient: the target 6 is held at 1/2."""

    def step(coef, _):
        coef = adaptive_kl_update(coef, 3 / coef, target=6.0, horizon=100, num_steps=50)
        return coef, coef

    coef, _ = jax.lax.scan(step, jnp.float32(0.05), length=200)
    np.testing.assert_allclose(coef, 0.5, rtol=1e-3)


def test_the_fixed_controller_fits_in_its_place():
    assert fixed_kl_update(0.25, 1e9, **SETTINGS) == 0.25


def test_the_entropy_bonus_grows_below_its_target_and_rests_above():
    numbers = {"target": 0.2, "step_size": 0.005}
    coef, seen = jnp.float32(0.0), []
    for entropy in (0.3, 0.15, 0.1, 0.2, 0.25, 0.5, 0.5):
        in_use = entropy_bonus_coef(coef, entropy, target=0.2)
        coef = adaptive_entropy_update(coef, entropy, **numbers)
        seen.append((float(in_use), float(coef)))
    # It acts at or below the target, moves by a step, stays where it is met, and does not fall below 0.
    expected = [(0, 0), (0, 0.005), (0.005, 0.01), (0.01, 0.01), (0, 0.005), (0, 0), (0, 0)]
    np.testing.assert_allclose(seen, expected, atol=1e-7)
    for entropy in (jnp.nan, jnp.inf):
        np.testing.assert_allclose(adaptive_entropy_update(0.3, entropy, **numbers), 0.3, rtol=1e-6)
