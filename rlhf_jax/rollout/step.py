"""From a rollout and its rewards to a new state: what the scripts compile, and what plans are made of."""

from collections.abc import Callable
from typing import Any

from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Params, Rollout

ReferenceFn = Callable[[Any, Params], Params]
"""(learner, original) -> the frozen reference; `original` is what the learner does not hold of it."""


def make_group_learn(
    config: grpo.Config,
    logprob_fn: LogprobFn,
    update: Callable[..., tuple[grpo.State, Metrics]],
    hyper: grpo.Hyper,
    reference_fn: ReferenceFn,
) -> Callable[..., tuple[grpo.State, Metrics]]:
    """`learn(state, original, rollout, rewards, scored=None, greedy_rewards=None)` of the GRPO family:
    log-probs of the answers under policy and reference, comparison of those that have a reward, update.
    """

    def learn(
        state: grpo.State,
        original: Params,
        rollout: Rollout,
        rewards: Float[Array, " B"],
        scored: Bool[Array, " B"] | None = None,
        greedy_rewards: Float[Array, " N"] | None = None,
    ) -> tuple[grpo.State, Metrics]:
        reference = reference_fn(state.learner, original)
        old_logp = logprob_fn(state.learner.all_params, rollout.sequences).logp
        ref_logp = logprob_fn(reference, rollout.sequences).logp
        answers = {"scored": scored, "greedy_rewards": greedy_rewards}
        batch, described = grpo.make_batch(config, hyper, rollout, rewards, old_logp, ref_logp, **answers)
        state, metrics = update(state, hyper, batch)
        return state, {**described, **metrics}

    return learn


def make_ppo_learn(
    config: ppo.Config,
    logprob_fn: LogprobFn,
    ref_logprob_fn: LogprobFn,
    update: Callable[..., tuple[ppo.State, Metrics]],
    hyper: ppo.Hyper,
    reference_fn: ReferenceFn,
) -> Callable[..., tuple[ppo.State, Metrics]]:
    """`learn(state, original, rollout, rewards, scored=None)` of PPO: log-probs and values of the answers,
    the KL to the reference, advantages, and all epochs.

    Args:
      logprob_fn: of policy and value.
      ref_logprob_fn: of the reference.
    """

    def learn(
        state: ppo.State,
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

    return learn
