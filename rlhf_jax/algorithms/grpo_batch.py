"""From sampled answers and their rewards to a batch of the GRPO family: advantages, corrections, masks."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.group_advantages import GroupStats, check_rows
from rlhf_jax.algorithms.grpo_config import Batch, Config, Hyper
from rlhf_jax.algorithms.process_supervision import add_step_advantages
from rlhf_jax.algorithms.selection import largest_advantages
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray, Rollout, Scalar, StepRewards
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.kernels.kl import k1
from rlhf_jax.kernels.prepare import cleaned_constant, mask_or_all
from rlhf_jax.losses.corrections import apply_correction
from rlhf_jax.losses.covariance import clip_cov_mask, kl_cov_mask
from rlhf_jax.losses.policy_weights import batch_mask


def compute_advantages(
    config: Config,
    rewards: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    *,
    scored: Bool[Array, "B"] | None = None,
    kl: Float[Array, "B T"] | None = None,
    kl_coef: Scalar = 0.0,
    greedy_rewards: Float[Array, " N"] | None = None,
    terms: Float[Array, "B K"] | None = None,
    term_weights: Float[Array, " K"] | None = None,
    values: Float[Array, " N"] | None = None,
    old_logp: Float[Array, "B T"] | None = None,
    collision: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B *T"], Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows, and the share of idle groups.

    Args:
      scored: rows that have a reward; all where it is None.
      kl: of each token to the reference; `kl_coef`: its weight in the reward.
      terms: each reward, and `term_weights`, `values`, `old_logp`, `collision`: see `GroupStats`.
    """
    check_rows(config.advantage_fn, len(rewards))
    scored = mask_or_all(scored, rewards)
    mask = mask & scored[:, None]
    kl = jnp.zeros(mask.shape) if kl is None else cleaned_constant(kl, mask)
    shape = (-1, config.group_size)
    outcomes = rewards.reshape(shape)
    stats = GroupStats(
        rewards=outcomes - kl_coef * jnp.sum(kl, axis=1).reshape(shape),
        scored=scored.reshape(shape),
        lengths=jnp.sum(mask, axis=1).reshape(shape),
        mask=mask,
        outcomes=outcomes,
        kl=kl,
        kl_coef=kl_coef,
        greedy_rewards=greedy_rewards,
        terms=None if terms is None else terms.reshape(*shape, terms.shape[1]),
        term_weights=term_weights,
        values=values,
        old_logp=old_logp,
        collision=collision,
    )
    advantages = config.advantage_fn(stats)
    if advantages.shape == outcomes.shape:
        advantages = advantages.reshape(-1)
    idle = reward_spread(outcomes, stats.scored) == 0
    return advantages, {"frac_reward_zero_std": jnp.mean(idle)}


def make_batch(
    config: Config,
    hyper: Hyper,
    rollout: Rollout,
    rewards: Float[Array, "B"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    *,
    scored: Bool[Array, "B"] | None = None,
    greedy_rewards: Float[Array, " N"] | None = None,
    steps: StepRewards | None = None,
    entropy: Float[Array, "B T"] | None = None,
    collision: Float[Array, "B T"] | None = None,
    values: Float[Array, " N"] | None = None,
    reward_terms: Float[Array, "B K"] | None = None,
    reference_top_k: tuple[Float[Array, "B T K"], Int[Array, "B T K"]] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Batch, Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows, corrected for the sampler.

    Args:
      hyper: of it the weight of the KL in the reward, and the thresholds of correction and masks.
      rewards: one for each answer; anything where `scored` is False.
      old_logp: of the rollout as the scorer gives it.
      scored: answers that have a reward; None for all. The batch is as if the others were not in it.
      greedy_rewards: for advantages that compare with the most likely answer (ReMax).
      steps: process rewards, compared apart (`process_supervision.add_step_advantages`); None for none.
      entropy: at each token, in nats, for `hyper.top_entropy_fraction`.
      collision: sum of squared probabilities at each token, for the optimal token baseline (OTB).
      values: of the prompts, for advantages that are rewards less them (A*-PO).
      reward_terms: without `hyper.reward_weights`; NaN where one is not meant for an answer (GDPO).
      reference_top_k: (log-probs, ids) of K tokens at each place under the reference, all of them or its
        likeliest, for a KL of distributions in the loss (`losses.top_k_kl`); None for that of tokens.
      key: decides which tokens are detached, for `hyper.clip_cov_fraction`.

    Returns:
      (batch, metrics). `frac_reward_zero_std` is the share of groups whose rewards are all equal, which teach
      nothing; `unscorable` the number of answers without a reward, which of the rest of the metrics only
      `tokens` counts; `sampling_logp_diff` the mean |delta log-prob| between sampler and scorer, in nats a
      token; a correction's are those of `losses.apply_correction`.
    """
    scored = mask_or_all(scored, rewards)
    mask = rollout.sequences.mask & scored[:, None]
    kl = None if ref_logp is None else cleaned_constant(k1(old_logp, ref_logp), mask)
    advantages, described = compute_advantages(
        config,
        rewards,
        mask,
        scored=scored,
        kl=kl,
        kl_coef=hyper.reward_kl_coef,
        greedy_rewards=greedy_rewards,
        terms=reward_terms,
        term_weights=hyper.reward_weights,
        values=values,
        old_logp=old_logp,
        collision=collision,
    )
    if steps is not None:
        advantages, described = add_step_advantages(
            advantages, rewards, scored, steps, mask, group_size=config.group_size
        )
    if hyper.advantage_kl_coef is not None:
        advantages = _less_kl(advantages, kl, hyper.advantage_kl_coef)
    weights, accepted, corrected = _correct(config, hyper, old_logp, rollout.logp, mask)
    kept = batch_mask(
        old_logp,
        rollout.logp,
        advantages,
        mask,
        entropy=entropy,
        top_entropy_fraction=hyper.top_entropy_fraction,
        second_moment_threshold=hyper.second_moment_threshold,
    )
    kept = _without_clipped(hyper, kept, old_logp, advantages, accepted, key)
    if kept is not None:
        weights = kept.astype(jnp.float32) if weights is None else weights * kept
    held = None
    if hyper.kl_cov_fraction is not None:
        held = kl_cov_mask(old_logp, advantages, accepted, fraction=hyper.kl_cov_fraction)
    ref_candidate_logp, candidates = (None, None) if reference_top_k is None else reference_top_k
    batch = Batch(
        sequences=dataclasses.replace(rollout.sequences, mask=accepted, candidates=candidates),
        old_logp=_anchor(config, rollout, old_logp, ref_logp),
        ref_logp=ref_logp,
        advantages=advantages,
        weights=weights,
        sampler_logp=None if hyper.off_policy_threshold is None else rollout.logp,
        old_kl_mask=held,
        ref_candidate_logp=ref_candidate_logp,
    )
    metrics = _describe(rollout, rewards, scored, mask, old_logp, kl)
    return _largest(config, batch), {**metrics, **described, **corrected}


def _less_kl(
    advantages: Float[Array, "B *T"], kl: Float[Array, "B T"] | None, coef: Scalar
) -> Float[Array, "B T"]:
    """Advantages of tokens, each less its own KL to the reference."""
    if kl is None:
        raise UserError("advantage_kl_coef weighs the KL to the reference: give make_batch ref_logp")
    return advantages.reshape(len(kl), -1) - coef * kl


def _correct(
    config: Config,
    hyper: Hyper,
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"] | None, Bool[Array, "B T"], Metrics]:
    """(weights, tokens that count, metrics) of the correction for the sampler, if there is one."""
    if config.correction is None:
        return None, mask, {}
    return apply_correction(
        config.correction,
        old_logp,
        sampler_logp,
        mask,
        is_clip_low=hyper.is_clip_low,
        is_clip_high=hyper.is_clip_high,
        rejection_low=hyper.rejection_low,
        rejection_high=hyper.rejection_high,
    )


def _without_clipped(
    hyper: Hyper,
    kept: Bool[Array, "B T"] | None,
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B *T"],
    mask: Bool[Array, "B T"],
    key: PRNGKeyArray | None,
) -> Bool[Array, "B T"] | None:
    """The tokens that are kept so far, less those that Clip-Cov detaches."""
    if hyper.clip_cov_fraction is None:
        return kept
    if key is None:
        raise UserError("clip_cov_fraction draws the tokens that it detaches: give make_batch key=")
    attached = clip_cov_mask(
        old_logp,
        advantages,
        mask,
        key,
        fraction=hyper.clip_cov_fraction,
        low=hyper.clip_cov_low,
        high=hyper.clip_cov_high,
    )
    return attached if kept is None else kept & attached


def _anchor(
    config: Config, rollout: Rollout, old_logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"] | None
) -> Float[Array, "B T"]:
    """Log-probs that the surrogate's ratio is to."""
    if config.ratio_to_reference:
        if ref_logp is None:
            raise UserError("ratio_to_reference: the ratio is to the reference: give make_batch ref_logp")
        return ref_logp
    return rollout.logp if config.correction and config.correction.bypass else old_logp


def _describe(
    rollout: Rollout,
    rewards: Float[Array, "B"],
    scored: Bool[Array, "B"],
    mask: Bool[Array, "B T"],
    old_logp: Float[Array, "B T"],
    kl: Float[Array, "B T"] | None,
) -> Metrics:
    """Metrics of the answers."""
    mean = masked_mean(rewards, scored)
    metrics = {
        "reward": mean,
        "reward_std": jnp.sqrt(masked_mean(jnp.square(rewards - mean), scored)),
        "unscorable": jnp.sum(~scored),
        "unscorable_share": jnp.mean(~scored, dtype=jnp.float32),
        "length": masked_mean(jnp.sum(mask, axis=1), scored),
        "finished": masked_mean(rollout.finished, scored),
        "sampling_logp_diff": masked_mean(jnp.abs(old_logp - rollout.logp), mask),
        "tokens": jnp.sum(rollout.sequences.mask),
    }
    if kl is not None:
        metrics["kl"] = masked_mean(jnp.sum(kl, axis=1), scored)
    return metrics


def _largest(config: Config, batch: Batch) -> Batch:
    """The rows of largest advantages in each group, where the others are pruned (CPPO)."""
    if not config.num_kept:
        return batch
    if batch.advantages.ndim > 1:
        raise UserError("num_kept: answers are pruned by one advantage each, and tokens have their own here")
    rows = largest_advantages(batch.advantages.reshape(-1, config.group_size), keep=config.num_kept)
    return jax.tree.map(lambda leaf: leaf[rows], batch)
