"""GRPO and its family: policy gradients whose baseline is the other answers to the same prompt.

The members differ in small functions (advantage scale, ratio, surrogate, KL, reduction), all of them fields
of `Config`; Shao et al. 2024 (GRPO) are the defaults.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.optimization import Learner, accumulate_gradients, apply_gradients, init_learner
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Float,
    Metrics,
    Params,
    PRNGKeyArray,
    Rollout,
    Scalar,
    ScoreFn,
    Sequences,
)
from rlhf_jax.kernels.advantages import group_relative_advantages
from rlhf_jax.kernels.kl import k3
from rlhf_jax.losses.policy import KLFn, RatioFn, SurrogateFn, grpo_loss
from rlhf_jax.losses.policy_ratios import token_log_ratio
from rlhf_jax.losses.policy_surrogates import clip_surrogate
from rlhf_jax.losses.reductions import Reduction, sequence_mean

AdvantageFn = Callable[[Float[Array, "N G"]], Float[Array, "N G"]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      group_size: answers to each prompt; rows of one group stand together.
      epochs: passes over each batch.
      minibatches: optimizer steps in each pass; divides the rows of a batch.
      micro_batches: parts in which a mini-batch is computed; changes memory, not the result.
      advantage_fn: rewards [N, G] -> advantages [N, G].
      ratio_fn: token or sequence level (`losses.policy_ratios`).
      surrogate_fn: what the ratio and the advantage become (`losses.policy_surrogates`).
      kl_fn: estimator of the KL to the reference in the loss.
      reduce: how tokens become one number.
    """

    group_size: int = 8
    epochs: int = 1
    minibatches: int = 1
    micro_batches: int = 1
    advantage_fn: AdvantageFn = group_relative_advantages
    ratio_fn: RatioFn = token_log_ratio
    surrogate_fn: SurrogateFn = clip_surrogate
    kl_fn: KLFn = k3
    reduce: Reduction = sequence_mean


@pytree_dataclass
class Hyper:
    """What a sweep may vary.

    Attributes:
      clip_low: how far below 1 a ratio may go.
      clip_high: how far above 1.
      kl_coef: weight of the KL to the reference in the loss.
      entropy_coef: weight of the entropy bonus.
    """

    learning_rate: Scalar = 1e-4
    clip_low: Scalar = 0.2
    clip_high: Scalar = 0.2
    kl_coef: Scalar = 0.02
    entropy_coef: Scalar = 0.0


@pytree_dataclass
class State:
    """All that a resume needs."""

    learner: Learner
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Sampled answers with their advantages.

    Attributes:
      old_logp: log-probs under the policy that sampled the answers.
      ref_logp: under the frozen reference; None without one.
      advantages: one for each answer.
    """

    sequences: Sequences
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    advantages: Float[Array, "B"]


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_learner(params, tx, frozen), key)


def make_batch(
    config: Config,
    rollout: Rollout,
    rewards: Float[Array, "B"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
) -> tuple[Batch, Metrics]:
    """Advantages within each group of `config.group_size` neighbouring rows.

    Args:
      old_logp: of the rollout as the scorer gives it.

    Returns:
      (batch, metrics). `zero_std_groups` is the share of groups whose rewards are all equal, which teach
      nothing; `mismatch` the mean |delta log-prob| between sampler and scorer, in nats per token.
    """
    mask = rollout.sequences.mask
    grouped = rewards.reshape(-1, config.group_size)
    advantages = config.advantage_fn(grouped).reshape(-1)
    metrics = {
        "reward": jnp.mean(rewards),
        "reward_std": jnp.std(rewards),
        "zero_std_groups": jnp.mean(jnp.ptp(grouped, axis=1) == 0),
        "length": jnp.mean(jnp.sum(mask, axis=1)),
        "finished": jnp.mean(rollout.finished),
        "mismatch": masked_mean(jnp.abs(old_logp - rollout.logp), mask),
        "tokens": jnp.sum(mask),
    }
    if ref_logp is not None:
        metrics["kl"] = jnp.mean(jnp.sum(jnp.where(mask, old_logp - ref_logp, 0), axis=1))
    return Batch(rollout.sequences, old_logp, ref_logp, advantages), metrics


def make_update(
    config: Config, score_fn: ScoreFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one batch."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)

        def step(learner: Learner, part: Batch):
            denominator = config.reduce.total(part.sequences.mask)

            def loss_fn(params: Params, rows: Batch):
                score = score_fn(params, rows.sequences)
                loss, metrics = grpo_loss(
                    score.logp,
                    rows.old_logp,
                    rows.ref_logp,
                    rows.advantages,
                    rows.sequences.mask,
                    clip_low=hyper.clip_low,
                    clip_high=hyper.clip_high,
                    kl_coef=hyper.kl_coef,
                    entropy=score.entropy,
                    entropy_coef=hyper.entropy_coef,
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
            epochs=config.epochs,
            minibatches=config.minibatches,
        )
        return dataclasses.replace(state, learner=learner, key=key), metrics

    return update
