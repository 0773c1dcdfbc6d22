"""Planning sequences of continuous actions by the cross-entropy method."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, PRNGKeyArray, Scalar


def cross_entropy_method(
    score_fn: Callable[[Float[Array, "N *D"]], Float[Array, " N"]],
    key: PRNGKeyArray,
    mean: Float[Array, "*D"],
    std: Float[Array, "*D"],
    *,
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    population: int,
    elites: int,
    iterations: int,
    smoothing: Scalar = 0.0,
) -> Float[Array, "*D"]:
    """Cross-entropy method: a Gaussian moves to the best of its own samples (Rubinstein 1999).

        x_i ~ N(mean, std^2) within the bounds;  mean, std <- those of the `elites` best x_i

    Args:
      score_fn: scores of N candidates; one that is not a number counts as the worst.
      mean: of the first samples.
      std: of the first samples.
      low: bound of the samples, broadcast against them.
      high: the other one.
      population: samples an iteration.
      elites: the best of these, which the Gaussian is fitted to.
      iterations: how often.
      smoothing: share of the old mean and deviation that stays.

    Returns:
      The last mean.
    """

    def iteration(carry: tuple[Array, Array], key: PRNGKeyArray) -> tuple[tuple[Array, Array], None]:
        mean, std = carry
        noise = jax.random.normal(key, (population, *mean.shape), mean.dtype)
        samples = jnp.clip(mean + std * noise, low, high)
        scores = score_fn(samples)
        best = samples[jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), elites)[1]]

        def moved(old: Array, new: Array) -> Array:
            return smoothing * old + (1 - smoothing) * new

        return (moved(mean, jnp.mean(best, axis=0)), moved(std, jnp.std(best, axis=0))), None

    (mean, _), _ = jax.lax.scan(iteration, (mean, std), jax.random.split(key, iterations))
    return mean
