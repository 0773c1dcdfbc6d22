"""Estimates of the Kullback-Leibler divergence from the log-probabilities of sampled actions.

For actions a ~ pi, with l = log ref(a) - log pi(a) (Schulman 2020, "Approximating KL divergence"):

    k1 = -l            k2 = l^2 / 2            k3 = exp(l) - 1 - l

Two questions must be kept apart. Is the *value* an unbiased estimate of KL(pi || ref)? Is the *gradient*,
taken through log pi(a) with the sample held fixed, an unbiased estimate of the gradient of KL(pi || ref)?
The answers, which the tests show by enumeration, are in each function's docstring.

Exact divergences take logits over the whole vocabulary; entries of -inf have probability 0.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.numerics import exp_excess
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Float, Scalar
from rlhf_jax.kernels.prepare import full_precision


def k1(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
    """k1 estimator of the KL, log pi(a) - log ref(a): for reporting and for KL in the reward.

    Value: unbiased for KL(pi || ref), high variance, may be negative.
    Gradient: that of log pi(a), whose expectation is zero: as a loss term k1 does nothing but add noise.

    Args:
      logp: log-probability in nats of the sampled action under the policy that sampled it.
      ref_logp: of the same action under the reference.
    """
    logp, ref_logp = check_shapes("k1", logp=(logp, "*S"), ref_logp=(ref_logp, "*S"))
    return logp - ref_logp


def k2(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
    """k2 estimator of the KL, (log pi(a) - log ref(a))^2 / 2: for use as a loss term.

    Value: biased for KL(pi || ref) (equal to second order as pi approaches ref), never negative.
    Gradient: (log pi - log ref) grad log pi, an unbiased estimate of the gradient of KL(pi || ref).

    Args:
      logp: log-probability in nats of the sampled action under the policy that sampled it.
      ref_logp: of the same action under the reference.
    """
    logp, ref_logp = check_shapes("k2", logp=(logp, "*S"), ref_logp=(ref_logp, "*S"))
    return 0.5 * jnp.square(logp - ref_logp)


def k3(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
    """k3 (low-variance) estimator of the KL, exp(l) - 1 - l with l = log ref(a) - log pi(a).

    For reporting, and GRPO's choice of loss term.

    Value: unbiased for KL(pi || ref) where ref has no mass outside the support of pi, never negative,
    lower variance than k1.
    Gradient: (1 - ref/pi) grad log pi, which is biased for KL(pi || ref): its expectation is the gradient
    of the *forward* KL(ref || pi) (Shao et al. 2024, eq. 4, use it so). It agrees with that of
    KL(pi || ref) to first order as pi approaches ref.

    Args:
      logp: log-probability in nats of the sampled action under the policy that sampled it.
      ref_logp: of the same action under the reference.
    """
    logp, ref_logp = check_shapes("k3", logp=(logp, "*S"), ref_logp=(ref_logp, "*S"))
    return exp_excess(ref_logp - logp)


def _log_softmax(logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
    return jax.nn.log_softmax(full_precision(logits))


def _expectation(log_probs: Float[Array, "... V"], values: Float[Array, "... V"]) -> Float[Array, "..."]:
    """sum_v p_v x_v, where p_v = 0 counts nothing, whatever x_v."""
    possible = log_probs > -jnp.inf
    probs = jnp.exp(log_probs)
    return jnp.sum(jnp.where(possible, probs * jnp.where(possible, values, 0), 0), axis=-1)


def entropy(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Entropy H = -sum_v p_v log p_v, in nats, exact over the vocabulary."""
    (logits,) = check_shapes("entropy", logits=(logits, "*S V"))
    log_probs = _log_softmax(logits)
    return -_expectation(log_probs, log_probs)


def reverse_kl(logits: Float[Array, "... V"], ref_logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(pi || ref) = sum_v pi_v (log pi_v - log ref_v), in nats, exact over the vocabulary.

    Infinite where the policy puts mass that the reference does not.

    Args:
      logits: of the policy pi; gradient flows.
      ref_logits: of the reference; gradient flows.
    """
    logits, ref_logits = check_shapes("reverse_kl", logits=(logits, "*S V"), ref_logits=(ref_logits, "*S V"))
    log_probs, ref_log_probs = _log_softmax(logits), _log_softmax(ref_logits)
    return _expectation(log_probs, log_probs - ref_log_probs)


def forward_kl(logits: Float[Array, "... V"], ref_logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(ref || pi) = sum_v ref_v (log ref_v - log pi_v), in nats, exact over the vocabulary.

    Args:
      logits: of the policy pi; gradient flows.
      ref_logits: of the reference; gradient flows.
    """
    logits, ref_logits = check_shapes("forward_kl", logits=(logits, "*S V"), ref_logits=(ref_logits, "*S V"))
    return reverse_kl(ref_logits, logits)


def jensen_shannon(
    logits: Float[Array, "... V"], ref_logits: Float[Array, "... V"], *, mixture: Scalar = 0.5
) -> Float[Array, "..."]:
    """JS = mixture KL(pi || m) + (1 - mixture) KL(ref || m), m = mixture pi + (1 - mixture) ref (Lin 1991).

    Symmetric and at most log 2 for mixture = 1/2; finite where the supports differ.

    Args:
      logits: of the policy pi; gradient flows.
      ref_logits: of the reference; gradient flows.
      mixture: weight of the policy, in (0, 1).
    """
    logits, ref_logits = check_shapes(
        "jensen_shannon", logits=(logits, "*S V"), ref_logits=(ref_logits, "*S V")
    )
    log_probs, ref_log_probs = _log_softmax(logits), _log_softmax(ref_logits)
    possible = jnp.maximum(log_probs, ref_log_probs) > -jnp.inf
    # Where neither has mass, logaddexp(-inf, -inf) would have no gradient.
    log_mixture = jnp.logaddexp(
        jnp.where(possible, log_probs, 0) + jnp.log(mixture),
        jnp.where(possible, ref_log_probs, 0) + jnp.log1p(-jnp.asarray(mixture)),
    )
    of_policy = _expectation(log_probs, log_probs - log_mixture)
    return mixture * of_policy + (1 - mixture) * _expectation(ref_log_probs, ref_log_probs - log_mixture)
