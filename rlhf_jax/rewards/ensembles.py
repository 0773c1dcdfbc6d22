"""One reward from the scores of several reward models, so that no single model's mistakes are worth gaming.

Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization". The members should be on one
scale: trained alike, or standardised on the same answers.
"""

import jax.numpy as jnp

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Float, Scalar


def ensemble_mean(scores: Float[Array, "N *B"]) -> Float[Array, "*B"]:
    """mean_i R_i over the members, the first axis."""
    (scores,) = check_shapes("ensemble_mean", scores=(scores, "N *S"))
    return jnp.mean(scores, axis=0)


def ensemble_worst_case(scores: Float[Array, "N *B"]) -> Float[Array, "*B"]:
    """min_i R_i over the members (Coste et al. 2023, worst-case optimisation)."""
    (scores,) = check_shapes("ensemble_worst_case", scores=(scores, "N *S"))
    return jnp.min(scores, axis=0)


def ensemble_uncertainty_weighted(scores: Float[Array, "N *B"], *, coef: Scalar = 0.5) -> Float[Array, "*B"]:
    """mean_i R_i - coef var_i R_i over the members (Coste et al. 2023, uncertainty-weighted optimisation).

    The variance is the population's, 1/N sum (R_i - mean)^2; it is in squared units of the scores.

    Args:
      coef: weight of the variance; 0 gives the mean.
    """
    (scores,) = check_shapes("ensemble_uncertainty_weighted", scores=(scores, "N *S"))
    return jnp.mean(scores, axis=0) - coef * jnp.var(scores, axis=0)
