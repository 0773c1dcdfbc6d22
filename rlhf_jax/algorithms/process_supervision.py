"""Process supervision in the GRPO family (DeepSeekMath): advantages of steps beside those of answers."""

import jax.numpy as jnp

from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.types import Array, Bool, Float, Metrics, StepRewards
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.kernels.steps import process_supervision_advantages


def add_step_advantages(
    advantages: Float[Array, "B *T"],
    rewards: Float[Array, "B"],
    scored: Bool[Array, "B"],
    steps: StepRewards,
    mask: Bool[Array, "B T"],
    *,
    group_size: int,
) -> tuple[Float[Array, "B T"], Metrics]:
    """Advantages of tokens: those of their answers, and those of their own and of later steps
    (`kernels.process_supervision_advantages`).

    Args:
      advantages: of whole answers, one for each of them or for each token.
      rewards: of whole answers, and `scored`, which of them have one.
      steps: process rewards.
      mask: tokens of the answers that have a reward.

    Returns:
      (advantages, metrics): `step_reward` is the mean of a step, `steps` how many an answer has, and
      `frac_reward_zero_std` the share of groups that differ neither in rewards nor in those of steps.
    """
    ends = steps.ends & mask
    of_steps = process_supervision_advantages(steps.rewards, ends, mask, group_size=group_size)
    groups = (rewards.shape[0] // group_size, -1)
    of_answers = reward_spread(rewards.reshape(groups), scored.reshape(groups))
    of_their_steps = reward_spread(steps.rewards.reshape(groups), ends.reshape(groups))
    metrics = {
        "frac_reward_zero_std": jnp.mean((of_answers == 0) & (of_their_steps == 0)),
        "step_reward": masked_mean(steps.rewards, ends),
        "steps": masked_mean(jnp.sum(ends, axis=1), scored),
    }
    return of_steps + (advantages if advantages.ndim == 2 else advantages[:, None]), metrics
