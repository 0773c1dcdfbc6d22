"""Fits of the published forms: known coefficients come back, peaks are where the derivative is zero."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation import overoptimization as over

DISTANCES = np.linspace(0.1, 4, 30)
FORMS = {
    "best_of_n": (over.BEST_OF_N, lambda d, a, b: d * (a - b * d)),
    "rl": (over.REINFORCEMENT_LEARNING, lambda d, a, b: d * (a - b * math.log(d))),
}


@pytest.mark.parametrize("name", FORMS)
def test_known_coefficients_come_back(name):
    form, naive = FORMS[name]
    gains = [naive(d, 1.5, 0.4) for d in DISTANCES]
    np.testing.assert_allclose(form(DISTANCES, 1.5, 0.4), gains)
    assert over.fit(form, [0, *DISTANCES], [7, *gains]) == pytest.approx((1.5, 0.4))  # 0 says nothing
    assert form(0.0, 1.5, 0.4) == 0


@pytest.mark.parametrize("name", FORMS)
def test_peaks_against_a_fine_grid(name):
    form, _ = FORMS[name]
    grid = np.linspace(0.01, 20, 200_001)
    for alpha, beta in ((1.5, 0.4), (0.3, 0.9), (2.0, 1.0)):
        best = grid[np.argmax(form(grid, alpha, beta))]
        assert over.peak_kl(form, alpha, beta) == pytest.approx(best**2, rel=1e-2)
    assert over.peak_kl(form, 1.0, -0.1) == math.inf
    assert over.peak_kl(over.BEST_OF_N, -1.0, 0.1) == 0


def test_intervals_over_seeds():
    rng = np.random.default_rng(0)
    form = over.BEST_OF_N
    alphas = rng.normal(1.5, 0.1, size=6)
    gains = np.stack([form(DISTANCES, alpha, 0.4) for alpha in alphas])
    found = over.fit_seeds(form, np.tile(DISTANCES, (6, 1)), gains, resamples=200)
    assert found.alpha.mean == pytest.approx(alphas.mean())
    assert found.alpha.low < alphas.mean() < found.alpha.high
    assert found.beta.high - found.beta.low == pytest.approx(0, abs=1e-9)
    # With one set of distances the pooled fit is the mean of the fits.
    assert found.peak_kl.mean == pytest.approx((alphas.mean() / 0.8) ** 2)
    assert (alphas.min() / 0.8) ** 2 < found.peak_kl.low < found.peak_kl.mean < found.peak_kl.high
    assert 0 < found.residual < 0.5


def test_a_peak_that_some_seeds_never_reach():
    form = over.BEST_OF_N
    gains = np.stack([form(DISTANCES, 1.5, beta) for beta in (0.3, -0.2, 0.1)])
    found = over.fit_seeds(form, np.tile(DISTANCES, (3, 1)), gains, resamples=200)
    assert found.peak_kl.high == math.inf
    assert found.peak_kl.low == pytest.approx((1.5 / 0.6) ** 2)
    assert found.peak_kl.mean == pytest.approx((1.5 / (2 * 0.2 / 3)) ** 2)


def test_too_few_distances():
    with pytest.raises(ValueError, match="two distances"):
        over.fit(over.BEST_OF_N, [0, 1, 1], [0, 1, 1])
