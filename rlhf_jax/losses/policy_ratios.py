"""Log importance ratios of policy-gradient losses, at the level of tokens or of sequences.

A ratio function takes `(logp, old_logp, mask)`, all [B, T] and clean of NaN, and returns log-ratios
[B, T] whose `exp` multiplies the advantages. Pass it to `grpo_loss` as `ratio_fn=`.
"""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.types import Array, Bool, Float

# Beyond this many nats `exp` goes on along its tangent: value and gradient stay finite, and the
# gradient still points back.
EXP_LIMIT = 20.0


def bounded_exp(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) up to 20 nats, its tangent beyond: exact where ratios mean something, finite everywhere."""
    return jnp.exp(jnp.minimum(log_ratio, EXP_LIMIT)) * (1 + jnp.maximum(log_ratio - EXP_LIMIT, 0))


def low_variance_kl(logp: Float[Array, "..."], ref_logp: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(l) - 1 - l with l = ref_logp - logp, the k3 term of GRPO (Shao et al. 2024, eq. 4).

    Args:
      logp: log-probability in nats of the sampled tokens under the policy.
      ref_logp: under the reference.
    """
    log_ratio = ref_logp - logp
    beyond = log_ratio > EXP_LIMIT
    near = jnp.where(beyond, 0, log_ratio)
    return jnp.where(beyond, bounded_exp(log_ratio) - 1 - log_ratio, jnp.expm1(near) - near)


def token_log_ratio(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """log pi(a_t) - log pi_old(a_t): one ratio a token (PPO, Schulman et al. 2017, section 3; GRPO)."""
    del mask
    return logp - old_logp


def sequence_log_ratio(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """The row's mean log-ratio at every token (GSPO, Zheng et al. 2025, eq. 7).

    log s_i = (1 / |y_i|) sum_t [log pi(y_t) - log pi_old(y_t)]
    """
    mean = masked_mean(logp - old_logp, mask, axis=-1)[..., None]
    return jnp.broadcast_to(mean, logp.shape)


def sequence_token_log_ratio(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """The row's ratio in value, each token's own in gradient (GSPO-token, Zheng et al. 2025, eq. 14).

        log s_{i,t} = sg[log s_i] + log pi(y_t) - sg[log pi(y_t)]

    Equal to GSPO in value and gradient when the advantages of a row are equal.
    """
    sequence = sequence_log_ratio(logp, old_logp, mask)
    return lax.stop_gradient(sequence) + logp - lax.stop_gradient(logp)
