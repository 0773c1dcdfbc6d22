import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.kernels import adaptive_kl_update, fixed_kl_update

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
