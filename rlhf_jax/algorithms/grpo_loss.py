"""The loss of the GRPO family on a batch, or on a part of it."""

import jax.numpy as jnp

from rlhf_jax.algorithms.grpo_config import Batch, Config, Hyper
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar, TokenLogprobs
from rlhf_jax.losses.distillation import top_k_kl
from rlhf_jax.losses.policy import grpo_loss
from rlhf_jax.losses.policy_weights import off_policy_mask


def batch_loss(
    config: Config, hyper: Hyper, score: TokenLogprobs, rows: Batch, denominator: Scalar | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch (`losses.grpo_loss`), or of some of its rows.

    Args:
      score: of the rows under the policy, with gradient.
      denominator: of the whole batch, where the rows are a part of it.
    """
    mask = rows.sequences.mask
    weights, masked = _kept_on_policy(config, hyper, score, rows, denominator)
    loss, metrics = grpo_loss(
        score.logp,
        rows.old_logp,
        rows.ref_logp,
        rows.advantages,
        mask,
        epsilon_low=hyper.epsilon_low,
        epsilon_high=hyper.epsilon_high,
        kl_coef=hyper.kl_coef,
        entropy=score.entropy,
        entropy_coef=hyper.entropy_coef,
        weights=weights,
        old_kl_coef=hyper.kl_cov_coef,
        old_kl_mask=rows.old_kl_mask,
        surrogate_params=hyper.surrogate_params,
        ratio_fn=config.ratio_fn,
        surrogate_fn=config.surrogate_fn,
        kl_fn=config.kl_fn,
        kl_ratio_correction=config.kl_ratio_correction,
        exact_kl=_exact_kl(score, rows),
        reduce=config.reduce,
        denominator=denominator,
    )
    metrics = {"loss": loss, **metrics, **masked}
    # The batch's own `kl` sums over an answer; this one is the loss term, a mean over tokens.
    metrics["kl_loss"] = metrics.pop("kl", jnp.zeros(()))
    return loss, metrics


def _exact_kl(score: TokenLogprobs, rows: Batch) -> Float[Array, "B T"] | None:
    """KL to the reference of the distributions at each place, where the batch has those of the reference."""
    if rows.ref_candidate_logp is None:
        return None
    if score.candidate_logp is None:
        raise UserError("the KL of distributions needs log-probs of `Sequences.candidates` from logprob_fn")
    return top_k_kl(score.candidate_logp, rows.ref_candidate_logp, rows.sequences.mask)


def _kept_on_policy(
    config: Config, hyper: Hyper, score: TokenLogprobs, rows: Batch, denominator: Scalar | None
) -> tuple[Float[Array, "B T"] | Bool[Array, "B T"] | None, Metrics]:
    """Factors of the surrogate, times the mask of `off_policy_threshold`, where there is one."""
    if hyper.off_policy_threshold is None:
        return rows.weights, {}
    if rows.sampler_logp is None:
        raise UserError("off_policy_threshold needs what the sampler reported: give Batch sampler_logp=")
    logps, mask = (score.logp, rows.sampler_logp), rows.sequences.mask
    kept = off_policy_mask(*logps, rows.advantages, mask, threshold=hyper.off_policy_threshold)
    weights = kept if rows.weights is None else rows.weights * kept
    return weights, {"off_policy_masked": config.reduce(1.0 - kept, mask, denominator=denominator)}


def per_token(config: Config, metrics: Metrics, mask: Bool[Array, "B T"], denominator: Scalar) -> Metrics:
    """Metrics of tokens as means over tokens, where the reduction of the loss sums them."""
    scale = denominator / jnp.maximum(jnp.sum(config.reduce.weights(mask)), 1)
    return {
        name: value if name in ("loss", "policy_loss") else scale * value for name, value in metrics.items()
    }
