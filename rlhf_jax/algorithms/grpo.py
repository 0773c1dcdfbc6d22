"""Group-relative policy optimization (GRPO) and its family: the baseline is the other answers to the prompt.

The variants (`algorithms.grpo_variants`) differ in small functions (advantage scale, ratio, surrogate, KL,
reduction), all of them fields of `Config`; Shao et al. 2024 (GRPO) are the defaults.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms.group_advantages import AdvantageFn, GroupStats, grpo_advantages
from rlhf_jax.algorithms.moving_reference import SyncHyper, init_reference
from rlhf_jax.algorithms.process_supervision import add_step_advantages
from rlhf_jax.algorithms.selection import largest_advantages
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Metrics,
    Params,
    PRNGKeyArray,
    Rollout,
    Scalar,
    Sequences,
    StepRewards,
    TokenLogprobs,
)
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.kernels.kl import k1, k3
from rlhf_jax.kernels.prepare import cleaned_constant, mask_or_all
from rlhf_jax.losses.corrections import Correction, apply_correction
from rlhf_jax.losses.policy import KLFn, RatioFn, SurrogateFn, grpo_loss
from rlhf_jax.losses.policy_ratios import token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
from rlhf_jax.losses.policy_weights import batch_mask, off_policy_mask
from rlhf_jax.losses.reductions import Reduction, sequence_mean


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      group_size: answers to each prompt; rows of one group stand together.
      num_iterations: passes over each batch.
      num_minibatches: optimizer steps in each pass; divides the rows of a batch.
      micro_batches: parts in which a mini-batch is computed; changes memory, not the result.
      num_kept: answers to each prompt that are learned from, those of largest advantage (CPPO); 0 for all.
      advantage_fn: advantages of a group's answers (`algorithms.grpo_variants` has the family's).
      ratio_fn: token or sequence level (`losses.policy_ratios`).
      surrogate_fn: what the ratio and the advantage become (`losses.policy_surrogates`).
      correction: for a sampler that is not the policy at the start of the update (another implementation, or
        an older policy); its thresholds are in `Hyper`. None for no correction.
      kl_fn: estimator of the KL to the reference in the loss (`kernels.kl`).
      kl_ratio_correction: multiply that KL by the ratio, which makes its gradient that of KL(pi || ref) for
        k1 and k3, on policy or off (`losses.grpo_loss`).
      reduce: how tokens become one number.
    """

    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = 1
    micro_batches: int = 1
    num_kept: int = 0
    advantage_fn: AdvantageFn = grpo_advantages
    ratio_fn: RatioFn = token_log_ratio
    surrogate_fn: SurrogateFn = clip_surrogate
    correction: Correction | None = None
    kl_fn: KLFn = k3
    kl_ratio_correction: bool = False
    reduce: Reduction = sequence_mean


@pytree_dataclass
class Hyper:
    """Hyperparameters of the GRPO family that a sweep may vary.

    Attributes:
      epsilon_low: how far below 1 a ratio may go.
      epsilon_high: how far above 1.
      kl_coef: weight of the KL to the reference in the loss (beta; 0.04 in GRPO's paper, section 4.2).
      reward_kl_coef: weight of the KL to the reference in the reward, before the baseline (RLOO).
      entropy_coef: weight of the entropy bonus.
      sync: how the reference follows the policy, where `State.ref_params` says that it does.
      is_clip_low: least importance weight of the correction; is_clip_high: the largest.
      rejection_low: lower threshold of the correction's rules, one for all or one for each.
      rejection_high: upper threshold of the rules, likewise.
      off_policy_threshold: nats a token at which answers of negative advantage are dropped as too unlikely
        (`losses.off_policy_mask`); None for never.
      second_moment_threshold: nats squared at which the drift of the batch is cut
        (`losses.second_moment_mask`); None for never.
      top_entropy_fraction: share of the batch's tokens, those of highest entropy, that the surrogate counts
        (`losses.top_entropy_mask`); None for all.
      reward_weights: of the terms of the reward, for advantages that take them apart (GDPO).
    """

    learning_rate: Scalar = 1e-4
    epsilon_low: Scalar = 0.2
    epsilon_high: Scalar = 0.2
    kl_coef: Scalar = 0.04
    reward_kl_coef: Scalar = 0.0
    entropy_coef: Scalar = 0.0
    sync: SyncHyper = SyncHyper()
    is_clip_low: Scalar = 0.0
    is_clip_high: Scalar = 2.0
    rejection_low: Scalar | Float[Array, " R"] = 0.5
    rejection_high: Scalar | Float[Array, " R"] = 2.0
    off_policy_threshold: Scalar | None = None
    second_moment_threshold: Scalar | None = None
    top_entropy_fraction: Scalar | None = None
    reward_weights: Float[Array, " K"] | None = None


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      stale_params: trained parameters before the last update, where training is one step off policy; else
        None.
      ref_params: the reference's own, where it follows the policy (`moving_reference`); else None.
    """

    learner: TrainState
    key: PRNGKeyArray
    stale_params: Params = None
    ref_params: Params = None

    @property
    def rollout_params(self) -> Params:
        """The policy that samples the next answers."""
        if self.stale_params is None:
            return self.learner.all_params
        return dataclasses.replace(self.learner, params=self.stale_params).all_params


@pytree_dataclass
class Batch:
    """Sampled answers with their advantages.

    Attributes:
      old_logp: log-probs under the policy that sampled the answers.
      ref_logp: under the frozen reference; None without one.
      advantages: one for each answer, or for each token.
      weights: factors of the tokens' surrogates; None for none.
      sampler_logp: as the sampler reported it; None where nothing asks for it.
    """

    sequences: Sequences
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    advantages: Float[Array, "B *T"]
    weights: Float[Array, "B T"] | None = None
    sampler_logp: Float[Array, "B T"] | None = None


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    frozen: Params = None,
    *,
    one_step_off_policy: bool = False,
    moving_reference: bool = False,
) -> State:
    """The state at step 0.

    Args:
      frozen: the part of the model that does not train.
      one_step_off_policy: answers are those of the policy one update before, as by a sampler beside the
        trainer (asynchronous rollouts); give the configuration a `correction` to make up for it.
      moving_reference: the reference follows the policy, as `Hyper.sync` says.
    """
    stale = jax.tree.map(jnp.copy, params) if one_step_off_policy else None
    reference = init_reference(params) if moving_reference else None
    return State(init_train_state(params, tx, frozen), key, stale, reference)


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
) -> tuple[Float[Array, "B *T"], Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows, and the share of idle groups.

    Args:
      scored: rows that have a reward; all where it is None.
      kl: of each token to the reference; `kl_coef`: its weight in the reward.
      terms: each reward, and `term_weights`; see `GroupStats`.
    """
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
    reward_terms: Float[Array, "B K"] | None = None,
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
      reward_terms: without `hyper.reward_weights`; NaN where one is not meant for an answer (GDPO).

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
    )
    if steps is not None:
        advantages, described = add_step_advantages(
            advantages, rewards, scored, steps, mask, group_size=config.group_size
        )
    weights, accepted, corrected = None, mask, {}
    if config.correction is not None:
        weights, accepted, corrected = apply_correction(
            config.correction,
            old_logp,
            rollout.logp,
            mask,
            is_clip_low=hyper.is_clip_low,
            is_clip_high=hyper.is_clip_high,
            rejection_low=hyper.rejection_low,
            rejection_high=hyper.rejection_high,
        )
    kept = batch_mask(
        old_logp,
        rollout.logp,
        advantages,
        mask,
        entropy=entropy,
        top_entropy_fraction=hyper.top_entropy_fraction,
        second_moment_threshold=hyper.second_moment_threshold,
    )
    if kept is not None:
        weights = kept.astype(jnp.float32) if weights is None else weights * kept
    mean = masked_mean(rewards, scored)
    metrics = {
        "reward": mean,
        "reward_std": jnp.sqrt(masked_mean(jnp.square(rewards - mean), scored)),
        **described,
        "unscorable": jnp.sum(~scored),
        "unscorable_share": jnp.mean(~scored, dtype=jnp.float32),
        "length": masked_mean(jnp.sum(mask, axis=1), scored),
        "finished": masked_mean(rollout.finished, scored),
        "sampling_logp_diff": masked_mean(jnp.abs(old_logp - rollout.logp), mask),
        "tokens": jnp.sum(rollout.sequences.mask),
    }
    if kl is not None:
        metrics["kl"] = masked_mean(jnp.sum(kl, axis=1), scored)
    sequences = dataclasses.replace(rollout.sequences, mask=accepted)
    anchor = rollout.logp if config.correction and config.correction.bypass else old_logp
    sampler = None if hyper.off_policy_threshold is None else rollout.logp
    batch = Batch(sequences, anchor, ref_logp, advantages, weights, sampler)
    if config.num_kept:
        if advantages.ndim > 1:
            raise UserError(
                "num_kept: answers are pruned by one advantage each, and tokens have their own here"
            )
        rows = largest_advantages(advantages.reshape(-1, config.group_size), keep=config.num_kept)
        batch = jax.tree.map(lambda leaf: leaf[rows], batch)
    return batch, metrics | corrected


def batch_loss(
    config: Config, hyper: Hyper, score: TokenLogprobs, rows: Batch, denominator: Scalar | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch (`losses.grpo_loss`), or of some of its rows.

    Args:
      score: of the rows under the policy, with gradient.
      denominator: of the whole batch, where the rows are a part of it.
    """
    mask, weights, masked = rows.sequences.mask, rows.weights, {}
    if hyper.off_policy_threshold is not None:
        if rows.sampler_logp is None:
            raise UserError("off_policy_threshold needs what the sampler reported: give Batch sampler_logp=")
        logps, bound = (score.logp, rows.sampler_logp), hyper.off_policy_threshold
        kept = off_policy_mask(*logps, rows.advantages, mask, threshold=bound)
        weights = kept if weights is None else weights * kept
        masked["off_policy_masked"] = config.reduce(1.0 - kept, mask, denominator=denominator)
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
        ratio_fn=config.ratio_fn,
        surrogate_fn=config.surrogate_fn,
        kl_fn=config.kl_fn,
        kl_ratio_correction=config.kl_ratio_correction,
        reduce=config.reduce,
        denominator=denominator,
    )
    metrics = {"loss": loss, **metrics, **masked}
    # The batch's own `kl` sums over an answer; this one is the loss term, a mean over tokens.
    metrics["kl_loss"] = metrics.pop("kl", jnp.zeros(()))
    return loss, metrics


def _per_token(config: Config, metrics: Metrics, mask: Bool[Array, "B T"], denominator: Scalar) -> Metrics:
    """Metrics of tokens as means over tokens, where the reduction of the loss sums them."""
    scale = denominator / jnp.maximum(jnp.sum(config.reduce.weights(mask)), 1)
    return {
        name: value if name in ("loss", "policy_loss") else scale * value for name, value in metrics.items()
    }


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one batch."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)

        def step(learner: TrainState, part: Batch):
            mask = part.sequences.mask
            denominator = config.reduce.total(mask)

            def loss_fn(params: Params, rows: Batch):
                return batch_loss(config, hyper, logprob_fn(params, rows.sequences), rows, denominator)

            gradients, loss, metrics = accumulate_gradients(
                loss_fn, learner, part, micro_batches=config.micro_batches
            )
            metrics = _per_token(config, metrics, mask, denominator)
            learner, guard = apply_gradients(
                learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
            )
            return learner, {**metrics, **guard}, jnp.bool_(False)

        learner, metrics = scan_minibatches(
            step,
            state.learner,
            batch,
            shuffle_key,
            epochs=config.num_iterations,
            minibatches=config.num_minibatches,
        )
        stale = None if state.stale_params is None else state.learner.params
        return State(learner, key, stale, state.ref_params), metrics

    return update
