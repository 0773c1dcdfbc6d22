"""The GRPO family and its relatives, each as a `group.Config`: what differs is an advantage, a ratio, a
surrogate, a reduction, or a bound.

A member takes the static choices that are not its own (`group_size=`, `epochs=`, ...) and returns its
`Config`; the bounds it is published with are in `hyper`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rlhf_jax.algorithms.grpo import Config, Groups, Hyper
from rlhf_jax.core.types import Array, Float
from rlhf_jax.kernels import advantages as baselines
from rlhf_jax.losses.policy import length_weighted
from rlhf_jax.losses.policy_ratios import sequence_log_ratio
from rlhf_jax.losses.policy_surrogates import (
    cispo_surrogate,
    geometric_mean_surrogate,
    sapo_surrogate,
    vespo_surrogate,
)
from rlhf_jax.losses.policy_weights import truncated_importance_weights
from rlhf_jax.losses.reductions import constant_length, token_mean


@dataclasses.dataclass(frozen=True)
class Member:
    """An algorithm of the family.

    Attributes:
      config: its static choices.
      hyper: the hyperparameters it is published with, where it says something of them.
      needs_greedy: it compares with the reward of the most likely answer.
      oversampling: it draws this many times the prompts, and keeps those whose answers differ in reward.
    """

    config: Config
    hyper: Hyper = Hyper()
    needs_greedy: bool = False
    oversampling: int = 1


MemberFn = Callable[..., Member]


def _no_baseline(groups: Groups) -> Float[Array, "N G"]:
    return groups.rewards


def _batch_baseline(groups: Groups) -> Float[Array, "N G"]:
    return groups.rewards - jnp.mean(groups.rewards)


def _unscaled(groups: Groups) -> Float[Array, "N G"]:
    return baselines.group_relative_advantages(groups.rewards, scale_fn=baselines.unit_scale)


def _leave_one_out(groups: Groups) -> Float[Array, "N G"]:
    return baselines.leave_one_out_advantages(groups.rewards)


def _greedy_baseline(groups: Groups) -> Float[Array, "N G"]:
    if groups.greedy_rewards is None:
        raise ValueError("ReMax compares with the most likely answer: give make_batch greedy_rewards=")
    return baselines.remax_advantages(groups.rewards, groups.greedy_rewards)


def _optimal_baseline(groups: Groups) -> Float[Array, "N G"]:
    return baselines.optimal_baseline_advantages(groups.rewards, groups.lengths)


def _whitened_returns(kl_coef: float, groups: Groups) -> Float[Array, "B T"]:
    return baselines.reinforce_plus_plus_advantages(
        groups.rewards.reshape(-1), groups.kl, groups.mask, kl_coef=kl_coef
    )


def _whitened_within_groups(groups: Groups) -> Float[Array, "N G"]:
    return baselines.reinforce_plus_plus_baseline_advantages(groups.rewards)


# Policy gradients, one step on policy: the clip of the surrogate never acts, so it is REINFORCE's gradient.


def reinforce(**static: Any) -> Member:
    """REINFORCE (Williams 1992), with the mean reward of the batch as baseline."""
    return Member(Config(advantage_fn=_batch_baseline, **static), Hyper(kl_coef=0.0))


def reinforce_without_baseline(**static: Any) -> Member:
    """REINFORCE (Williams 1992) on bare rewards."""
    return Member(Config(advantage_fn=_no_baseline, **static), Hyper(kl_coef=0.0))


def reinforce_plus_plus(*, kl_coef: float = 0.01, **static: Any) -> Member:
    """REINFORCE++ (Hu et al. 2025): the KL in the reward, by `kl_coef`; returns whitened over the batch."""
    advantage_fn = functools.partial(_whitened_returns, kl_coef)
    return Member(Config(advantage_fn=advantage_fn, reduce=token_mean, **static), Hyper(kl_coef=0.0))


def reinforce_plus_plus_baseline(**static: Any) -> Member:
    """REINFORCE++ with the group's mean as baseline (Hu et al. 2025)."""
    return Member(Config(advantage_fn=_whitened_within_groups, reduce=token_mean, **static))


def rloo(**static: Any) -> Member:
    """RLOO (Ahmadian et al. 2024): the baseline is the mean of the other answers."""
    return Member(Config(advantage_fn=_leave_one_out, **static))


def remax(**static: Any) -> Member:
    """ReMax (Li et al. 2024): the baseline is the reward of the most likely answer."""
    return Member(Config(advantage_fn=_greedy_baseline, **static), needs_greedy=True)


def opo(**static: Any) -> Member:
    """OPO (Hao et al. 2025): the length-weighted baseline, exactly on policy, no KL."""
    return Member(Config(advantage_fn=_optimal_baseline, **static), Hyper(kl_coef=0.0))


# The family of GRPO ---------------------------------------------------------------------------------


def grpo(**static: Any) -> Member:
    """GRPO (Shao et al. 2024)."""
    return Member(Config(**static))


def bnpo(**static: Any) -> Member:
    """GRPO with the mean over all tokens of the batch instead of within each answer."""
    return Member(Config(reduce=token_mean, **static))


def dr_grpo(*, max_length: int, **static: Any) -> Member:
    """Dr. GRPO (Liu et al. 2025): neither lengths nor the spread of a group's rewards are divided by.

    Args:
      max_length: the constant that replaces lengths.
    """
    config = Config(advantage_fn=_unscaled, reduce=constant_length(max_length), **static)
    return Member(config, Hyper(kl_coef=0.0))


def dapo(**static: Any) -> Member:
    """DAPO (Yu et al. 2025): clip-higher, token mean, no KL, prompts resampled until their answers differ.

    Its penalty on overlong answers is a reward (`rewards`).
    """
    return Member(Config(reduce=token_mean, **static), Hyper(clip_high=0.28, kl_coef=0.0), oversampling=2)


def gspo(**static: Any) -> Member:
    """GSPO (Zheng et al. 2025): one ratio for a whole answer."""
    hyper = Hyper(clip_low=3e-4, clip_high=4e-4, kl_coef=0.0)
    return Member(Config(ratio_fn=sequence_log_ratio, **static), hyper)


def luspo(**static: Any) -> Member:
    """LUSPO (arXiv 2602.05261): GSPO with answers weighted by their length."""
    hyper = Hyper(clip_low=3e-4, clip_high=4e-4, kl_coef=0.0)
    return Member(Config(ratio_fn=sequence_log_ratio, reduce=length_weighted, **static), hyper)


def gmpo(**static: Any) -> Member:
    """GMPO (Zhao et al. 2025): the geometric mean of an answer's ratios, bounds in log space."""
    hyper = Hyper(clip_low=0.4, clip_high=0.4)
    return Member(Config(surrogate_fn=geometric_mean_surrogate, **static), hyper)


def cispo(**static: Any) -> Member:
    """CISPO (Chen et al. 2025): the weight is clipped, no token loses its gradient."""
    hyper = Hyper(clip_low=1.0, clip_high=0.28, kl_coef=0.0)
    return Member(Config(surrogate_fn=cispo_surrogate, reduce=token_mean, **static), hyper)


def sapo(**static: Any) -> Member:
    """SAPO (Gao et al. 2025): a soft gate instead of a clip."""
    return Member(Config(surrogate_fn=sapo_surrogate, **static), Hyper(kl_coef=0.0))


def vespo(**static: Any) -> Member:
    """VESPO (arXiv 2602.10693): a smooth weight of the whole answer's ratio."""
    return Member(Config(surrogate_fn=vespo_surrogate, reduce=token_mean, **static), Hyper(kl_coef=0.0))


def corrected(member: Member) -> Member:
    """The member for rollouts of an older policy, or another sampler: truncated importance weights."""
    config = dataclasses.replace(member.config, weights_fn=truncated_importance_weights)
    return dataclasses.replace(member, config=config)
