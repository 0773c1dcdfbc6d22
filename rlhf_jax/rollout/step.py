"""Training steps of GRPO and PPO: from a rollout and its rewards to a new state.

Stages compile them, whole runs under `jit` are made of them, and plans count them.
"""

from collections.abc import Callable
from typing import Any

import optax

from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Params, Rollout

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
    reference_fn: ReferenceFn = whole_reference,
) -> Callable[..., tuple[grpo.State, Metrics]]:
    """Training step of the GRPO family: log-probs of the answers under policy and reference, advantages,
    and the update.

    Returns:
      `train_step(state, hyper, original, rollout, rewards, scored=None, greedy_rewards=None,
      reward_terms=None) -> (state, metrics)`; `scored` marks the answers that have a reward.
    """
    update = grpo.make_update(config, logprob_fn, tx)

    def train_step(
        state: grpo.State,
        hyper: grpo.Hyper,
        original: Params,
        rollout: Rollout,
        rewards: Float[Array, " B"],
        scored: Bool[Array, " B"] | None = None,
        greedy_rewards: Float[Array, " N"] | None = None,
        reward_terms: Float[Array, "B K"] | None = None,
    ) -> tuple[grpo.State, Metrics]:
        reference = reference_fn(state.learner, original)
        old = logprob_fn(state.learner.all_params, rollout.sequences)
        ref_logp = logprob_fn(reference, rollout.sequences).logp
        batch, described = grpo.make_batch(
            config,
            hyper,
            rollout,
            rewards,
            old.logp,
            ref_logp,
            scored=scored,
            greedy_rewards=greedy_rewards,
            entropy=old.entropy,
            reward_terms=reward_terms,
        )
        state, metrics = update(state, hyper, batch)
        return state, {**described, **metrics}

    return train_step


def make_ppo_train_step(
    config: ppo.Config,
    logprob_fn: LogprobFn,
    ref_logprob_fn: LogprobFn,
    tx: optax.GradientTransformation,
    reference_fn: ReferenceFn = whole_reference,
) -> Callable[..., tuple[ppo.State, Metrics]]:
    """Training step of PPO: log-probs and values of the answers, the KL to the reference, advantages, and all
    epochs.

    Args:
      logprob_fn: of policy and value.
      ref_logprob_fn: of the reference.

    Returns:
      `train_step(state, hyper, original, rollout, rewards, scored=None) -> (state, metrics)`.
    """
    update = ppo.make_update(config, logprob_fn, tx)

    def train_step(
        state: ppo.State,
        hyper: ppo.Hyper,
        original: Params,
        rollout: Rollout,
        rewards: Float[Array, " B"],
        scored: Bool[Array, " B"] | None = None,
    ) -> tuple[ppo.State, Metrics]:
        score = logprob_fn(state.learner.all_params, rollout.sequences)
        ref_logp = ref_logprob_fn(reference_fn(state.learner, original), rollout.sequences).logp
        state, batch, described = ppo.language_batch(
            config, state, hyper, rollout, score, ref_logp, rewards, scored=scored
        )
        state, metrics = update(state, hyper, batch)
        return state, {**described, **metrics}

    return train_step
