"""Surrogate objectives of policy-gradient losses: what replaces ratio x advantage.

A surrogate takes `(logp, log_ratio, advantages, mask, *, epsilon_low, epsilon_high)`, [B, T] each and clean
of NaN, and returns the objective to *maximise* at each token. Pass it to `grpo_loss` as `surrogate_fn=`, its
own options set with `functools.partial`. Below, w is the ratio exp(log_ratio), A the advantage, and sg
stops the gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.numerics import EXP_LIMIT, bounded_exp
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar
from rlhf_jax.losses.policy_ratios import sequence_average, sequence_total


def clip_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    delta: Scalar | None = None,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate, min(w A, clip(w, 1 - epsilon_low, 1 + epsilon_high) A).

    Schulman et al. 2017, eq. 7.

    Two bounds: epsilon_high > epsilon_low is DAPO's clip-higher (Yu et al. 2025). `delta` caps the
    ratio of the unclipped side, which min leaves unbounded for A < 0: min(min(w, delta) A, ...)
    (two-sided clipping, INTELLECT-2, 2025; TRL's `delta`). It equals PPO's dual clip.

    Args:
      delta: > 1 + epsilon_high; None for no cap.
    """
    del logp, mask
    ratio = bounded_exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    capped = ratio if delta is None else jnp.minimum(ratio, delta)
    return jnp.minimum(capped * advantages, clipped * advantages)


def cispo_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
) -> Float[Array, "B T"]:
    """CISPO's surrogate, sg[clip(w, 1 - epsilon_low, 1 + epsilon_high)] A log pi (arXiv 2506.13585).

    The weight is clipped, not the update: every token keeps a gradient. The paper sets no lower bound:
    epsilon_low = 1. TRL has the upper one only, as an absolute weight: its number is 1 + epsilon_high.
    """
    del mask
    weight = lax.stop_gradient(jnp.clip(bounded_exp(log_ratio), 1 - epsilon_low, 1 + epsilon_high))
    return weight * advantages * logp


def sapo_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    temperature_positive: Scalar = 1.0,
    temperature_negative: Scalar = 1.05,
) -> Float[Array, "B T"]:
    """SAPO's surrogate, a soft gate for a clip: (4 / tau) sigmoid(tau (w - 1)) A (arXiv 2511.20347).

    The gradient weight is 1 at w = 1 and decays smoothly on both sides, the faster the larger tau. The
    clipping bounds only set what `clip_fraction` counts.

    Args:
      temperature_positive: tau where A > 0.
      temperature_negative: tau elsewhere.
    """
    del logp, mask, epsilon_low, epsilon_high
    temperature = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    gate = jax.nn.sigmoid(temperature * (bounded_exp(log_ratio) - 1)) * 4 / temperature
    return gate * advantages


def geometric_mean_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """GMPO's surrogate, A times the geometric mean of the sequence's clipped ratios (arXiv 2507.20673).

        A_i exp((1 / |y_i|) sum_t sgn(A_i) min(sgn(A_i) l_t, sgn(A_i) clip(l_t, -epsilon_low, epsilon_high)))

    with l = log_ratio of the tokens: use it with `token_log_ratio` and `sequence_mean`. The bounds are in
    log space; the paper has 0.4 for both. Advantages are meant to be equal within a sequence.

    Args:
      segment_ids: for packed rows; None when a row is a sequence.
    """
    del logp
    sign = jnp.sign(advantages)
    clipped = jnp.clip(log_ratio, -epsilon_low, epsilon_high)
    pessimistic = sign * jnp.minimum(sign * log_ratio, sign * clipped)
    return bounded_exp(sequence_average(pessimistic, mask, segment_ids)) * advantages


def vespo_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    k_positive: Scalar = 2.0,
    lambda_positive: Scalar = 3.0,
    k_negative: Scalar = 3.0,
    lambda_negative: Scalar = 2.0,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """VESPO's surrogate, sg[phi(w)] A log pi with phi(w) = w^k exp(lambda (1 - w)) (arXiv 2602.10693).

    w is the ratio of the whole sequence, without length normalisation; phi(1) = 1. Clamps of log w are
    those of TRL: each token's to +-20, the sum to [log 1e-8, 20]. To correct for the sampler as well, give
    the sampler's log-probs as `old_logp`. The clipping bounds only set what `clip_fraction` counts.

    Args:
      k_positive: exponent where A >= 0: how fast small ratios lose weight.
      lambda_positive: decay where A >= 0: how fast large ratios lose weight.
      k_negative: exponent where A < 0.
      lambda_negative: decay where A < 0.
      segment_ids: for packed rows; None when a row is a sequence.
    """
    del epsilon_low, epsilon_high
    clamped = jnp.clip(lax.stop_gradient(log_ratio), -EXP_LIMIT, EXP_LIMIT)
    log_w = jnp.clip(sequence_total(clamped, mask, segment_ids), jnp.log(1e-8), EXP_LIMIT)
    gains = advantages >= 0
    k = jnp.where(gains, k_positive, k_negative)
    decay = jnp.where(gains, lambda_positive, lambda_negative)
    return jnp.exp(decay + k * log_w - decay * jnp.exp(log_w)) * advantages * logp


def importance_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
) -> Float[Array, "B T"]:
    """The surrogate without a clip, w A, for what bounds drift otherwise (M2PO, arXiv 2510.01161).

    The clipping bounds only set what `clip_fraction` counts.
    """
    del logp, mask, epsilon_low, epsilon_high
    return bounded_exp(log_ratio) * advantages


def log_likelihood_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
) -> Float[Array, "B T"]:
    """GPG's surrogate, A log pi: the policy gradient without a ratio (Chu et al. 2025, arXiv 2504.02546).

    The clipping bounds only set what `clip_fraction` counts.
    """
    del log_ratio, mask, epsilon_low, epsilon_high
    return advantages * logp


def _within_divergence(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    near: tuple[Bool[Array, "B T"], Bool[Array, "B T"]],
    max_ratio: Scalar,
) -> Float[Array, "B T"]:
    """sg[min(w, max_ratio)] A log pi where the divergence is `near` enough, for A > 0 and for the rest."""
    kept = jnp.where(advantages > 0, *near)
    weight = lax.stop_gradient(jnp.minimum(bounded_exp(log_ratio), max_ratio))
    return jnp.where(kept, weight * advantages * logp, 0)


def _probabilities(
    logp: Float[Array, "B T"], log_ratio: Float[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Of each token now and before, without gradient."""
    return jnp.exp(lax.stop_gradient(logp)), jnp.exp(lax.stop_gradient(logp - log_ratio))


def dppo_tv_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    max_ratio: Scalar = 20.0,
) -> Float[Array, "B T"]:
    """DPPO's surrogate, masked by binary total variation (arXiv 2602.04879).

        sg[min(w, max_ratio)] A log pi   where A > 0 and pi - pi_old <= epsilon_high,
                                         or A <= 0 and pi_old - pi <= epsilon_low;   else 0

    The bounds are of probabilities, not of ratios: rare tokens may move by large factors, likely ones may
    not. `clip_fraction` still counts ratios that are as far from 1. Use it with `token_log_ratio`.

    Args:
      max_ratio: bound of the weight.
    """
    del mask
    new, old = _probabilities(logp, log_ratio)
    near = (new - old <= epsilon_high, old - new <= epsilon_low)
    return _within_divergence(logp, log_ratio, advantages, near, max_ratio)


def dppo_kl_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    max_ratio: Scalar = 20.0,
) -> Float[Array, "B T"]:
    """DPPO's surrogate, masked by binary KL (arXiv 2602.04879).

    As `dppo_tv_surrogate`, with the divergence of the token from all others together,

        D = pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old) / (1 - pi)),

    held within epsilon_high where A > 0 and pi > pi_old, and within epsilon_low where A <= 0 and pi < pi_old.

    Args:
      max_ratio: bound of the weight.
    """
    del mask
    new, old = _probabilities(logp, log_ratio)
    others = jnp.log((1 - old + 1e-8) / (1 - new + 1e-8))
    divergence = (1 - old) * others - old * lax.stop_gradient(log_ratio)
    near = ((divergence <= epsilon_high) | (new <= old), (divergence <= epsilon_low) | (new >= old))
    return _within_divergence(logp, log_ratio, advantages, near, max_ratio)


def dro_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    tau: Scalar = 1.0,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """DRO's surrogate, (A - tau sg[L]) log pi with L the answer's log-ratio (Richemond et al. 2024).

    Its gradient is that of -(A - tau L)^2 / (2 tau), their squared error over tau (by which the authors
    rescale the policy's gradient), with L = log pi(y) / pi_old(y) and A = r - V. Sum it over answers
    (`sequence_sum`). The clipping bounds only set what `clip_fraction` counts.

    Args:
      tau: how strongly the answer is held to where it was; 1 was best of 0.1, 1 and 5 in the paper.
      segment_ids: for packed rows; None when a row is a sequence.
    """
    del epsilon_low, epsilon_high
    drift = lax.stop_gradient(sequence_total(log_ratio, mask, segment_ids))
    return (advantages - tau * drift) * logp


def advantage_regression_surrogate(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar,
    epsilon_high: Scalar,
    beta: Scalar = 1e-3,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """A*-PO's surrogate, -(beta L - A)^2 over an answer, L its log-ratio (arXiv 2505.20686, stage 2).

    With the reference in the place of the old policy, L = log pi(y) / pi_ref(y), and A = r - V*(x): the
    optimal policy has L = A / beta. An answer's square is shared out evenly among its tokens: sum it over
    answers (`sequence_sum`). The clipping bounds only set what `clip_fraction` counts.

    Args:
      beta: of the KL to the reference; beta_2 in the paper.
      segment_ids: for packed rows; None when a row is a sequence.
    """
    del logp, epsilon_low, epsilon_high
    gap = beta * sequence_total(log_ratio, mask, segment_ids) - advantages
    length = sequence_total(mask.astype(gap.dtype), mask, segment_ids)
    return -jnp.square(gap) / jnp.maximum(length, 1)
