"""Rewards of PPO: of functions, of reward models, also one on the policy's own base, and of steps."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.types import Params, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import Policy
from rlhf_jax.rewards import ensembles
from rlhf_jax.rewards.functions import Scored, no_reward
from rlhf_jax.rollout.dynamic_sampling import without_failed
from rlhf_jax.rollout.engines import failed_rows
from rlhf_jax.rollout.rewards import RolloutReward
from rlhf_jax.stages import inputs
from rlhf_jax.stages.entry import NOTHING, Given
from rlhf_jax.stages.reward_specs import make_ensemble_fn, make_process_reward_fn, make_reward_fn

if TYPE_CHECKING:
    from rlhf_jax.stages.ppo import Options


def make_rollout_reward(options: "Options", tokenizer: Tokenizer, given: Given = NOTHING) -> RolloutReward:
    """Reward of a rollout: by reward functions, by a reward model, or by several."""
    if len(options.reward_model) < 2:
        named = options.reward_model and not given.rewards
        rewards = options.reward_model if named else inputs.rewards_of(options.prompts, given)
        return make_reward_fn(rewards or [no_reward], tokenizer, calls=options.prompts.reward_calls)
    combine_fn = {
        "mean": ensembles.ensemble_mean,
        "worst": ensembles.ensemble_worst_case,
        "uncertainty": functools.partial(
            ensembles.ensemble_uncertainty_weighted, coef=options.uncertainty_coef
        ),
    }[options.ensemble]
    return make_ensemble_fn([Path(folder) for folder in options.reward_model], tokenizer, combine_fn)


def make_score_fn(
    options: "Options", model: Policy, reward: Params | None, given: Given = NOTHING
) -> Callable[[Params, Rollout, list[PromptExample]], tuple[Any, ...]]:
    """`score(params, rollout, prompts) -> (scored, (rewards, which there are), rewards of steps)`.

    The rewards are placed for the update. Without knowing which there are (None), all are there; without
    rewards of steps (None), none.

    Args:
      reward: what a reward model has of its own in `params`; None where rewards come from elsewhere.
    """
    score_reward = jax.jit(model.make_shared_reward_fn())
    reward_fn = make_rollout_reward(options, model.tokenizer, given) if reward is None else None
    steps_fn = make_process_reward_fn(options.process, model.tokenizer, given.process_reward)

    def score(params: Params, rollout: Rollout, chosen: list[PromptExample]) -> tuple[Any, ...]:
        steps = steps_fn and steps_fn(rollout)
        if reward_fn is None:
            rewards = score_reward(params, rollout.sequences)
            if options.engine == "local":
                return Scored(rewards, np.zeros(len(chosen), bool)), (rewards, None), steps
            scored = Scored(np.asarray(rewards), np.zeros(len(rewards), bool))
        else:
            scored = reward_fn.score(rollout, chosen)
        if options.engine != "local":
            scored = without_failed(scored, failed_rows(rollout))
        return scored, distributed.shard_batch((scored.rewards, ~scored.unscorable)), steps

    return score
