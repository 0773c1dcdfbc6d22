"""Advantage functions of the GRPO family: each takes `GroupStats`, and leaves out what has no reward."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar
from rlhf_jax.kernels import advantages as baselines
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.kernels.baselines import optimal_token_baseline_advantages, score_energy


@pytree_dataclass
class GroupStats:
    """Rewards and lengths of groups, from which advantages are computed.

    N prompts have G answers each, in rows B = N x G.

    Attributes:
      rewards: one for each answer, less `kl_coef` times its KL: what is compared.
      scored: answers that have a reward; where False, `rewards` may hold anything.
      lengths: tokens of each answer.
      mask: tokens of the answers that have a reward.
      outcomes: the rewards before the KL was taken from them.
      kl: log-ratio of each token to the reference (k1), in nats; zeros without one.
      kl_coef: weight of the KL in the reward, `Hyper.reward_kl_coef`.
      greedy_rewards: reward of the most likely answer to each prompt; None where the run does not ask.
      terms: the rewards of which `rewards` is the weighted sum, NaN where one is not meant for an answer;
        None where they are not told apart.
      term_weights: their weights.
      values: of the prompts; None where the run does not ask.
      old_logp: log-prob of each token under the policy that sampled; None likewise.
      collision: sum of the squared probabilities of all tokens at each place, for OTB; None likewise.
    """

    rewards: Float[Array, "N G"]
    scored: Bool[Array, "N G"]
    lengths: Int[Array, "N G"]
    mask: Bool[Array, "B T"]
    outcomes: Float[Array, "N G"]
    kl: Float[Array, "B T"]
    kl_coef: Scalar
    greedy_rewards: Float[Array, " N"] | None
    terms: Float[Array, "N G K"] | None = None
    term_weights: Float[Array, " K"] | None = None
    values: Float[Array, " N"] | None = None
    old_logp: Float[Array, "B T"] | None = None
    collision: Float[Array, "B T"] | None = None


AdvantageFn = Callable[[GroupStats], Float[Array, "..."]]
"""GroupStats -> advantages, [N, G] (one for each answer) or [B, T]."""


def grpo_advantages(
    stats: GroupStats, *, scale_fn: baselines.ScaleFn = baselines.group_std
) -> Float[Array, "N G"]:
    """GRPO's advantages: `kernels.group_relative_advantages`."""
    return baselines.group_relative_advantages(stats.rewards, stats.scored, scale_fn=scale_fn)


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


def optimal_token_baseline(stats: GroupStats) -> Float[Array, "B T"]:
    """OTB: less the mean of the group, weighted at each place by what the scores have added up to."""
    if stats.old_logp is None or stats.collision is None:
        raise UserError(
            "OTB weighs answers by the probabilities of all tokens: give make_batch collision=, as "
            "make_logprob_fn(collision=True) has it"
        )
    energy = score_energy(stats.old_logp, stats.collision, stats.mask)
    return optimal_token_baseline_advantages(stats.rewards, energy, stats.mask, stats.scored)


def less_mean_of_differing_groups(stats: GroupStats) -> Float[Array, "N G"]:
    """GPG: less the group's mean, times B / (B - M) where M of B groups have equal rewards."""
    counted = jnp.any(stats.scored, axis=1)
    differing = reward_spread(stats.outcomes, stats.scored) > 0
    factor = jnp.sum(counted) / jnp.maximum(jnp.sum(differing), 1)
    return factor * grpo_advantages(stats, scale_fn=baselines.unit_scale)


def less_values(stats: GroupStats) -> Float[Array, "N G"]:
    """A*-PO: less the optimal value of the prompt."""
    if stats.values is None:
        raise UserError("A*-PO compares with the optimal values of prompts: give make_batch values=")
    return clean(stats.rewards - stats.values[:, None], stats.scored)


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


def normalized_apart(stats: GroupStats) -> Float[Array, "N G"]:
    """GDPO: each reward normalized within its group, their sum within the batch."""
    if stats.terms is None or stats.term_weights is None:
        raise UserError(
            "GDPO normalizes each reward apart: give make_batch reward_terms= and Hyper reward_weights="
        )
    return baselines.decoupled_advantages(stats.terms, stats.term_weights, stats.scored)


OF_TOKENS: tuple[AdvantageFn, ...] = (whitened_returns, optimal_token_baseline)
"""Functions that give every token an advantage of its own."""
OVER_THE_BATCH: tuple[AdvantageFn, ...] = (batch_baseline, whitened_returns)
"""Functions that compare all answers of the batch, and so need no groups."""


def check_rows(advantage_fn: AdvantageFn, rows: int) -> None:
    """Raises: UserError where the batch is one answer, which would be compared with itself."""
    if rows == 1 and advantage_fn in OVER_THE_BATCH:
        raise UserError(
            "a batch of one answer: its baseline is the mean over the batch, so every advantage would be 0: "
            "give two answers or more, or take reinforce_without_baseline"
        )


def shortest(stats: GroupStats) -> Float[Array, "N G"]:
    """GFPO's metric of length: the shorter, the better."""
    return -stats.lengths.astype(stats.rewards.dtype)


def most_efficient(stats: GroupStats) -> Float[Array, "N G"]:
    """GFPO's metric of token efficiency: reward per token."""
    return clean(stats.rewards, stats.scored) / jnp.maximum(stats.lengths, 1)


def of_the_best(
    stats: GroupStats, *, keep: int, metric_fn: Callable[[GroupStats], Float[Array, "N G"]] = shortest
) -> Float[Array, "N G"]:
    """GFPO: GRPO's advantages among the `keep` answers that are best by a metric; 0 for the others."""
    ranked = jnp.argsort(-clean(metric_fn(stats), stats.scored, -jnp.inf), axis=1, stable=True)
    place = jnp.argsort(ranked, axis=1)
    return baselines.group_relative_advantages(stats.rewards, stats.scored & (place < keep))
