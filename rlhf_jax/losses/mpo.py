"""Maximum a posteriori policy optimization (Abdolmaleki et al. 2018): weights of samples and their duals.

Actions are M samples of the old policy in each of N states, and values their Q.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Float, Scalar
from rlhf_jax.kernels.prepare import constant


def mpo_weights(values: Float[Array, "M N"], *, temperature: Scalar) -> Float[Array, "M N"]:
    """The E-step's weights of the samples: q_i proportional to exp(Q_i / temperature), of each state.

    No gradient; they sum to 1 over the samples.
    """
    (values,) = check_shapes("mpo_weights", values=(values, "M N"))
    return jax.nn.softmax(constant(values) / lax.stop_gradient(temperature), axis=0)


def temperature_dual_loss(
    values: Float[Array, "M N"], *, temperature: Scalar, epsilon: Scalar
) -> Float[Array, ""]:
    """Dual of the E-step's constraint KL(q || old policy) <= epsilon, averaged over states.

        g(eta) = eta epsilon + eta mean_s log mean_i exp(Q_i / eta)

    Its least is where `mpo_weights` meet the constraint; gradient to the temperature alone.

    Args:
      temperature: eta, > 0, in units of reward.
      epsilon: bound of the KL, in nats.
    """
    (values,) = check_shapes("temperature_dual_loss", values=(values, "M N"))
    scaled = jax.nn.logsumexp(constant(values) / temperature, axis=0) - jnp.log(values.shape[0])
    return temperature * (epsilon + jnp.mean(scaled))


def weighted_likelihood_loss(logp: Float[Array, "M N"], weights: Float[Array, "M N"]) -> Float[Array, ""]:
    """The M-step: -mean_s sum_i q_i log pi(a_i | s)."""
    logp, weights = check_shapes("weighted_likelihood_loss", logp=(logp, "M N"), weights=(weights, "M N"))
    return -jnp.mean(jnp.sum(constant(weights) * logp, axis=0))


def lagrangian_losses(
    kl: Float[Array, " N"], *, multiplier: Scalar, epsilon: Scalar
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Lagrangian of the M-step's constraint mean KL <= epsilon: (loss of the policy, loss of the multiplier).

        alpha mean KL,  alpha (epsilon - mean KL)

    Each holds the other still.

    Args:
      kl: KL(old || new) in each state, in nats.
      multiplier: alpha, >= 0.
      epsilon: bound of its mean.
    """
    (kl,) = check_shapes("lagrangian_losses", kl=(kl, "N"))
    mean = jnp.mean(kl)
    return lax.stop_gradient(multiplier) * mean, multiplier * (epsilon - lax.stop_gradient(mean))
