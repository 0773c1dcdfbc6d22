"""Group-relative policy optimization (GRPO) and its family: the baseline is the other answers to the prompt.

The variants (`algorithms.grpo_variants`) differ in small functions (advantage scale, ratio, surrogate, KL,
reduction), all of them fields of `Config`; Shao et al. 2024 (GRPO) are the defaults.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    Rollout,
    Scalar,
    Sequences,
    TokenLogprobs,
)
from rlhf_jax.kernels.advantages import ScaleFn, group_relative_advantages, group_std, reward_spread
from rlhf_jax.kernels.kl import k1, k3
from rlhf_jax.kernels.prepare import cleaned_constant, mask_or_all
from rlhf_jax.losses.policy import KLFn, RatioFn, SurrogateFn, grpo_loss
from rlhf_jax.losses.policy_ratios import token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
from rlhf_jax.losses.reductions import Reduction, sequence_mean


@pytree_dataclass
class GroupStats:
    """Rewards and lengths of groups, from which advantages are computed.

    N prompts have G answers each, in rows B = N x G.

    Attributes:
      rewards: one for each answer, less `kl_coef` times its KL: what is compared.
      scored: answers that have a reward; where False, `rewards` may hold anything.
      lengths: tokens of each answer.
      mask: tokens of the answers that have a reward.
      outcomes: the rewards before the KL was taken from them.
      kl: log-ratio of each token to the reference (k1), in nats; zeros without one.
      kl_coef: weight of the KL in the reward, `Hyper.reward_kl_coef`.
      greedy_rewards: reward of the most likely answer to each prompt; None where the run does not ask.
    """

    rewards: Float[Array, "N G"]
    scored: Bool[Array, "N G"]
    lengths: Int[Array, "N G"]
    mask: Bool[Array, "B T"]
    outcomes: Float[Array, "N G"]
    kl: Float[Array, "B T"]
    kl_coef: Scalar
    greedy_rewards: Float[Array, " N"] | None


AdvantageFn = Callable[[GroupStats], Float[Array, "..."]]
"""GroupStats -> advantages, [N, G] (one for each answer) or [B, T]."""

WeightsFn = Callable[[Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]
"""(old_logp, sampler_logp, mask) -> weights of tokens; see `losses.policy_weights`."""


def grpo_advantages(stats: GroupStats, *, scale_fn: ScaleFn = group_std) -> Float[Array, "N G"]:
    """GRPO's advantages: `kernels.group_relative_advantages`."""
    return group_relative_advantages(stats.rewards, stats.scored, scale_fn=scale_fn)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      group_size: answers to each prompt; rows of one group stand together.
      num_iterations: passes over each batch.
      num_minibatches: optimizer steps in each pass; divides the rows of a batch.
      micro_batches: parts in which a mini-batch is computed; changes memory, not the result.
      advantage_fn: advantages of a group's answers (`algorithms.grpo_variants` has the family's).
      ratio_fn: token or sequence level (`losses.policy_ratios`).
      surrogate_fn: what the ratio and the advantage become (`losses.policy_surrogates`).
      weights_fn: corrects for a sampler that is not the policy at the start of the update (another
        implementation, or an older policy); None for no correction.
      kl_fn: estimator of the KL to the reference in the loss (`kernels.kl`).
      kl_ratio_correction: multiply that KL by the ratio, which makes its gradient that of KL(pi || ref) for
        k1 and k3, on policy or off (`losses.grpo_loss`).
      reduce: how tokens become one number.
    """

    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = 1
    micro_batches: int = 1
    advantage_fn: AdvantageFn = grpo_advantages
    ratio_fn: RatioFn = token_log_ratio
    surrogate_fn: SurrogateFn = clip_surrogate
    weights_fn: WeightsFn | None = None
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
    """

    learning_rate: Scalar = 1e-4
    epsilon_low: Scalar = 0.2
    epsilon_high: Scalar = 0.2
    kl_coef: Scalar = 0.04
    reward_kl_coef: Scalar = 0.0
    entropy_coef: Scalar = 0.0


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      stale_params: trained parameters before the last update, where training is one step off policy; else
        None.
    """

    learner: TrainState
    key: PRNGKeyArray
    stale_params: Params = None

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
    """

    sequences: Sequences
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    advantages: Float[Array, "B *T"]
    weights: Float[Array, "B T"] | None = None


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    frozen: Params = None,
    *,
    one_step_off_policy: bool = False,
) -> State:
    """The state at step 0.

    Args:
      frozen: the part of the model that does not train.
      one_step_off_policy: answers are sampled from the policy of one update before, as by a sampler beside
        the trainer (asynchronous rollouts); give the configuration a `weights_fn` to make up for it.
    """
    stale = jax.tree.map(jnp.copy, params) if one_step_off_policy else None
    return State(init_train_state(params, tx, frozen), key, stale)


def compute_advantages(
    config: Config,
    rewards: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    *,
    scored: Bool[Array, "B"] | None = None,
    kl: Float[Array, "B T"] | None = None,
    kl_coef: Scalar = 0.0,
    greedy_rewards: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B *T"], Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows, and the share of idle groups.

    Args:
      scored: rows that have a reward; all where it is None.
      kl: of each token to the reference, and `kl_coef`, its weight in the reward.
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
) -> tuple[Batch, Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows.

    Args:
      hyper: of it `reward_kl_coef`.
      rewards: one for each answer; anything where `scored` is False.
      old_logp: of the rollout as the scorer gives it.
      scored: answers that have a reward; None for all. The batch is as if the others were not in it.
      greedy_rewards: for advantages that compare with the most likely answer (ReMax).

    Returns:
      (batch, metrics). `frac_reward_zero_std` is the share of groups whose rewards are all equal, which teach
      nothing; `unscorable` the number of answers without a reward, which of the rest of the metrics only
      `tokens` counts; `sampling_logp_diff` the mean |delta log-prob| between sampler and scorer, in nats per
      token.
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
    )
    weights = None if config.weights_fn is None else config.weights_fn(old_logp, rollout.logp, mask)
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
    if weights is not None:
        metrics["is_ratio"] = masked_mean(weights, mask)
    sequences = dataclasses.replace(rollout.sequences, mask=mask)
    return Batch(sequences, old_logp, ref_logp, advantages, weights), metrics


def batch_loss(
    config: Config, hyper: Hyper, score: TokenLogprobs, rows: Batch, denominator: Scalar | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch (`losses.grpo_loss`), or of some of its rows.

    Args:
      score: of the rows under the policy, with gradient.
      denominator: of the whole batch, where the rows are a part of it.
    """
    loss, metrics = grpo_loss(
        score.logp,
        rows.old_logp,
        rows.ref_logp,
        rows.advantages,
        rows.sequences.mask,
        epsilon_low=hyper.epsilon_low,
        epsilon_high=hyper.epsilon_high,
        kl_coef=hyper.kl_coef,
        entropy=score.entropy,
        entropy_coef=hyper.entropy_coef,
        weights=rows.weights,
        ratio_fn=config.ratio_fn,
        surrogate_fn=config.surrogate_fn,
        kl_fn=config.kl_fn,
        kl_ratio_correction=config.kl_ratio_correction,
        reduce=config.reduce,
        denominator=denominator,
    )
    metrics = {"loss": loss, **metrics}
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
        return State(learner, key, stale), metrics

    return update
