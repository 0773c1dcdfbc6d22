"""Group-relative policy optimization (GRPO) and its family: the baseline is the other answers to the prompt.

The variants (`algorithms.group_members`) differ in small functions (advantage scale, ratio, surrogate, KL,
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
)
from rlhf_jax.kernels.advantages import group_relative_advantages
from rlhf_jax.kernels.kl import k3
from rlhf_jax.losses.policy import KLFn, RatioFn, SurrogateFn, grpo_loss
from rlhf_jax.losses.policy_ratios import token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
from rlhf_jax.losses.reductions import Reduction, sequence_mean


@pytree_dataclass
class GroupStats:
    """Rewards and lengths of groups, from which advantages are computed.

    N prompts have G answers each, in rows B = N x G.

    Attributes:
      rewards: one for each answer.
      lengths: tokens of each answer.
      mask: tokens of the answers.
      kl: log-ratio of each token to the reference, in nats; zeros without one.
      greedy_rewards: reward of the most likely answer to each prompt; None where the run does not ask.
    """

    rewards: Float[Array, "N G"]
    lengths: Int[Array, "N G"]
    mask: Bool[Array, "B T"]
    kl: Float[Array, "B T"]
    greedy_rewards: Float[Array, " N"] | None


AdvantageFn = Callable[[GroupStats], Float[Array, "..."]]
"""GroupStats -> advantages, [N, G] (one for each answer) or [B, T]."""

WeightsFn = Callable[[Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]
"""(old_logp, sampler_logp, mask) -> weights of tokens; see `losses.policy_weights`."""


def grpo_advantages(stats: GroupStats) -> Float[Array, "N G"]:
    """GRPO's advantages: `kernels.group_relative_advantages`."""
    return group_relative_advantages(stats.rewards)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      group_size: answers to each prompt; rows of one group stand together.
      num_iterations: passes over each batch.
      num_minibatches: optimizer steps in each pass; divides the rows of a batch.
      micro_batches: parts in which a mini-batch is computed; changes memory, not the result.
      advantage_fn: advantages of a group's answers (`algorithms.group_members` has the family's).
      ratio_fn: token or sequence level (`losses.policy_ratios`).
      surrogate_fn: what the ratio and the advantage become (`losses.policy_surrogates`).
      weights_fn: corrects for a sampler that is not the policy at the start of the update (another
        implementation, or an older policy); None for no correction.
      kl_fn: estimator of the KL to the reference in the loss.
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
    reduce: Reduction = sequence_mean


@pytree_dataclass
class Hyper:
    """What a sweep may vary.

    Attributes:
      epsilon_low: how far below 1 a ratio may go.
      epsilon_high: how far above 1.
      kl_coef: weight of the KL to the reference in the loss.
      entropy_coef: weight of the entropy bonus.
    """

    learning_rate: Scalar = 1e-4
    epsilon_low: Scalar = 0.2
    epsilon_high: Scalar = 0.2
    kl_coef: Scalar = 0.02
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
    kl: Float[Array, "B T"],
    greedy_rewards: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B *T"], Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows, and the share of idle groups."""
    grouped = rewards.reshape(-1, config.group_size)
    lengths = jnp.sum(mask, axis=1).reshape(grouped.shape)
    advantages = config.advantage_fn(GroupStats(grouped, lengths, mask, kl, greedy_rewards))
    if advantages.shape == grouped.shape:
        advantages = advantages.reshape(-1)
    return advantages, {"frac_reward_zero_std": jnp.mean(jnp.ptp(grouped, axis=1) == 0)}


def make_batch(
    config: Config,
    rollout: Rollout,
    rewards: Float[Array, "B"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    greedy_rewards: Float[Array, " N"] | None = None,
) -> tuple[Batch, Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows.

    Args:
      old_logp: of the rollout as the scorer gives it.
      greedy_rewards: for advantages that compare with the most likely answer (ReMax).

    Returns:
      (batch, metrics). `frac_reward_zero_std` is the share of groups whose rewards are all equal, which teach
      nothing; `sampling_logp_diff` the mean |delta log-prob| between sampler and scorer, in nats per token.
    """
    mask = rollout.sequences.mask
    log_ratio = jnp.zeros_like(old_logp) if ref_logp is None else jnp.where(mask, old_logp - ref_logp, 0)
    advantages, described = compute_advantages(config, rewards, mask, log_ratio, greedy_rewards)
    weights = None if config.weights_fn is None else config.weights_fn(old_logp, rollout.logp, mask)
    metrics = {
        "reward": jnp.mean(rewards),
        "reward_std": jnp.std(rewards),
        **described,
        "length": jnp.mean(jnp.sum(mask, axis=1)),
        "finished": jnp.mean(rollout.finished),
        "sampling_logp_diff": masked_mean(jnp.abs(old_logp - rollout.logp), mask),
        "tokens": jnp.sum(mask),
    }
    if ref_logp is not None:
        metrics["kl"] = jnp.mean(jnp.sum(log_ratio, axis=1))
    if weights is not None:
        metrics["is_ratio"] = masked_mean(weights, mask)
    return Batch(rollout.sequences, old_logp, ref_logp, advantages, weights), metrics


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one batch."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)

        def step(learner: TrainState, part: Batch):
            denominator = config.reduce.total(part.sequences.mask)

            def loss_fn(params: Params, rows: Batch):
                score = logprob_fn(params, rows.sequences)
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
                    reduce=config.reduce,
                    denominator=denominator,
                )
                metrics = {"loss": loss, **metrics}
                # The batch's own `kl` sums over an answer; this one is the loss term, a mean over tokens.
                metrics["kl_loss"] = metrics.pop("kl", jnp.zeros(()))
                return loss, metrics

            gradients, loss, metrics = accumulate_gradients(
                loss_fn, learner, part, micro_batches=config.micro_batches
            )
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
