"""Training steps of GRPO and PPO: from a rollout and its rewards to a new state.

Stages compile them, whole runs under `jit` are made of them, and plans count them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, ppo, selection
from rlhf_jax.algorithms.grpo_control import control
from rlhf_jax.algorithms.moving_reference import sync_reference, with_params
from rlhf_jax.algorithms.replay import replay_groups
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean, masked_sum
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Int,
    Metrics,
    Params,
    Rollout,
    Sequences,
    StepRewards,
    TokenLogprobs,
)
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.kernels.kl import k1
from rlhf_jax.kernels.prepare import mask_or_all
from rlhf_jax.rollout.completions import describe_rows
from rlhf_jax.rollout.dynamic_sampling import take_rows
from rlhf_jax.rollout.packed_rows import Layout, columns_of, packed

S = TypeVar("S", grpo.State, ppo.State)

ReferenceFn = Callable[[Any, Params], Params]
"""(learner, original) -> the frozen reference; `original` is what the learner does not hold of it."""


def whole_reference(learner: Any, original: Params) -> Params:
    """The reference of full training: the learner holds nothing of it."""
    del learner
    return original


def make_grpo_train_step(
    config: grpo.Config,
    logprob_fn: LogprobFn,
    tx: optax.GradientTransformation,
    reference_fn: ReferenceFn | None = whole_reference,
    top_k_fn: Callable[[Params, Sequences], tuple[Array, Array]] | None = None,
    *,
    describes_rows: bool = False,
) -> Callable[..., tuple[grpo.State, Metrics]]:
    """Training step of the GRPO family: log-probs of the answers under policy and reference, advantages,
    and the update.

    Args:
      reference_fn: None where nothing weighs the KL to a reference: then none scores the answers, and the
        metrics have no `kl`.
      top_k_fn: the reference's log-probs and ids of K tokens at each place, at the temperature of
        `logprob_fn`, for a KL of distributions in the loss; None for that of the tokens that were sampled.
      describes_rows: put numbers of each answer among the metrics, as `completions.describe_rows` gives them.

    Returns:
      `train_step(state, hyper, original, rollout, rewards, scored=None, greedy_rewards=None, steps=None,
      reward_terms=None, values=None, layouts=()) -> (state, metrics)`; `scored` marks the answers that have a
      reward, `steps` are process rewards, `layouts` say how answers are packed to be scored
      (`packed_rows.packed`), and the others are what `grpo.make_batch` takes.

    Raises:
      UserError: groups are replayed, which keep no distributions of the reference.
    """
    if config.num_replayed and top_k_fn is not None:
        raise UserError(
            "num_replayed: groups to replay keep no distributions of the reference: take k1, k2 or k3"
        )

    def train_step(
        state: grpo.State,
        hyper: grpo.Hyper,
        original: Params,
        rollout: Rollout,
        rewards: Float[Array, " B"],
        scored: Bool[Array, " B"] | None = None,
        greedy_rewards: Float[Array, " N"] | None = None,
        steps: StepRewards | None = None,
        reward_terms: Float[Array, "B K"] | None = None,
        values: Float[Array, " N"] | None = None,
        layouts: Sequence[Layout] = (),
    ) -> tuple[grpo.State, Metrics]:
        score_fn = packed(logprob_fn, layouts)
        computed = columns_per_token(rollout, layouts)
        learner, ref_params, ref_logp, top_k = state.learner, state.ref_params, None, None
        if reference_fn is not None:
            reference = (
                reference_fn(learner, original) if ref_params is None else with_params(learner, ref_params)
            )
            # The reference goes through experts of its own.
            own = dataclasses.replace(rollout.sequences, experts=None)
            ref_logp = score_fn(reference, own).logp
            top_k = None if top_k_fn is None else top_k_fn(reference, own)
        counted = rollout.sequences.mask & mask_or_all(scored, rewards)[:, None]

        def batch_fn(
            state: grpo.State, old: TokenLogprobs
        ) -> tuple[grpo.State, grpo.Hyper, grpo.Batch, Metrics]:
            state, moved_hyper, moved = _controlled(state, hyper, old, ref_logp, counted)
            batch_key = None
            if hyper.clip_cov_fraction is not None:
                key, batch_key = jax.random.split(state.key)
                state = dataclasses.replace(state, key=key)
            batch, described = grpo.make_batch(
                config,
                moved_hyper,
                rollout,
                rewards,
                old.logp,
                ref_logp,
                scored=scored,
                greedy_rewards=greedy_rewards,
                steps=steps,
                entropy=old.entropy,
                collision=old.collision,
                values=values,
                reward_terms=reward_terms,
                reference_top_k=top_k,
                key=batch_key,
            )
            # Of pruned answers the rows of the batch are some: nothing says whose they are.
            if describes_rows and len(batch.sequences.mask) == len(rewards):
                described |= describe_rows(batch.advantages, old.logp, ref_logp, rollout.sequences.mask)
            return state, moved_hyper, batch, {**described, **moved}

        if config.one_pass:
            candidates = None if top_k is None else top_k[1]
            answers = dataclasses.replace(rollout.sequences, candidates=candidates)
            update = grpo.make_one_pass_update(config, score_fn, tx)
            state, hyper, metrics = update(state, answers, batch_fn)
            return _synced(state, hyper, learner.steps), {**metrics, **computed}
        old = score_fn(learner.all_params, rollout.sequences)
        state, hyper, batch, described = batch_fn(state, old)
        if state.replay is not None:
            earned = 0.0 if steps is None else masked_sum(steps.rewards, steps.ends & counted, axis=1)
            state, batch, replayed = _replayed(config, state, batch, rewards + earned, scored)
            described |= replayed
        state, metrics = grpo.make_update(config, score_fn, tx)(state, hyper, batch)
        return _synced(state, hyper, learner.steps), {**described, **metrics, **computed}

    return train_step


def columns_per_token(rollout: Rollout, layouts: Sequence[Layout]) -> Metrics:
    """Columns that a pass over the answers computes for each token that counts."""
    sequences = rollout.sequences
    counted = jnp.maximum(jnp.sum(sequences.mask), 1)
    return {"columns_per_token": columns_of(sequences, layouts) / counted}


def _replayed(
    config: grpo.Config,
    state: grpo.State,
    batch: grpo.Batch,
    rewards: Float[Array, " B"],
    scored: Bool[Array, " B"] | None,
) -> tuple[grpo.State, grpo.Batch, Metrics]:
    """`replay.replay_groups`, which keeps the groups that differ in what they have earned."""
    assert state.replay is not None
    shape = (-1, config.group_size)
    differs = reward_spread(rewards.reshape(shape), None if scored is None else scored.reshape(shape)) > 0
    key, replay_key = jax.random.split(state.key)
    kept, batch, metrics = replay_groups(
        state.replay, batch, differs, replay_key, num_groups=config.num_replayed
    )
    return dataclasses.replace(state, key=key, replay=kept), batch, metrics


def _controlled(
    state: grpo.State,
    hyper: grpo.Hyper,
    old: TokenLogprobs,
    ref_logp: Float[Array, "B T"] | None,
    mask: Bool[Array, "B T"],
) -> tuple[grpo.State, grpo.Hyper, Metrics]:
    """`grpo_control.control` by what is measured on the answers that have a reward."""
    answers = jnp.sum(jnp.any(mask, axis=1))
    kl = None if ref_logp is None else masked_sum(k1(old.logp, ref_logp), mask) / jnp.maximum(answers, 1)
    return control(state, hyper, entropy=masked_mean(old.entropy, mask), kl=kl, num_answers=answers)


def make_ppo_train_step(
    config: ppo.Config,
    logprob_fn: LogprobFn,
    ref_logprob_fn: LogprobFn,
    tx: optax.GradientTransformation,
    reference_fn: ReferenceFn = whole_reference,
    ptx_logprob_fn: LogprobFn | None = None,
    *,
    describes_rows: bool = False,
) -> Callable[..., tuple[ppo.State, Metrics]]:
    """Training step of PPO: log-probs and values of the answers, the KL to the reference, advantages, and all
    epochs.

    Args:
      logprob_fn: of policy and value.
      ref_logprob_fn: of the reference.
      ptx_logprob_fn: of the policy on text at temperature 1, for PPO-ptx; None without.
      describes_rows: put numbers of each answer among the metrics, as `completions.describe_rows` gives them.

    Returns:
      `train_step(state, hyper, original, rollout, rewards, scored=None, steps=None, ptx=None, layouts=()) ->
      (state, metrics)`; `steps` are process rewards, `ptx` is text (`ppo.make_update`), `layouts` say how
      answers are packed to be scored (`packed_rows.packed`).
    """

    def train_step(
        state: ppo.State,
        hyper: ppo.Hyper,
        original: Params,
        rollout: Rollout,
        rewards: Float[Array, " B"],
        scored: Bool[Array, " B"] | None = None,
        steps: StepRewards | None = None,
        ptx: Sequences | None = None,
        layouts: Sequence[Layout] = (),
    ) -> tuple[ppo.State, Metrics]:
        score_fn, ref_score_fn = (packed(fn, layouts) for fn in (logprob_fn, ref_logprob_fn))
        described: Metrics = {}
        if config.filter_fn is not None:
            described["sampled_reward"] = masked_mean(rewards, mask_or_all(scored, rewards))
            earned = 0.0 if steps is None else masked_sum(steps.rewards, steps.ends, axis=1)
            state, chosen = _chosen(config, config.filter_fn, state, rewards + earned, scored)
            rollout, rewards, scored, steps = take_rows((rollout, rewards, scored, steps), chosen)
        score = score_fn(state.learner.all_params, rollout.sequences)
        learner = state.learner
        if state.ref_params is None:
            reference = reference_fn(learner, original)
        else:
            whole = with_params(learner, {**learner.params, "policy": state.ref_params})
            reference = models.merge_with_base(whole, "policy")
        ref_logp = ref_score_fn(reference, rollout.sequences).logp
        state, batch, of_batch = ppo.language_batch(
            config, state, hyper, rollout, score, ref_logp, rewards, scored=scored, steps=steps
        )
        if describes_rows:
            described |= describe_rows(batch.advantages, score.logp, ref_logp, batch.mask)
        update = ppo.make_update(config, score_fn, tx, ptx_logprob_fn)
        state, metrics = update(state, hyper, batch, ptx)
        state = _synced(state, hyper, learner.steps)
        return state, {**described, **of_batch, **metrics, **columns_per_token(rollout, layouts)}

    return train_step


def _synced(state: S, hyper: Any, before: Int[Array, ""]) -> S:
    """The state with its reference where the policy has led it, if it follows."""
    if state.ref_params is None:
        return state
    params = state.learner.params["policy"] if isinstance(state, ppo.State) else state.learner.params
    steps = {"before": before, "after": state.learner.steps}
    reference = sync_reference(state.ref_params, params, hyper.sync, **steps)
    return dataclasses.replace(state, ref_params=reference)


def _chosen(
    config: ppo.Config,
    filter_fn: selection.RankWeightsFn,
    state: ppo.State,
    rewards: Float[Array, " B"],
    scored: Bool[Array, " B"] | None,
) -> tuple[ppo.State, Int[Array, " N"]]:
    """Rows of the answers that PF-PPO learns from, one to each prompt, by all that each has earned."""
    key, filter_key = jax.random.split(state.key)
    shape = (-1, config.group_size)
    counts = None if scored is None else scored.reshape(shape)
    rows = selection.filter_by_rank(rewards.reshape(shape), counts, filter_key, weights_fn=filter_fn)
    return dataclasses.replace(state, key=key), rows
