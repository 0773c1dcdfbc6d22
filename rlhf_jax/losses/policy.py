"""Policy-gradient losses on the log-probabilities of sampled tokens.

All take `(logp, old_logp, advantages, mask, *, ..., reduce=, denominator=)` and return `(loss, metrics)`.
Only `logp` and `entropy` carry gradient. Masked entries may hold anything. `advantages` are [B, T], or [B]
for one a row. Computation is in at least float32.

Every metric is reduced as the loss is, with the same denominator: metrics of micro-batches sum to
those of the batch.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.losses.policy_ratios import bounded_exp, low_variance_kl, token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
from rlhf_jax.losses.reductions import Reduction, sequence_mean, token_mean

RatioFn: TypeAlias = Callable[
    [Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]
]
SurrogateFn: TypeAlias = Callable[
    [Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"], Scalar, Scalar], Float[Array, "B T"]
]
KLFn: TypeAlias = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


def _cleaned(values: Float[Array, "..."], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """[B] broadcast over time, masked entries zeroed, in at least float32."""
    values = values[:, None] if values.ndim < mask.ndim else values
    return clean(values, mask).astype(jnp.promote_types(values.dtype, jnp.float32))


def _constant(values: Float[Array, "..."], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """`_cleaned`, without gradient."""
    return lax.stop_gradient(_cleaned(values, mask))


def _ratio_metrics(
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    clip_low: Scalar,
    clip_high: Scalar,
) -> dict[str, Float[Array, "B T"]]:
    """How far the policy has moved, at each token; `clip_fraction` counts those that the bound holds back."""
    log_ratio = lax.stop_gradient(log_ratio)
    ratio = bounded_exp(log_ratio)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return {
        "ratio": ratio,
        "approx_kl": low_variance_kl(jnp.zeros_like(log_ratio), log_ratio),
        "clip_fraction": (low | high).astype(ratio.dtype),
        "clip_fraction_low": low.astype(ratio.dtype),
        "clip_fraction_high": high.astype(ratio.dtype),
    }


def ppo_clip_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), with two bounds and optional dual clip.

        w_t    = pi(a_t) / pi_old(a_t)
        loss_t = -min(w_t A_t, clip(w_t, 1 - clip_low, 1 + clip_high) A_t)

    The dual clip (Ye et al. 2020, eq. 5) bounds the objective of negative advantages by `dual_clip` A_t.

    Args:
      logp: log-probability in nats of each token under the policy.
      old_logp: under the policy at the start of the update.
      advantages: [B, T] or [B].
      mask: tokens that count.
      clip_low: how far below 1 the ratio may go, > 0.
      clip_high: how far above 1.
      dual_clip: > 1 + clip_high; None for none.
      reduce: how tokens become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `policy_loss`, `ratio`, `approx_kl` (k3 of old to new), `clip_fraction` and
      its two sides.
    """
    logp = _cleaned(logp, mask)
    log_ratio = logp - _constant(old_logp, mask)
    advantages = _constant(advantages, mask)
    objective = clip_surrogate(log_ratio, advantages, mask, clip_low, clip_high)
    if dual_clip is not None:
        objective = jnp.where(advantages < 0, jnp.maximum(objective, dual_clip * advantages), objective)
    loss = -reduce(objective, mask, denominator=denominator)
    per_token = _ratio_metrics(log_ratio, advantages, clip_low, clip_high)
    metrics = {name: reduce(x, mask, denominator=denominator) for name, x in per_token.items()}
    return loss, {"policy_loss": lax.stop_gradient(loss), **metrics}


def grpo_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    kl_coef: Scalar = 0.0,
    entropy: Float[Array, "B T"] | None = None,
    entropy_coef: Scalar = 0.0,
    weights: Float[Array, "B T"] | None = None,
    ratio_fn: RatioFn = token_log_ratio,
    surrogate_fn: SurrogateFn = clip_surrogate,
    kl_fn: KLFn = low_variance_kl,
    kl_ratio_correction: bool = False,
    reduce: Reduction = sequence_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """GRPO (Shao et al. 2024, eq. 3) as a composition; with other parts, its descendants.

        loss_t = -weights_t surrogate(ratio_t, A_t) + kl_coef KL_t - entropy_coef H_t

    | algorithm | what differs from the defaults |
    |---|---|
    | DAPO | `clip_high=0.28`, `reduce=token_mean` |
    | Dr. GRPO | `reduce=constant_length(L)`, advantages with `unit_scale` |
    | GSPO | `ratio_fn=sequence_log_ratio`, `clip_low=3e-4`, `clip_high=4e-4` |

    Args:
      logp: log-probability in nats of each token under the policy.
      old_logp: under the policy at the start of the update (`stop_gradient(logp)` when on policy).
      ref_logp: under the reference; None for no KL term, which then needs no reference model.
      advantages: [B, T] or [B].
      mask: tokens that count.
      clip_low: how far below 1 the ratio may go, > 0.
      clip_high: how far above 1.
      kl_coef: weight of the KL term.
      entropy: of the policy at each token, in nats, with gradient; None for no bonus.
      entropy_coef: weight of the entropy bonus.
      weights: multiply the surrogate at each token, without gradient and without changing the denominator:
        importance weights, off-policy and top-entropy masks, or their product.
      ratio_fn: (logp, old_logp, mask) -> log-ratios; see `policy_ratios`.
      surrogate_fn: (log_ratio, advantages, mask, clip_low, clip_high) -> objective; see `policy_surrogates`.
      kl_fn: (logp, ref_logp) -> KL of each token.
      kl_ratio_correction: multiply the KL by the token's ratio, so that samples of an older policy
        estimate the KL of this one (DeepSeek-V3.2's unbiased KL estimate).
      reduce: how tokens become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `policy_loss`, `ratio`, `approx_kl` (k3 of old to new), `clip_fraction` and its two
      sides; `kl` with a reference, `entropy` with entropy.
    """
    logp = _cleaned(logp, mask)
    old_logp, advantages = _constant(old_logp, mask), _constant(advantages, mask)
    log_ratio = ratio_fn(logp, old_logp, mask)
    objective = surrogate_fn(log_ratio, advantages, mask, clip_low, clip_high)
    if weights is not None:
        objective = objective * _constant(weights, mask)
    loss_per_token = -objective
    per_token = {"policy_loss": -objective, **_ratio_metrics(log_ratio, advantages, clip_low, clip_high)}
    if ref_logp is not None:
        kl = kl_fn(logp, _constant(ref_logp, mask))
        if kl_ratio_correction:
            kl = bounded_exp(token_log_ratio(logp, old_logp, mask)) * kl
        loss_per_token = loss_per_token + kl_coef * kl
        per_token["kl"] = kl
    if entropy is not None:
        per_token["entropy"] = _cleaned(entropy, mask)
        loss_per_token = loss_per_token - entropy_coef * per_token["entropy"]
    loss = reduce(loss_per_token, mask, denominator=denominator)
    metrics = {name: reduce(x, mask, denominator=denominator) for name, x in per_token.items()}
    return loss, lax.stop_gradient(metrics)
