"""Parts of a GRPO update: static choices, hyperparameters, state, and batch."""

import dataclasses
from collections.abc import Mapping

from rlhf_jax.algorithms.group_advantages import AdvantageFn, grpo_advantages
from rlhf_jax.algorithms.moving_reference import SyncHyper
from rlhf_jax.core.train_state import TrainState
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.kernels.kl import k3
from rlhf_jax.losses.corrections import Correction
from rlhf_jax.losses.policy import KLFn, RatioFn, SurrogateFn
from rlhf_jax.losses.policy_ratios import token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
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
      num_replayed: groups of earlier steps that are learned from in each step again, where the state has any
        (`replay.replay_groups`).
      advantage_fn: advantages of a group's answers (`algorithms.grpo_variants` has the family's).
      ratio_fn: token or sequence level (`losses.policy_ratios`).
      surrogate_fn: what the ratio and the advantage become (`losses.policy_surrogates`).
      correction: for a sampler that is not the policy at the start of the update (another implementation, or
        an older policy); its thresholds are in `Hyper`. None for no correction.
      kl_fn: estimator of the KL to the reference in the loss (`kernels.kl`).
      kl_ratio_correction: multiply that KL by the ratio, which makes its gradient that of KL(pi || ref) for
        k1 and k3, on policy or off (`losses.grpo_loss`).
      ratio_to_reference: the surrogate's ratio is to the reference instead of the old policy (A*-PO).
      reduce: how tokens become one number.
    """

    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = 1
    micro_batches: int = 1
    num_kept: int = 0
    num_replayed: int = 0
    advantage_fn: AdvantageFn = grpo_advantages
    ratio_fn: RatioFn = token_log_ratio
    surrogate_fn: SurrogateFn = clip_surrogate
    correction: Correction | None = None
    kl_fn: KLFn = k3
    kl_ratio_correction: bool = False
    ratio_to_reference: bool = False
    reduce: Reduction = sequence_mean

    @property
    def one_pass(self) -> bool:
        """True where a batch is taken once and whole: its old log-probs are those of its own update."""
        once = self.num_iterations == self.num_minibatches == self.micro_batches == 1
        return once and not self.num_kept and not self.num_replayed


@pytree_dataclass
class Hyper:
    """Hyperparameters of the GRPO family that a sweep may vary.

    Attributes:
      epsilon_low: how far below 1 a ratio may go.
      epsilon_high: how far above 1.
      kl_coef: weight of the KL to the reference in the loss (beta; 0.04 in GRPO's paper, section 4.2).
      reward_kl_coef: weight of the KL to the reference in the reward, before the baseline (RLOO).
      advantage_kl_coef: weight of the KL to the reference in the advantage, behind baseline and scaling: each
        token's advantage is less by its own log(pi_old / pi_ref). Its gradient is that of the KL at each
        token, the tokens before it held as they are; None for none.
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
      clip_cov_fraction: share of the batch's tokens that lose their gradient, drawn from those whose
        covariance is from `clip_cov_low` to `clip_cov_high` (`losses.clip_cov_mask`); None for none.
      kl_cov_fraction: share of the batch's tokens, those of highest covariance, that a KL of weight
        `kl_cov_coef` holds to the old policy (`losses.kl_cov_mask`); None for none.
      value_beta: of the optimal values of prompts, where they are estimated (`kernels.optimal_values`).
      surrogate_params: numbers of the surrogate that are its own, by its keywords (DRO's `tau`).
      target_entropy: nats a token that the entropy bonus holds the policy at, whose weight then begins at
        `entropy_coef` and moves by `entropy_coef_step`; None for a fixed weight (`algorithms.grpo_control`).
      kl_target: nats an answer that the KL to the reference is held at, over `kl_horizon` answers, by moving
        the weights of the KL together; None for fixed weights.
    """

    learning_rate: Scalar = 1e-4
    epsilon_low: Scalar = 0.2
    epsilon_high: Scalar = 0.2
    kl_coef: Scalar = 0.04
    reward_kl_coef: Scalar = 0.0
    advantage_kl_coef: Scalar | None = None
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
    clip_cov_fraction: Scalar | None = None
    clip_cov_low: Scalar = 1.0
    clip_cov_high: Scalar = 5.0
    kl_cov_fraction: Scalar | None = None
    kl_cov_coef: Scalar = 1.0
    value_beta: Scalar = 0.5
    surrogate_params: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    target_entropy: Scalar | None = None
    entropy_coef_step: Scalar = 0.005
    kl_target: Scalar | None = None
    kl_horizon: Scalar = 10_000.0


@pytree_dataclass
class Control:
    """Coefficients that controllers move.

    Attributes:
      entropy_coef: weight of the entropy bonus, while the entropy is below its target.
      kl_scale: factor of the weights of the KL, 1 at first.
    """

    entropy_coef: Float[Array, ""]
    kl_scale: Float[Array, ""]


@pytree_dataclass
class Batch:
    """Sampled answers with their advantages.

    Attributes:
      old_logp: log-probs under what the surrogate's ratio is to: the policy that sampled the answers, the
        sampler itself (`Correction.bypass`), or the reference (`Config.ratio_to_reference`).
      ref_logp: under the frozen reference; None without one.
      advantages: one for each answer, or for each token.
      weights: factors of the tokens' surrogates; None for none.
      sampler_logp: as the sampler reported it; None where nothing asks for it.
      old_kl_mask: tokens that a KL holds to the old policy (KL-Cov); None for none.
      ref_candidate_logp: what the reference gives `sequences.candidates`, where the KL in the loss is that of
        distributions; None where the tokens that were sampled estimate it.
    """

    sequences: Sequences
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    advantages: Float[Array, "B *T"]
    weights: Float[Array, "B T"] | None = None
    sampler_logp: Float[Array, "B T"] | None = None
    old_kl_mask: Bool[Array, "B T"] | None = None
    ref_candidate_logp: Float[Array, "B T K"] | None = None


@pytree_dataclass
class Replay:
    """Recent groups, as rows of a batch that has all of its parts.

    Attributes:
      batch: K groups of R rows each.
      filled: groups that are there.
      cursor: where the next one goes.
    """

    batch: Batch
    filled: Bool[Array, " K"]
    cursor: Int[Array, ""]


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      stale_params: trained parameters before the last update, where training is one step off policy; else
        None.
      ref_params: the reference's own, where it follows the policy (`moving_reference`); else None.
      control: coefficients that move (`grpo_control`); None where all stay.
      replay: groups that may be learned from again (`replay`); None for none.
    """

    learner: TrainState
    key: PRNGKeyArray
    stale_params: Params = None
    ref_params: Params = None
    control: Control | None = None
    replay: Replay | None = None

    @property
    def rollout_params(self) -> Params:
        """The policy that samples the next answers."""
        if self.stale_params is None:
            return self.learner.all_params
        return dataclasses.replace(self.learner, params=self.stale_params).all_params
