"""Modifiers of preference losses: f-divergence scores (f-DPO), WPO weights, LD-DPO, weighted sums (MPO).

f-divergence scores replace log-ratios. DPO under another divergence is

    score = functools.partial(alpha_divergence_score, alpha=0.5)
    zeros = jnp.zeros_like(chosen_log_ratio)
    dpo_loss(PairLogps(score(chosen_log_ratio), score(rejected_log_ratio), zeros, zeros), beta=beta)

and so with every loss that takes log-ratios.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, full_precision
from rlhf_jax.losses.pair_logps import power_score


def forward_kl_score(log_ratio: Float[Array, "B"]) -> Float[Array, "B"]:
    """f-DPO score of the forward KL divergence (Wang et al. 2023): f'(u) = 1 - 1 / u, u = exp(log_ratio).

    The paper drops the constant; with it, a ratio of 1 scores 0. Below a log-ratio of -30 the score goes
    on along its tangent, to stay finite with a gradient.

    Args:
      log_ratio: policy minus reference log-probability, in nats.
    """
    return power_score(full_precision(log_ratio), 1.0)


def js_score(log_ratio: Float[Array, "B"]) -> Float[Array, "B"]:
    """f-DPO score of the Jensen-Shannon divergence (Wang et al. 2023): f'(u) = log(2 u / (1 + u)).

    Args:
      log_ratio: policy minus reference log-probability, in nats.
    """
    return jnp.log(2.0) + jax.nn.log_sigmoid(full_precision(log_ratio))


def alpha_divergence_score(log_ratio: Float[Array, "B"], *, alpha: Scalar) -> Float[Array, "B"]:
    """f-DPO score of the alpha divergence (Wang et al. 2023): f'(u) = (1 - u^-alpha) / alpha.

    alpha = 0 is reverse KL (DPO itself), alpha = 1 forward KL. TRL's `f_alpha_divergence_coef` is 1 - alpha.
    Above -alpha log_ratio = 30 the score goes on along its tangent.

    Args:
      log_ratio: policy minus reference log-probability, in nats.
      alpha: order of the divergence; may be traced, 0 included.
    """
    return power_score(full_precision(log_ratio), alpha)


def wpo_weight(
    logp: Float[Array, "B T"], log_collision: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """WPO's aligned weight of a response: how on-policy it is (Zhou et al. 2024, eq. 2).

        exp(1/|y| sum_t [log p(y_t) - log sum_v p(v)^2])

    A pair's weight is the product of its two responses': pass it as `weights`.

    Args:
      logp: policy log-probability of each token, in nats.
      log_collision: log sum over the vocabulary of p(v)^2 at each token: the expected p of a sample.
      mask: response tokens.
    Returns:
      Weights, without gradient; 1 for an empty response.
    """
    logp, log_collision, mask = check_shapes(
        "wpo_weight", logp=(logp, "B T"), log_collision=(log_collision, "B T"), mask=(mask, "B T")
    )
    aligned = cleaned(logp, mask) - cleaned(log_collision, mask)
    return jax.lax.stop_gradient(jnp.exp(masked_mean(aligned, mask, axis=-1)))


def length_desensitized_logp(
    logp: Float[Array, "B T"], mask: Bool[Array, "B T"], shared_length: Int[Array, "B"], *, alpha: Scalar
) -> Float[Array, "B"]:
    """LD-DPO's log-probability of a response, in which the tail counts less (Liu et al. 2024).

        sum_{t <= l} log p(y_t) + a sum_{t > l} log p(y_t)

    Use it for policy and reference alike, with l the shorter length of the pair.

    Args:
      logp: log-probability of each token, in nats.
      mask: response tokens; they are counted in order, wherever they stand.
      shared_length: l, tokens that count fully.
      alpha: a in [0, 1], weight of the tokens beyond; 1 is the plain sum.
    """
    logp, mask, shared_length = check_shapes(
        "length_desensitized_logp",
        logp=(logp, "B T"),
        mask=(mask, "B T"),
        shared_length=(shared_length, "B"),
    )
    shared = jnp.cumsum(mask, axis=-1) <= shared_length[:, None]
    return jnp.sum(cleaned(logp, mask) * jnp.where(shared, 1, alpha), axis=-1)


def weighted_sum(
    losses: Mapping[str, tuple[Float[Array, ""], Metrics]], weights: Mapping[str, Scalar]
) -> tuple[Float[Array, ""], Metrics]:
    """Sum of losses with weights, as MPO (Wang et al. 2024) mixes preference, quality and likelihood losses.

    Args:
      losses: results of loss functions by name.
      weights: weight of each.
    Returns:
      (loss, metrics), with the `loss` of the sum and every loss's own metrics as `name/metric`.
    Raises:
      UserError: names of losses and weights differ.
    """
    if losses.keys() != weights.keys():
        raise UserError(
            f"weighted_sum: losses {sorted(losses)} need weights of the same names, not {sorted(weights)}."
        )
    total = jnp.sum(jnp.stack([weights[name] * loss for name, (loss, _) in losses.items()]))
    metrics = {f"{name}/{key}": value for name, (_, own) in losses.items() for key, value in own.items()}
    return total, metrics | {"loss": jax.lax.stop_gradient(total)}
