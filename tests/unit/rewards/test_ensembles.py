"""Ensembles of reward models against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.rewards import ensembles

SCORES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def test_against_loops():
    mean, worst, careful = [], [], []
    for column in SCORES.T.tolist():
        average = sum(column) / 3
        mean.append(average)
        worst.append(sorted(column)[0])
        careful.append(average - 0.7 * sum((score - average) ** 2 for score in column) / 3)
    np.testing.assert_allclose(ensembles.ensemble_mean(SCORES), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ensembles.ensemble_worst_case(SCORES), np.float32(worst))
    ours = ensembles.ensemble_uncertainty_weighted(SCORES, coef=0.7)
    np.testing.assert_allclose(ours, careful, rtol=1e-5, atol=1e-6)


def test_members_that_agree_are_one_model():
    alike = jnp.broadcast_to(SCORES[:1], (4, 5))
    for combine_fn in (
        ensembles.ensemble_mean,
        ensembles.ensemble_worst_case,
        ensembles.ensemble_uncertainty_weighted,
    ):
        np.testing.assert_allclose(combine_fn(alike), SCORES[0], rtol=1e-6)
        np.testing.assert_allclose(combine_fn(SCORES[::-1]), combine_fn(SCORES), rtol=1e-5, atol=1e-6)


def test_the_careful_pay_for_disagreement_alone():
    """coef = 0 is the mean; the weight may be traced, and swept."""
    swept = jax.vmap(lambda coef: ensembles.ensemble_uncertainty_weighted(SCORES, coef=coef))(jnp.arange(3.0))
    np.testing.assert_allclose(swept[0], ensembles.ensemble_mean(SCORES), rtol=1e-6)
    np.testing.assert_allclose(swept[1] - swept[0], -SCORES.var(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(swept[2] - swept[1], swept[1] - swept[0], rtol=1e-4, atol=1e-6)
