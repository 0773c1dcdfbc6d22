"""Exact moments of advantage estimates, against samples and against what must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.masks import last_unmasked_index
from rlhf_jax.kernels.returns import generalized_advantage_estimation
from rlhf_jax.rl.tabular import dynamic_programming, prediction
from rlhf_jax.rl.tabular.moments import advantage_moments, bias_and_variance

WALK = dynamic_programming.random_walk(5, left_reward=-1.0)
EXACT = dynamic_programming.chain_values(WALK, gamma=1.0)
ROUGH = jnp.where(WALK.terminal, 0, EXACT * 0.5 + jnp.sin(jnp.arange(7.0)) * 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.95, 1.0)])
def test_moments_are_those_of_sampled_estimates(gamma, gae_lambda):
    episodes = prediction.sample_episodes(WALK, jax.random.key(0), episodes=40_000, length=80)
    discounts = jnp.where(episodes.terminated, 0.0, gamma)
    rows = jnp.arange(len(discounts))
    last = episodes.next_states[rows, last_unmasked_index(episodes.mask)]
    advantages, _ = generalized_advantage_estimation(
        episodes.rewards, ROUGH[episodes.states], discounts, ROUGH[last], episodes.mask, gae_lambda=gae_lambda
    )
    mean, variance = advantage_moments(WALK, ROUGH, gamma=gamma, gae_lambda=gae_lambda)
    first = np.asarray(advantages[:, 0], np.float64)  # of the first step: every sample is independent
    for next_state in (2, 4):
        chosen = first[np.asarray(episodes.next_states[:, 0]) == next_state]
        error = 6 * chosen.std() / np.sqrt(len(chosen)) + 1e-6
        assert abs(chosen.mean() - mean[3, next_state]) < error
        assert chosen.var() == pytest.approx(float(variance[3, next_state]), rel=0.06, abs=1e-6)


def test_there_is_no_bias_with_exact_values_or_with_whole_returns():
    def bias(values, gamma, gae_lambda):
        return float(bias_and_variance(WALK, values, EXACT, gamma=gamma, gae_lambda=gae_lambda)[0])

    assert max(bias(EXACT, 1.0, gae_lambda) for gae_lambda in (0.0, 0.7, 1.0)) < 1e-10
    assert bias(ROUGH, 1.0, 1.0) < 1e-10
    assert bias(ROUGH, 1.0, 0.7) > 1e-3
    assert bias(ROUGH, 0.9, 1.0) > 1e-3


def test_variance_grows_with_lambda_and_vanishes_at_0():
    lambdas = (0, 0.3, 0.6, 0.9, 1)
    found = [bias_and_variance(WALK, ROUGH, EXACT, gamma=1.0, gae_lambda=x)[1] for x in lambdas]
    assert found[0] == 0
    assert np.all(np.diff(found) > 0)
