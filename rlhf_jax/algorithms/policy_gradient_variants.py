"""Policy gradients in GRPO's update: REINFORCE, RLOO, ReMax, OPO, OTB, GPG. See `algorithms.grpo_variants`.

One step on policy the clip of the surrogate never acts: what is left is E[A sum_t grad log pi(y_t)], the sum
over an answer's tokens and the mean over answers. The KL stands in the reward, before the baseline.
"""

from typing import Any

from rlhf_jax.algorithms import group_advantages
from rlhf_jax.algorithms.group_advantages import AdvantageFn
from rlhf_jax.algorithms.grpo import Config, Hyper
from rlhf_jax.algorithms.grpo_variant import GRPOVariant
from rlhf_jax.losses.policy_surrogates import log_likelihood_surrogate
from rlhf_jax.losses.reductions import sequence_sum, token_mean


def _policy_gradient(
    advantage_fn: AdvantageFn, kl_coef: float, static: dict[str, Any]
) -> tuple[Config, Hyper]:
    config = Config(advantage_fn=advantage_fn, reduce=sequence_sum, **static)
    return config, Hyper(kl_coef=0.0, reward_kl_coef=kl_coef)


def reinforce(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """REINFORCE (Williams 1992), with the mean reward of the batch as baseline.

    Gradient: that of E[r], times 1 - 1/B for B answers in a batch, whose mean holds the answer's own reward.

    Args:
      kl_coef: weight of the KL in the reward.
    """
    return GRPOVariant(
        *_policy_gradient(group_advantages.batch_baseline, kl_coef, static), needs_no_group=True
    )


def reinforce_without_baseline(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """REINFORCE (Williams 1992) on bare rewards.

    Gradient: that of E[r], unbiased.

    Args:
      kl_coef: weight of the KL in the reward.
    """
    return GRPOVariant(*_policy_gradient(group_advantages.no_baseline, kl_coef, static), needs_no_group=True)


def reinforce_plus_plus(*, kl_coef: float = 0.01, **static: Any) -> GRPOVariant:
    """REINFORCE++ (Hu et al. 2025): the KL in the reward of each token; returns whitened over the batch.

    Gradient: biased: advantages over the spread of the batch, answers over its tokens.

    Args:
      kl_coef: weight of the KL in the reward.
    """
    config = Config(advantage_fn=group_advantages.whitened_returns, reduce=token_mean, **static)
    return GRPOVariant(config, Hyper(kl_coef=0.0, reward_kl_coef=kl_coef), needs_no_group=True)


def reinforce_plus_plus_baseline(**static: Any) -> GRPOVariant:
    """REINFORCE++ with the group's mean as baseline (Hu et al. 2025).

    Gradient: biased: advantages over the spread of the batch, answers over its tokens.
    """
    return GRPOVariant(
        Config(advantage_fn=group_advantages.whitened_within_groups, reduce=token_mean, **static)
    )


def rloo(*, kl_coef: float = 0.05, **static: Any) -> GRPOVariant:
    """RLOO (Ahmadian et al. 2024): the baseline is the mean of the other answers.

    Gradient: that of E[r], unbiased.

    Args:
      kl_coef: weight of the KL in the reward, which the baseline sees as well (TRL's `RLOOConfig`: 0.05).
    """
    return GRPOVariant(*_policy_gradient(group_advantages.leave_one_out, kl_coef, static))


def remax(*, kl_coef: float = 0.05, **static: Any) -> GRPOVariant:
    """ReMax (Li et al. 2024): the baseline is the reward of the most likely answer.

    Gradient: that of E[r], unbiased.

    Args:
      kl_coef: weight of the KL in the reward, as RLOO's; the baseline has none.
    """
    made = _policy_gradient(group_advantages.greedy_baseline, kl_coef, static)
    return GRPOVariant(*made, needs_greedy=True, needs_no_group=True)


def opo(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """OPO (Hao et al. 2025): the length-weighted baseline, exactly on policy.

    Gradient: biased by the answer's own reward in the baseline, which vanishes in large groups.

    Args:
      kl_coef: weight of the KL in the reward; the paper has none.
    """
    return GRPOVariant(*_policy_gradient(group_advantages.optimal_baseline, kl_coef, static))


def otb(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """OTB (arXiv 2602.07078): at each token the mean of the group, weighted by the scores up to there.

    Gradient: biased by the answer's own reward in the baseline, which vanishes in large groups.

    Args:
      kl_coef: weight of the KL in the reward; the paper has none.
    """
    made = _policy_gradient(group_advantages.optimal_token_baseline, kl_coef, static)
    return GRPOVariant(*made, needs_collision=True)


def gpg(**static: Any) -> GRPOVariant:
    """GPG (Chu et al. 2025, arXiv 2504.02546): less the group's mean; no deviation, no ratio, no KL.

    Groups whose rewards are all equal are made up for by a factor (B / (B - M) in the paper). The sum is over
    the tokens of the batch; the authors' code for images divides each answer by its own length.

    Gradient: biased: answers over the batch's tokens.
    """
    config = Config(
        advantage_fn=group_advantages.less_mean_of_differing_groups,
        surrogate_fn=log_likelihood_surrogate,
        reduce=token_mean,
        **static,
    )
    return GRPOVariant(config, Hyper(kl_coef=0.0))
