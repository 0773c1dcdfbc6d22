"""Advantage functions of the GRPO family: each takes `GroupStats`, and leaves out what has no reward."""

import functools

from rlhf_jax.algorithms.grpo import AdvantageFn, GroupStats, grpo_advantages
from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.types import Array, Float
from rlhf_jax.kernels import advantages as baselines

SCALES: dict[str, AdvantageFn] = {
    "group": grpo_advantages,
    "batch": functools.partial(grpo_advantages, scale_fn=baselines.batch_std),
    "none": functools.partial(grpo_advantages, scale_fn=baselines.unit_scale),
    "mean": functools.partial(grpo_advantages, scale_fn=baselines.group_mean),
}
"""What rewards less their group's mean are divided by: GRPO, TRL's batch scale, Dr. GRPO, MaxRL."""


def no_baseline(stats: GroupStats) -> Float[Array, "N G"]:
    """REINFORCE on bare rewards."""
    return clean(stats.rewards, stats.scored)


def batch_baseline(stats: GroupStats) -> Float[Array, "N G"]:
    """REINFORCE less the mean reward of the batch."""
    return clean(stats.rewards - masked_mean(stats.rewards, stats.scored), stats.scored)


def leave_one_out(stats: GroupStats) -> Float[Array, "N G"]:
    """RLOO: less the mean of the other answers."""
    return baselines.leave_one_out_advantages(stats.rewards, stats.scored)


def greedy_baseline(stats: GroupStats) -> Float[Array, "N G"]:
    """ReMax: less the reward of the most likely answer."""
    if stats.greedy_rewards is None:
        raise ValueError("ReMax compares with the most likely answer: give make_batch greedy_rewards=")
    return baselines.remax_advantages(stats.rewards, stats.greedy_rewards, stats.scored)


def optimal_baseline(stats: GroupStats) -> Float[Array, "N G"]:
    """OPO: less the length-weighted mean of the group."""
    return baselines.optimal_baseline_advantages(stats.rewards, stats.lengths, stats.scored)


def passing(k: int, stats: GroupStats) -> Float[Array, "N G"]:
    """Pass@k training: the mean over sets of `k` answers, which pass where one is worth more than 0."""
    return baselines.pass_at_k_advantages(stats.outcomes > 0, stats.scored, k=k)


def whitened_returns(stats: GroupStats) -> Float[Array, "B T"]:
    """REINFORCE++: returns of tokens, whitened over the batch."""
    # The KL of a token is charged to itself and to those before it, so it is not in the rewards compared.
    return baselines.reinforce_plus_plus_advantages(
        stats.outcomes.reshape(-1), stats.kl, stats.mask, kl_coef=stats.kl_coef
    )


def whitened_within_groups(stats: GroupStats) -> Float[Array, "N G"]:
    """REINFORCE++ with baseline: less the group's mean, whitened over the batch."""
    return baselines.reinforce_plus_plus_baseline_advantages(stats.rewards, stats.scored)
