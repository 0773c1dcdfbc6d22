"""Policy-gradient losses on the log-probabilities of sampled tokens.

All take `(logp, old_logp, advantages, mask, *, ..., reduce=, denominator=)` and return `(loss, metrics)`.
Only `logp` and `entropy` carry gradient. Masked entries may hold anything. `advantages` are [B, T], or [B]
for one a row. Computation is in at least float32.

Every metric is reduced as the loss is, with the same denominator: metrics of micro-batches sum to
those of the batch. All losses report

  `policy_loss`     the surrogate's part of the loss
  `ratio`           pi / pi_old, at the level at which the loss takes it
  `approx_kl`       k3 estimate of KL(pi_old || pi) from single tokens, in nats
  `clip_fraction`   tokens whose ratio has passed the bound on the side to which the advantage pushes, and
                    `clip_fraction_low`, `clip_fraction_high`, its two sides (losses with bounds)
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.numerics import bounded_exp
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.kernels.kl import k3
from rlhf_jax.kernels.prepare import cleaned, cleaned_constant
from rlhf_jax.losses.policy_ratios import RatioFn, token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
from rlhf_jax.losses.reductions import Reduction, sequence_mean, token_mean


@runtime_checkable
class SurrogateFn(Protocol):
    """A surrogate objective; see `policy_surrogates`."""

    def __call__(
        self,
        logp: Float[Array, "B T"],
        log_ratio: Float[Array, "B T"],
        advantages: Float[Array, "B T"],
        mask: Bool[Array, "B T"],
        /,
        *,
        epsilon_low: Scalar,
        epsilon_high: Scalar,
    ) -> Float[Array, "B T"]:
        """The objective to maximise at each token."""
        ...


@runtime_checkable
class KLFn(Protocol):
    """An estimate of KL(pi || ref) at each token."""

    def __call__(self, logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], /) -> Float[Array, "B T"]:
        """The estimate, in nats."""
        ...


def _drift(token_ratio: Float[Array, "B T"], log_ratio: Float[Array, "B T"]) -> dict[str, Array]:
    """How far the policy has moved at each token; `log_ratio` is at the loss's own level."""
    return {
        "ratio": bounded_exp(log_ratio),
        "approx_kl": k3(jnp.zeros_like(token_ratio), token_ratio),
    }


def _clipping(
    log_ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], epsilon_low: Scalar, epsilon_high: Scalar
) -> dict[str, Array]:
    """Where the bounds hold the policy back, at each token."""
    ratio = bounded_exp(log_ratio)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    sides = {"clip_fraction": low | high, "clip_fraction_low": low, "clip_fraction_high": high}
    return {name: side.astype(ratio.dtype) for name, side in sides.items()}


def _reduced(
    loss_per_token: Float[Array, "B T"],
    metrics_per_token: dict[str, Array],
    mask: Bool[Array, "B T"],
    reduce: Reduction,
    denominator: Scalar | None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss and its metrics, all reduced alike."""
    metrics = {
        name: reduce(lax.stop_gradient(values), mask, denominator=denominator)
        for name, values in metrics_per_token.items()
    }
    return reduce(loss_per_token, mask, denominator=denominator), metrics


def reinforce_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """REINFORCE (Williams 1992): loss_t = -A_t log pi(a_t).

    On policy only: `old_logp` enters the metrics, which tell how far off it is.

    Args:
      logp: log-probability in nats of each token under the policy.
      old_logp: under the policy that sampled.
      advantages: [B, T] or [B]; returns minus a baseline.
      mask: tokens that count.
      reduce: how tokens become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `policy_loss`, `ratio`, `approx_kl`.
    """
    logp, old_logp, advantages, mask = check_shapes(
        "reinforce_loss",
        logp=(logp, "B T"),
        old_logp=(old_logp, "B T"),
        advantages=(advantages, "B T|B"),
        mask=(mask, "B T"),
    )
    logp = cleaned(logp, mask)
    log_ratio = logp - cleaned_constant(old_logp, mask)
    loss_per_token = -cleaned_constant(advantages, mask) * logp
    per_token = {"policy_loss": loss_per_token, **_drift(log_ratio, log_ratio)}
    return _reduced(loss_per_token, per_token, mask, reduce, denominator)


def ppo_clip_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar = 0.2,
    epsilon_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), with two bounds and optional dual clip.

        w_t    = pi(a_t) / pi_old(a_t)
        loss_t = -min(w_t A_t, clip(w_t, 1 - epsilon_low, 1 + epsilon_high) A_t)

    The dual clip (Ye et al. 2020, "Mastering Complex Control in MOBA Games") bounds the objective of
    negative advantages from below by dual_clip A_t.

    Args:
      logp: log-probability in nats of each token under the policy.
      old_logp: under the policy at the start of the update.
      advantages: [B, T] or [B].
      mask: tokens that count.
      epsilon_low: how far below 1 the ratio may go, > 0.
      epsilon_high: how far above 1.
      dual_clip: > 1 + epsilon_high; None for none.
      reduce: how tokens become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `policy_loss`, `ratio`, `approx_kl`, `clip_fraction` and its two sides.
    """
    logp, old_logp, advantages, mask = check_shapes(
        "ppo_clip_loss",
        logp=(logp, "B T"),
        old_logp=(old_logp, "B T"),
        advantages=(advantages, "B T|B"),
        mask=(mask, "B T"),
    )
    logp = cleaned(logp, mask)
    log_ratio = logp - cleaned_constant(old_logp, mask)
    advantages = cleaned_constant(advantages, mask)
    objective = clip_surrogate(
        logp, log_ratio, advantages, mask, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=dual_clip
    )
    per_token = {
        "policy_loss": -objective,
        **_drift(log_ratio, log_ratio),
        **_clipping(log_ratio, advantages, epsilon_low, epsilon_high),
    }
    return _reduced(-objective, per_token, mask, reduce, denominator)


def ppo_penalty_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: Scalar,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO with a KL penalty instead of a clip (Schulman et al. 2017, eq. 8).

        loss_t = -w_t A_t + kl_coef KL(pi_old || pi)

    The KL is its k3 estimate, w - 1 - log w: samples are of pi_old, so value and gradient are
    unbiased. Between updates `kernels.adaptive_kl_update` holds it near a target.

    Args:
      logp: log-probability in nats of each token under the policy.
      old_logp: under the policy at the start of the update.
      advantages: [B, T] or [B].
      mask: tokens that count.
      kl_coef: beta.
      reduce: how tokens become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `policy_loss` (without the penalty), `ratio`, `approx_kl`.
    """
    logp, old_logp, advantages, mask = check_shapes(
        "ppo_penalty_loss",
        logp=(logp, "B T"),
        old_logp=(old_logp, "B T"),
        advantages=(advantages, "B T|B"),
        mask=(mask, "B T"),
    )
    log_ratio = cleaned(logp, mask) - cleaned_constant(old_logp, mask)
    drift = _drift(log_ratio, log_ratio)
    surrogate_loss = -drift["ratio"] * cleaned_constant(advantages, mask)
    loss_per_token = surrogate_loss + kl_coef * drift["approx_kl"]
    return _reduced(loss_per_token, {"policy_loss": surrogate_loss, **drift}, mask, reduce, denominator)


def grpo_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    advantages: Float[Array, "..."],
    mask: Bool[Array, "B T"],
    *,
    epsilon_low: Scalar = 0.2,
    epsilon_high: Scalar = 0.2,
    kl_coef: Scalar = 0.0,
    entropy: Float[Array, "B T"] | None = None,
    entropy_coef: Scalar = 0.0,
    weights: Float[Array, "B T"] | Bool[Array, "B T"] | None = None,
    old_kl_coef: Scalar = 0.0,
    old_kl_mask: Bool[Array, "B T"] | None = None,
    surrogate_params: Mapping[str, Scalar] = MappingProxyType({}),
    ratio_fn: RatioFn = token_log_ratio,
    surrogate_fn: SurrogateFn = clip_surrogate,
    kl_fn: KLFn = k3,
    kl_ratio_correction: bool = False,
    exact_kl: Float[Array, "B T"] | None = None,
    reduce: Reduction = sequence_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """GRPO (Shao et al. 2024, eq. 3) as a composition; with other parts, its descendants.

        loss_t = -weights_t surrogate(w_t, A_t) + kl_coef KL_t - entropy_coef H_t
                 + old_kl_coef [t in old_kl_mask] KL(pi_old || pi)_t

    | algorithm | what differs from the defaults |
    |---|---|
    | BNPO, DAPO | `reduce=token_mean`; for DAPO `epsilon_high=0.28` |
    | Dr. GRPO | `reduce=constant_length(L)`, advantages with `unit_scale` |
    | GSPO | `ratio_fn=sequence_log_ratio`, `epsilon_low=3e-4`, `epsilon_high=4e-4` |
    | GSPO-token | `ratio_fn=sequence_token_log_ratio`, bounds as GSPO |
    | LUSPO | as GSPO, with `reduce=sequence_sum` |
    | GMPO | `surrogate_fn=geometric_mean_surrogate`, `epsilon_low=0.4`, `epsilon_high=0.4` |
    | CISPO | `surrogate_fn=cispo_surrogate`, `epsilon_low=1`, `reduce=token_mean` |
    | SAPO | `surrogate_fn=sapo_surrogate` |
    | VESPO | `surrogate_fn=vespo_surrogate`, `reduce=token_mean` |
    | DPPO | `surrogate_fn=dppo_tv_surrogate`, bounds 0.15, or `dppo_kl_surrogate`, bounds 0.05 |
    | GPG | `surrogate_fn=log_likelihood_surrogate`, advantages with `unit_scale`, `reduce=token_mean` |
    | M2PO | `surrogate_fn=importance_surrogate`, `weights` of `second_moment_mask`, `reduce=token_mean` |
    | DRO | `surrogate_fn=dro_surrogate`, `reduce=sequence_sum` |
    | A*-PO | `surrogate_fn=advantage_regression_surrogate`, the reference as `old_logp`, `sequence_sum` |
    | Clip-Cov | `surrogate_fn=importance_surrogate`, `weights` of `clip_cov_mask`, `reduce=token_mean` |
    | KL-Cov | `surrogate_fn=importance_surrogate`, `old_kl_mask` of `kl_cov_mask`, `reduce=token_mean` |

    The order of weights, KL and entropy is TRL's: weights touch the surrogate alone. Unlike TRL's, the
    entropy bonus is reduced as the rest is, so that micro-batches sum exactly.

    Args:
      logp: log-probability in nats of each token under the policy.
      old_logp: under the policy at the start of the update (`stop_gradient(logp)` when on policy).
      ref_logp: under the reference; None for no KL term, which then needs no reference model.
      advantages: [B, T] or [B].
      mask: tokens that count.
      epsilon_low: how far below 1 the ratio may go, > 0.
      epsilon_high: how far above 1.
      kl_coef: weight of the KL term.
      entropy: of the policy at each token, in nats, with gradient; None for no bonus.
      entropy_coef: weight of the entropy bonus.
      weights: multiply the surrogate at each token, without gradient and without changing the denominator;
        those of `policy_weights`, or their product.
      old_kl_coef: weight of the KL from the old policy, where `old_kl_mask` says.
      old_kl_mask: tokens that are held to the old policy by the k3 estimate of that KL, which is unbiased for
        samples of it (KL-Cov; its authors' code takes |log w|); None for none.
      surrogate_params: numbers of the surrogate that are its own, by its keywords; they may be traced.
      ratio_fn: (logp, old_logp, mask) -> log-ratios; see `policy_ratios`.
      surrogate_fn: (logp, log_ratio, advantages, mask, *, epsilon_low, epsilon_high) -> objective; see
        `policy_surrogates`.
      kl_fn: (logp, ref_logp) -> KL of each token: k1, k2 or k3 of `kernels`, whose docstrings state
        their biases.
      kl_ratio_correction: multiply the KL by the loss's ratio, so that samples of an older policy estimate
        the KL of this one (DeepSeek-V3.2, 2025; TRL's `use_bias_correction_kl`). With token ratios the
        gradient of k1 and k3 is then that of KL(pi || ref), on policy or off; that of k2 is not.
      exact_kl: KL(pi || ref) of the distributions at each place (`losses.top_k_kl`), with gradient, in the
        place of what `kl_fn` estimates from the one token that was sampled; None for the estimate.
      reduce: how tokens become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `policy_loss`, `ratio`, `approx_kl`, `clip_fraction` and its two sides; `kl` with a
      reference, `entropy` with entropy, `old_kl` with an `old_kl_mask`.
    """
    logp, old_logp, ref_logp, advantages, mask, entropy, weights, old_kl_mask, exact_kl = check_shapes(
        "grpo_loss",
        logp=(logp, "B T"),
        old_logp=(old_logp, "B T"),
        ref_logp=(ref_logp, "B T"),
        advantages=(advantages, "B T|B"),
        mask=(mask, "B T"),
        entropy=(entropy, "B T"),
        weights=(weights, "B T"),
        old_kl_mask=(old_kl_mask, "B T"),
        exact_kl=(exact_kl, "B T"),
    )
    logp = cleaned(logp, mask)
    old_logp, advantages = cleaned_constant(old_logp, mask), cleaned_constant(advantages, mask)
    log_ratio = ratio_fn(logp, old_logp, mask)
    bounds = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    objective = surrogate_fn(logp, log_ratio, advantages, mask, **bounds, **surrogate_params)
    if weights is not None:
        objective = objective * cleaned_constant(weights, mask)
    loss_per_token = -objective
    per_token = {
        "policy_loss": loss_per_token,
        **_drift(logp - old_logp, log_ratio),
        **_clipping(log_ratio, advantages, epsilon_low, epsilon_high),
    }
    kl = None if exact_kl is None else cleaned(exact_kl, mask)
    if kl is None and ref_logp is not None:
        kl = kl_fn(logp, cleaned_constant(ref_logp, mask))
    if kl is not None:
        if kl_ratio_correction:
            kl = bounded_exp(log_ratio) * kl
        loss_per_token = loss_per_token + kl_coef * kl
        per_token["kl"] = kl
    if entropy is not None:
        per_token["entropy"] = cleaned(entropy, mask)
        loss_per_token = loss_per_token - entropy_coef * per_token["entropy"]
    if old_kl_mask is not None:
        per_token["old_kl"] = old_kl_mask * per_token["approx_kl"]
        loss_per_token = loss_per_token + old_kl_coef * per_token["old_kl"]
    return _reduced(loss_per_token, per_token, mask, reduce, denominator)
