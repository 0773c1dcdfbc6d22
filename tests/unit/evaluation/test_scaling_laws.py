"""Fits of scaling laws: known laws come back, optima are those of brute force, limits those of the papers."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from rlhf_jax.evaluation import scaling_laws as laws
from rlhf_jax.evaluation.statistics import bootstrap_intervals

CHINCHILLA = laws.Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
KAPLAN = laws.Kaplan(log_N_c=math.log(8.8e13), log_D_c=math.log(5.4e13), alpha_N=0.076, alpha_D=0.095)


def chinchilla(n, d):
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def kaplan(n, d):
    return ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095


def grid(sizes=5, counts=5):
    n, d = np.meshgrid(np.geomspace(1e6, 1e9, sizes), np.geomspace(1e8, 2e10, counts))
    return n.reshape(-1), d.reshape(-1)


@pytest.mark.parametrize(
    ("fit", "naive", "law"),
    [(laws.fit_chinchilla, chinchilla, CHINCHILLA), (laws.fit_kaplan, kaplan, KAPLAN)],
)
def test_a_law_without_noise_comes_back(fit, naive, law):
    n, d = grid()
    np.testing.assert_allclose(law(n, d), naive(n, d), rtol=1e-12)
    found = fit(n, d, naive(n, d))
    np.testing.assert_allclose(
        [getattr(found, name) for name in vars(law)], list(vars(law).values()), rtol=1e-5
    )
    assert laws.undetermined(found) == []


def test_the_fit_is_the_least_huber_loss_that_l_bfgs_finds():
    n, d = grid(4, 4)
    loss = chinchilla(n, d) * np.exp(0.003 * np.random.default_rng(0).normal(size=16))
    loss[3] *= 1.2  # one run gone wrong

    def huber(theta):
        a, b, e, alpha, beta = theta
        terms = [a - alpha * np.log(n), b - beta * np.log(d), np.full(16, e)]
        error = np.abs(np.log(np.sum(np.exp(terms), axis=0)) - np.log(loss)) / 1e-3
        return np.sum(np.where(error < 1, error**2 / 2, error - 0.5))

    found = laws.fit_chinchilla(n, d, loss)
    ours = np.array([math.log(found.A), math.log(found.B), math.log(found.E), found.alpha, found.beta])
    searched = minimize(huber, ours + 1e-3, method="L-BFGS-B", options={"maxiter": 300})
    assert huber(ours) <= searched.fun + 1e-3
    far = min(
        minimize(huber, [a, b, e, 0.3, 0.3], method="L-BFGS-B", options={"maxiter": 500}).fun
        for a, b, e in ((5, 5, 0), (7, 5, 0.3))
    )
    assert huber(ours) <= far + 1e-3
    assert found(n[3], d[3]) == pytest.approx(chinchilla(n[3], d[3]), rel=0.02)


@pytest.mark.parametrize("law", [CHINCHILLA, KAPLAN])
def test_the_optimum_is_that_of_brute_force(law):
    for flops in (1e18, 1e21):
        sizes = np.geomspace(1e4, 1e14, 200_001)
        best = sizes[np.argmin(law(sizes, flops / 6 / sizes))]
        params, tokens = law.optimum(flops)
        assert params == pytest.approx(best, rel=3e-4)
        assert 6 * params * tokens == pytest.approx(flops)
    growth = math.log(law.optimum(1e21)[0] / law.optimum(1e18)[0]) / math.log(1e3)
    assert law.params_exponent == pytest.approx(growth)


def test_limits_of_each_law():
    n, d = np.array([1e6, 1e9]), np.array([1e8, 1e11])
    np.testing.assert_allclose(KAPLAN(n, np.inf), (8.8e13 / n) ** 0.076)
    np.testing.assert_allclose(KAPLAN(np.inf, d), (5.4e13 / d) ** 0.095)
    np.testing.assert_allclose(CHINCHILLA(np.inf, np.inf), 1.69)


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_truth():
    n, d = grid(4, 4)
    law = laws.Kaplan(log_N_c=math.log(1e8), log_D_c=math.log(1e10), alpha_N=0.3, alpha_D=0.25)
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(3):
        loss = law(n, d) * np.exp(0.01 * rng.normal(size=16))
        intervals = bootstrap_intervals(
            n,
            d,
            loss,
            statistic_fn=lambda *some: [(fit := laws.fit_kaplan(*some)).alpha_N, fit.alpha_D],
            resamples=8,
        )
        for interval, truth in zip(intervals, (0.3, 0.25), strict=True):
            covered.append(interval.low <= truth <= interval.high)
            assert interval.high - interval.low < 0.1
    assert np.mean(covered) >= 0.7  # of 8 resamples of 16 runs: less than 95 %


def test_what_runs_do_not_determine_is_said():
    n, d = grid(4, 4)
    found = laws.fit_chinchilla(n, d, 2 + 400 / d**0.3)  # size does nothing
    params_term = found.A * n**-found.alpha
    assert laws.undetermined(found) == ["alpha"] or params_term.max() - params_term.min() < 1e-3
    kept = laws.Chinchilla(1, 1, 1, laws.EXPONENTS[1], 0.3)
    assert laws.undetermined(kept) == ["alpha"]
    assert laws.undetermined(laws.fit_chinchilla(n, d, 400 / n**0.3 + 400 / d**0.3)) == ["E"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (([1e6] * 3, [1e8] * 3, [3.0] * 3), "as many runs"),
        (([1e6] * 6, np.arange(1, 7), [3.0] * 6), "three sizes"),
        ((np.arange(1, 7), np.arange(1, 7), [3.0] * 5 + [math.nan]), "finite"),
        ((np.arange(1, 7), np.arange(1, 6), [3.0] * 6), "one length"),
    ],
)
def test_too_little_for_a_fit(columns, said):
    with pytest.raises(ValueError, match=said):
        laws.fit_chinchilla(*columns)


def test_parabolas_of_equal_budgets():
    sizes = np.geomspace(1e6, 1.6e7, 5)
    flops = np.repeat([1e17, 1e18], 5) * np.tile([0.98, 1.0, 1.02, 1.04, 1.0], 2)
    n = np.tile(sizes, 2)
    best = np.repeat([3e6, 3e7], 5)
    loss = 2.5 + 0.1 * np.log(n / best) ** 2
    first, second = laws.fit_isoflops(n, flops / 6 / n, loss)
    assert (first.params, second.params) == (pytest.approx(3e6), pytest.approx(3e7))
    assert (first.inside, second.inside) == (True, False)  # 3e7 is above all sizes
    assert first.loss == pytest.approx(2.5)
    assert sorted(first.runs) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(first(n[:5]), loss[:5])
    (flat,) = laws.fit_isoflops(n[:5], 1e17 / n[:5], 2.5 - 0.1 * np.log(n[:5] / 3e6) ** 2)
    assert flat.curvature < 0
    assert not flat.inside
    assert laws.fit_isoflops(n[:2], 1e17 / n[:2], loss[:2]) == []


def test_a_power_law_comes_back():
    x = np.array([1e17, 1e18, 1e20])
    assert laws.fit_power_law(x, 0.3 * x**0.46) == (pytest.approx(0.3), pytest.approx(0.46))
    with pytest.raises(ValueError, match="two different"):
        laws.fit_power_law([1e17, 1e17], [1, 2])
