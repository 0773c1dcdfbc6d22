"""Proximal policy optimisation (Schulman et al. 2017), for language models and for control alike.

`make_update` knows nothing of tokens: it gets log-probs, values, advantages and returns of a batch of
rows, and a score function; with text beside them it is PPO-ptx (Ouyang et al. 2022). `language_batch` is the
part that is RLHF: a reward for the whole answer, a KL penalty at every token, whitening, and the penalty's
controller (Ziegler et al. 2019; Stiennon et al. 2020).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms.moving_reference import SyncHyper, init_reference
from rlhf_jax.algorithms.selection import RankWeightsFn
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import clean, last_unmasked_index, masked_mean
from rlhf_jax.core.minibatches import scan_minibatches, share_of_rows
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
    StepRewards,
    TokenLogprobs,
)
from rlhf_jax.kernels.controllers import adaptive_kl_update, fixed_kl_update
from rlhf_jax.kernels.prepare import cleaned_constant, mask_or_all
from rlhf_jax.kernels.returns import generalized_advantage_estimation, length_adaptive_lambda, token_rewards
from rlhf_jax.kernels.whitening import (
    Moments,
    add_to_moments,
    init_moments,
    moments_variance,
    whiten,
)
from rlhf_jax.losses.policy import ppo_clip_loss, ppo_penalty_loss
from rlhf_jax.losses.reductions import Reduction, token_mean
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.losses.value import clipped_value_loss

OUTLIER = 1e3
"""Standard deviations of all rewards seen beyond which a reward is cut, where rewards are scaled by them."""

PolicyLossFn = Callable[..., tuple[Float[Array, ""], Metrics]]


def clipped(hyper: "Hyper", *args: Array, **reduction: Any) -> tuple[Float[Array, ""], Metrics]:
    """PPO-clip: ratios stay within `epsilon_low` and `epsilon_high`."""
    return ppo_clip_loss(*args, epsilon_low=hyper.epsilon_low, epsilon_high=hyper.epsilon_high, **reduction)


def penalized(hyper: "Hyper", *args: Array, **reduction: Any) -> tuple[Float[Array, ""], Metrics]:
    """PPO-penalty: the KL from the old policy costs `penalty_coef` a nat."""
    return ppo_penalty_loss(*args, kl_coef=hyper.penalty_coef, **reduction)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      num_ppo_epochs: passes over each batch.
      num_minibatches: optimizer steps in each pass; divides the rows of a batch.
      micro_batches: parts in which a mini-batch is computed; changes memory, not the result.
      whiten_advantages: bring advantages to mean 0 and variance 1 over the batch.
      adaptive_kl: move the KL coefficient so that the KL stays near `Hyper.kl_target`.
      scale_rewards: divide rewards by the running standard deviation of all rewards seen, once they differ;
        one that is more than `OUTLIER` of it from their mean is cut there.
      reduce: how tokens become one number.
      group_size: answers to each prompt; those to one stand together.
      filter_fn: which one of them is learned from (PF-PPO, `selection.filter_by_rank`); None for all.
      policy_loss_fn: (hyper, logp, old_logp, advantages, mask, reduce, denominator) -> (loss, metrics), what
        keeps the policy near the old one: `clipped` or `penalized`.
    """

    num_ppo_epochs: int = 2
    num_minibatches: int = 4
    micro_batches: int = 1
    whiten_advantages: bool = True
    adaptive_kl: bool = False
    scale_rewards: bool = False
    reduce: Reduction = token_mean
    group_size: int = 1
    filter_fn: RankWeightsFn | None = None
    policy_loss_fn: PolicyLossFn = clipped


@pytree_dataclass
class Hyper:
    """Hyperparameters of PPO that a sweep may vary (array leaves).

    Attributes:
      epsilon_low: how far below 1 a ratio may go.
      epsilon_high: how far above 1.
      penalty_coef: weight of the KL from the old policy, in `penalized`.
      cliprange_value: how far a value may move in one update; infinity for no bound.
      value_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus.
      gamma: discount per step.
      gae_lambda: lambda of GAE.
      critic_gae_lambda: lambda of the returns that the values learn, where it is another: decoupled GAE
        (VC-PPO, Yuan et al. 2025, arXiv 2503.01491, with 1); None for the same.
      gae_alpha: alpha of length-adaptive GAE (VAPO, Yue et al. 2025, arXiv 2504.05118, with 0.05), which
        takes the place of `gae_lambda` in the advantages; None for one lambda at every length.
      kl_coef: weight of the per-token KL penalty in the reward; where the adaptive controller starts.
      kl_target: KL per answer in nats that the controller aims at.
      kl_horizon: answers over which the controller reacts.
      missing_eos_penalty: taken from the reward of an answer that did not end.
      target_kl: a mini-batch whose KL from the old policy (nats per token) is above this ends the update.
      ptx_coef: weight of the loss on text in PPO-ptx (gamma; 27.8 in InstructGPT, appendix C.4).
      positive_lm_coef: weight of the loss on right answers (mu of VAPO, with 0.1); None for no such loss.
      positive_threshold: an answer whose reward is above this is right.
      sync: how the reference follows the policy, where `State.ref_params` says that it does.
    """

    learning_rate: Scalar = 1e-4
    epsilon_low: Scalar = 0.2
    epsilon_high: Scalar = 0.2
    penalty_coef: Scalar = 1.0
    cliprange_value: Scalar = 0.2
    value_coef: Scalar = 0.5
    entropy_coef: Scalar = 0.0
    gamma: Scalar = 1.0
    gae_lambda: Scalar = 0.95
    critic_gae_lambda: Scalar | None = None
    gae_alpha: Scalar | None = None
    kl_coef: Scalar = 0.05
    kl_target: Scalar = 6.0
    kl_horizon: Scalar = 10_000.0
    missing_eos_penalty: Scalar = 1.0
    target_kl: Scalar = jnp.inf
    ptx_coef: Scalar = 27.8
    positive_lm_coef: Scalar | None = None
    positive_threshold: Scalar = 0.0
    sync: SyncHyper = SyncHyper()


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      kl_coef: the KL penalty's weight as the controller left it.
      reward_moments: of all rewards seen, for their scaling.
      ref_params: the reference's own, where it follows the policy (`moving_reference`); else None.
    """

    learner: TrainState
    key: PRNGKeyArray
    kl_coef: Float[Array, ""]
    reward_moments: Moments
    ref_params: Params = None


@pytree_dataclass
class Batch:
    """Rows of experience, [B, T] each.

    Attributes:
      inputs: whatever the score function takes; leaves share the first axis B.
      mask: actions that count.
      old_logp: log-probs under the policy at the start of the update.
      old_values: values at the start of the update.
      positive: rows of right answers, for `Hyper.positive_lm_coef`; None without.
    """

    inputs: Any
    mask: Bool[Array, "B T"]
    old_logp: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    positive: Bool[Array, "B"] | None = None


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    hyper: Hyper,
    frozen: Params = None,
    *,
    moving_reference: bool = False,
) -> State:
    """The state at step 0.

    Args:
      frozen: the part of the models that does not train.
      moving_reference: the reference follows `params["policy"]`, as `hyper.sync` says.
    """
    kl_coef = jnp.asarray(hyper.kl_coef, jnp.float32)
    reference = init_reference(params["policy"]) if moving_reference else None
    return State(init_train_state(params, tx, frozen), key, kl_coef, init_moments(), reference)


def make_update(
    config: Config,
    logprob_fn: LogprobFn,
    tx: optax.GradientTransformation,
    ptx_logprob_fn: LogprobFn | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """`update(state, hyper, batch, ptx=None) -> (state, metrics)`: all epochs over one batch.

    With `ptx`, sequences of text, it is PPO-ptx (InstructGPT, Ouyang et al. 2022, eq. 2): every mini-batch
    has its own share of the text, whose loss is added to that of PPO.

        loss = loss_PPO - ptx_coef E_text[log pi(x)]

    The paper's expectation is over texts; here it is the mean over the tokens of the mini-batch's share,
    as the loss of pre-training is. The metric `ptx_loss` is it, in nats per token.

    Args:
      ptx_logprob_fn: (params, text) -> log-probs of the policy at temperature 1; needed for `ptx`, whose rows
        num_ppo_epochs x num_minibatches x micro_batches divides.

    Raises:
      UserError: text that nothing scores, or that cannot be shared out.
    """

    def update(
        state: State, hyper: Hyper, batch: Batch, ptx: Sequences | None = None
    ) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)

        def step(carry: tuple[TrainState, Int[Array, ""]], part: Batch):
            learner, number = carry
            text = share_of_rows(ptx, number, config.num_ppo_epochs * config.num_minibatches)
            totals = _totals(config, part, text)

            def loss_fn(params: Params, rows: tuple[Batch, Sequences | None]):
                experience, some = rows
                score = logprob_fn(params, experience.inputs)
                loss, metrics = _loss(config, hyper, score, experience, totals)
                if some is None:
                    return loss, metrics
                if ptx_logprob_fn is None:
                    raise UserError("PPO-ptx: nothing scores the text: give make_update ptx_logprob_fn")
                logp = ptx_logprob_fn(params, some).logp
                ptx_loss, of_text = cross_entropy_loss(logp, some.mask, denominator=totals["text"])
                loss += hyper.ptx_coef * ptx_loss
                return loss, {**metrics, "loss": loss, "ptx_loss": of_text["loss"]}

            gradients, loss, metrics = accumulate_gradients(
                loss_fn, learner, (part, text), micro_batches=config.micro_batches
            )
            learner, guard = apply_gradients(
                learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
            )
            return (learner, number + 1), {**metrics, **guard}, metrics["approx_kl"] > hyper.target_kl

        (learner, _), metrics = scan_minibatches(
            step,
            (state.learner, jnp.int32(0)),
            batch,
            shuffle_key,
            epochs=config.num_ppo_epochs,
            minibatches=config.num_minibatches,
        )
        return dataclasses.replace(state, learner=learner, key=key), metrics

    return update


def _totals(config: Config, rows: Batch, text: Sequences | None) -> dict[str, Float[Array, ""]]:
    """Denominators of a mini-batch, whatever the parts in which it is computed."""
    totals = {"actions": config.reduce.total(rows.mask)}
    if rows.positive is not None:
        totals["positive"] = token_mean.total(rows.mask & rows.positive[:, None])
    if text is not None:
        totals["text"] = token_mean.total(text.mask)
    return totals


def _loss(
    config: Config, hyper: Hyper, score: TokenLogprobs, rows: Batch, totals: dict[str, Float[Array, ""]]
) -> tuple[Float[Array, ""], Metrics]:
    """Policy loss + value loss - entropy bonus (Schulman et al. 2017, eq. 9); where it has a weight, the loss
    on right answers beside them (VAPO): their mean negative log-likelihood, in nats per token.
    """
    reduction = {"reduce": config.reduce, "denominator": totals["actions"]}
    policy_loss, policy_metrics = config.policy_loss_fn(
        hyper, score.logp, rows.old_logp, rows.advantages, rows.mask, **reduction
    )
    value_loss, value_metrics = clipped_value_loss(
        score.value, rows.old_values, rows.returns, rows.mask, clip=hyper.cliprange_value, **reduction
    )
    entropy = config.reduce(score.entropy, rows.mask, denominator=totals["actions"])
    loss = policy_loss + hyper.value_coef * value_loss - hyper.entropy_coef * entropy
    metrics = {"entropy": entropy, **policy_metrics, **value_metrics}
    if hyper.positive_lm_coef is not None and rows.positive is not None:
        mask = rows.mask & rows.positive[:, None]
        positive_loss, of_right = cross_entropy_loss(score.logp, mask, denominator=totals["positive"])
        loss += hyper.positive_lm_coef * positive_loss
        metrics["positive_lm_loss"] = of_right["loss"]
    return loss, {"loss": loss, **metrics}


def language_batch(
    config: Config,
    state: State,
    hyper: Hyper,
    rollout: Rollout,
    score: TokenLogprobs,
    ref_logp: Float[Array, "B T"],
    rewards: Float[Array, "B"],
    *,
    scored: Bool[Array, "B"] | None = None,
    steps: StepRewards | None = None,
) -> tuple[State, Batch, Metrics]:
    """Turns sampled answers into a PPO batch; moves the KL controller and the reward moments.

        r_t = -kl_coef (logp_t - ref_logp_t) + [t ends a step] its reward
              + [t = last] (reward - penalty if unfinished)

    Args:
      score: of the rollout under the policy that sampled it, with values.
      ref_logp: of the same tokens under the frozen reference.
      rewards: of whole answers; anything where `scored` is False.
      scored: answers that have a reward; None for all. The batch is as if the others were not in it.
      steps: process rewards beside those of whole answers; None for none.

    Returns:
      (state, batch, metrics). `kl` is the mean over answers of the summed log-ratio to the reference, in
      nats; `sampling_logp_diff` the mean |delta log-prob| between sampler and scorer, in nats per token;
      `unscorable` the number of answers without a reward, which of the rest only `tokens` counts;
      `reward_outliers` the share of rewards that were cut (`scale_rewards`);
      `step_reward` the mean process reward of a step, and `steps` how many an answer has.
    """
    scored = mask_or_all(scored, rewards)
    mask, rewards = rollout.sequences.mask & scored[:, None], clean(rewards, scored)
    ends = jnp.zeros_like(mask) if steps is None else steps.ends & mask
    earned = jnp.zeros(mask.shape) if steps is None else cleaned_constant(steps.rewards, ends)
    kept, outliers = _cut_outliers(rewards, state.reward_moments) if config.scale_rewards else (rewards, 0)
    moments = add_to_moments(state.reward_moments, kept + jnp.sum(earned, axis=1), scored)
    scale = _reward_scale(moments) if config.scale_rewards else 1.0
    outcome = kept / scale - hyper.missing_eos_penalty * ~rollout.finished
    log_ratio = jnp.where(mask, score.logp - ref_logp, 0)
    of_tokens = token_rewards(outcome, log_ratio, mask, kl_coef=state.kl_coef) + earned / scale
    advantages, returns = _estimates(hyper, of_tokens, score.value, mask)
    kl = masked_mean(jnp.sum(log_ratio, axis=1), scored)
    control = adaptive_kl_update if config.adaptive_kl else fixed_kl_update
    kl_coef = control(
        state.kl_coef, kl, target=hyper.kl_target, horizon=hyper.kl_horizon, num_steps=jnp.sum(scored)
    )
    mean, raw_mean = masked_mean(rewards, scored), masked_mean(advantages, mask)
    metrics = {
        "kl": kl,
        "kl_coef": state.kl_coef,
        "reward": mean,
        "reward_std": jnp.sqrt(masked_mean(jnp.square(rewards - mean), scored)),
        "penalised_reward": masked_mean(jnp.sum(of_tokens, axis=1), scored),
        "unscorable": jnp.sum(~scored),
        "unscorable_share": jnp.mean(~scored, dtype=jnp.float32),
        "reward_outliers": masked_mean(jnp.broadcast_to(outliers, scored.shape), scored),
        "advantage_std": jnp.sqrt(masked_mean(jnp.square(advantages - raw_mean), mask)),
        "length": masked_mean(jnp.sum(mask, axis=1), scored),
        "finished": masked_mean(rollout.finished, scored),
        "sampling_logp_diff": masked_mean(jnp.abs(score.logp - rollout.logp), mask),
        "tokens": jnp.sum(rollout.sequences.mask),
    }
    if steps is not None:
        metrics["step_reward"] = masked_mean(steps.rewards, ends)
        metrics["steps"] = masked_mean(jnp.sum(ends, axis=1), scored)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    positive = None if hyper.positive_lm_coef is None else scored & (rewards > hyper.positive_threshold)
    batch = Batch(rollout.sequences, mask, score.logp, score.value, advantages, returns, positive)
    return dataclasses.replace(state, kl_coef=kl_coef, reward_moments=moments), batch, metrics


def _cut_outliers(rewards: Float[Array, "B"], moments: Moments) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """(rewards within `OUTLIER` deviations of the mean of those seen, which were not); all of them at first.

    A single reward of 1e15 would otherwise set the scale, and make all later ones nothing, for ever.
    """
    bound = OUTLIER * jnp.sqrt(moments_variance(moments))
    bound = jnp.where((moments.count > 0) & (bound > 0), bound, jnp.inf)
    kept = jnp.clip(rewards, moments.mean - bound, moments.mean + bound)
    return kept, kept != rewards


def _estimates(
    hyper: Hyper, rewards: Float[Array, "B T"], values: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(advantages, returns) by GAE; with a lambda of its own each, where `hyper` has them."""
    is_last = jnp.arange(mask.shape[1]) == last_unmasked_index(mask)[:, None]
    arrays = (rewards, values, jnp.where(is_last, 0.0, hyper.gamma), jnp.zeros(mask.shape[0]), mask)
    policy_lambda = hyper.gae_lambda
    if hyper.gae_alpha is not None:
        policy_lambda = length_adaptive_lambda(mask, alpha=hyper.gae_alpha)
    value_lambda = hyper.gae_lambda if hyper.critic_gae_lambda is None else hyper.critic_gae_lambda
    advantages, returns = generalized_advantage_estimation(*arrays, gae_lambda=policy_lambda)
    if policy_lambda is not value_lambda:
        returns = generalized_advantage_estimation(*arrays, gae_lambda=value_lambda)[1]
    return advantages, returns


def _reward_scale(moments: Moments) -> Float[Array, ""]:
    """Standard deviation of the rewards; 1 where they have all been equal, which would blow them up."""
    deviation = jnp.sqrt(moments_variance(moments))
    return jnp.where(deviation > 1e-6 * jnp.abs(moments.mean), deviation, 1.0)
