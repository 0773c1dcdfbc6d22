"""Advantages from the rewards of whole completions: no value function.

Unless said otherwise rewards are [N, G]: N prompts with G completions each. `mask` marks the completions
that count (all, when it is None); the others may hold anything and get advantage 0. Where the baseline is
the group's own, a group with one completion that counts has nothing to compare with and gets 0.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar
from rlhf_jax.kernels.prepare import cleaned_constant, constant, mask_or_all
from rlhf_jax.kernels.returns import discounted_returns, token_rewards
from rlhf_jax.kernels.whitening import whiten

ScaleFn: TypeAlias = Callable[[Float[Array, "N G"], Bool[Array, "N G"]], Float[Array, "N 1"]]


GROUPS_HINT = "give one row of completions for each prompt, as rewards.reshape(-1, group_size) does"


def _prepare(
    name: str, rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None
) -> tuple[Float[Array, "N G"], Bool[Array, "N G"]]:
    """Cleaned rewards without gradient, and the mask."""
    rewards, mask = check_shapes(name, rewards=(rewards, "N G", GROUPS_HINT), mask=(mask, "N G"))
    mask = mask_or_all(mask, rewards)
    return cleaned_constant(rewards, mask), mask


def _group_mean(values: Float[Array, "N G"], mask: Bool[Array, "N G"]) -> Float[Array, "N 1"]:
    return masked_mean(values, mask, axis=-1)[..., None]


def reward_spread(rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None = None) -> Float[Array, " N"]:
    """Largest less smallest reward of each group: 0 where nothing is to be learned from comparing.

    Args:
      rewards: one reward for each completion.
      mask: completions that count.
    """
    rewards, mask = _prepare("reward_spread", rewards, mask)
    spread = jnp.max(clean(rewards, mask, -jnp.inf), axis=-1) - jnp.min(
        clean(rewards, mask, jnp.inf), axis=-1
    )
    return jnp.maximum(spread, 0)


def group_std(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"], *, epsilon: Scalar = 1e-4
) -> Float[Array, "N 1"]:
    """Scale of GRPO: each group's own standard deviation (Bessel-corrected), plus `epsilon`."""
    squares = clean(jnp.square(rewards - _group_mean(rewards, mask)), mask)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    return jnp.sqrt(jnp.sum(squares, axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)) + epsilon


def batch_std(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"], *, epsilon: Scalar = 1e-4
) -> Float[Array, "N 1"]:
    """One scale for the batch: the standard deviation of all rewards (Bessel-corrected), plus `epsilon`."""
    flat_rewards, flat_mask = rewards.reshape(1, -1), mask.reshape(1, -1)
    return jnp.broadcast_to(group_std(flat_rewards, flat_mask, epsilon=epsilon), (rewards.shape[0], 1))


def unit_scale(rewards: Float[Array, "N G"], mask: Bool[Array, "N G"]) -> Float[Array, "N 1"]:
    """No scaling (Dr. GRPO, Liu et al. 2025): hard and easy prompts weigh as their rewards do."""
    del mask
    return jnp.ones((rewards.shape[0], 1), rewards.dtype)


def group_mean(rewards: Float[Array, "N G"], mask: Bool[Array, "N G"]) -> Float[Array, "N 1"]:
    """Scale of MaxRL (arXiv 2602.02710): each group's mean reward; infinite where it is not positive.

    With rewards of 0 and 1 a right answer counts the more the rarer it is.
    """
    mean = _group_mean(rewards, mask)
    return jnp.where(mean > 0, mean, jnp.inf)


def group_relative_advantages(
    rewards: Float[Array, "N G"],
    mask: Bool[Array, "N G"] | None = None,
    *,
    scale_fn: ScaleFn = group_std,
) -> Float[Array, "N G"]:
    """Group-relative advantages of GRPO (Shao et al. 2024, section 4.1.2).

        A_i = (r_i - mean_j r_j) / scale

    Args:
      rewards: one reward for each completion.
      mask: completions that count.
      scale_fn: `group_std` (GRPO), `batch_std` (group mean, batch scale), `unit_scale` (Dr. GRPO) or
        `group_mean` (MaxRL); any function of (rewards, mask) that returns the divisor of each group.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare("group_relative_advantages", rewards, mask)
    return clean((rewards - _group_mean(rewards, mask)) / scale_fn(rewards, mask), mask)


def decoupled_advantages(
    terms: Float[Array, "N G K"],
    weights: Float[Array, " K"],
    mask: Bool[Array, "N G"] | None = None,
    *,
    epsilon: Scalar = 1e-4,
) -> Float[Array, "N G"]:
    """GDPO: each reward normalized within its group, then their sum within the batch (arXiv 2601.05242).

        S_i = sum_k w_k (r_ik - mean_j r_jk) / (std_j r_jk + epsilon)
        A_i = (S_i - mean S) / (std S + epsilon)

    A reward of small spread keeps its say beside one of large spread, which the sum of rewards drowns.
    Deviations are Bessel-corrected, as in TRL's `normalize_then_sum`.

    Args:
      terms: K rewards for each completion; NaN where one is not meant for it, which then has no part in it.
      weights: of the rewards.
      mask: completions that count.
      epsilon: added to deviations.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    terms, weights, mask = check_shapes(
        "decoupled_advantages", terms=(terms, "N G K"), weights=(weights, "K"), mask=(mask, "N G")
    )
    mask = jnp.ones(terms.shape[:2], bool) if mask is None else mask
    counts = mask[..., None] & ~jnp.isnan(terms)
    by_term = jnp.moveaxis(cleaned_constant(terms, counts), -1, 0)

    def normalized(rewards: Float[Array, "N G"], counts: Bool[Array, "N G"]) -> Float[Array, "N G"]:
        scale = group_std(rewards, counts, epsilon=epsilon)
        return clean((rewards - _group_mean(rewards, counts)) / scale, counts)

    apart = jax.vmap(normalized)(by_term, jnp.moveaxis(counts, -1, 0))
    total = jnp.einsum("k,kng->ng", constant(weights), apart)
    scale = batch_std(total, mask, epsilon=epsilon)
    return clean((total - masked_mean(total, mask)) / scale, mask)


def leave_one_out_advantages(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None = None
) -> Float[Array, "N G"]:
    """RLOO: the baseline is the mean of the other rewards (Kool et al. 2019; Ahmadian et al. 2024).

        A_i = r_i - sum_{j != i} r_j / (G - 1) = (r_i - mean_j r_j) G / (G - 1)

    Args:
      rewards: one reward for each completion.
      mask: completions that count.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare("leave_one_out_advantages", rewards, mask)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    return clean((rewards - _group_mean(rewards, mask)) * count / jnp.maximum(count - 1, 1), mask)


def remax_advantages(
    rewards: Float[Array, "N G"],
    greedy_rewards: Float[Array, " N"],
    mask: Bool[Array, "N G"] | None = None,
) -> Float[Array, "N G"]:
    """ReMax: the baseline is the reward of the greedy completion of the prompt (Li et al. 2024).

        A_i = r_i - r(greedy)

    Args:
      rewards: one reward for each completion.
      greedy_rewards: reward of each prompt's greedy completion.
      mask: completions that count.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare("remax_advantages", rewards, mask)
    _, greedy_rewards = check_shapes(
        "remax_advantages", rewards=(rewards, "N G"), greedy_rewards=(greedy_rewards, "N")
    )
    return clean(rewards - constant(greedy_rewards)[:, None], mask)


def optimal_baseline_advantages(
    rewards: Float[Array, "N G"],
    lengths: Int[Array, "N G"],
    mask: Bool[Array, "N G"] | None = None,
) -> Float[Array, "N G"]:
    """OPO: the length-weighted mean reward as baseline (Hao et al. 2025, arXiv 2505.23585).

        A_i = r_i - sum_j l_j r_j / sum_j l_j

    It is the baseline of least variance where the squared gradient norm grows with length.

    Args:
      rewards: one reward for each completion.
      lengths: number of tokens of each completion.
      mask: completions that count.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare("optimal_baseline_advantages", rewards, mask)
    _, lengths = check_shapes(
        "optimal_baseline_advantages", rewards=(rewards, "N G"), lengths=(lengths, "N G")
    )
    weights = clean(lengths.astype(rewards.dtype), mask)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)
    return clean(rewards - jnp.sum(weights * rewards, axis=-1, keepdims=True) / total, mask)


def _all_drawn_from(subset: Array, whole: Array, k: int) -> Array:
    """Probability that k draws without replacement from `whole` items all fall among `subset` of them."""
    steps = jnp.arange(k)
    ratios = jnp.maximum(subset[..., None] - steps, 0) / jnp.maximum(whole[..., None] - steps, 1)
    return jnp.prod(ratios, axis=-1)


def pass_at_k_advantages(
    correct: Bool[Array, "N G"],
    mask: Bool[Array, "N G"] | None = None,
    *,
    k: int,
    epsilon: Scalar = 1e-6,
) -> Float[Array, "N G"]:
    """Advantages of training for pass@k, in closed form (Chen et al. 2025, arXiv 2508.10751).

    The reward of k completions is whether one of them is correct; a completion's advantage is the mean of the
    group-normalised rewards over all sets of k that hold it. With N- wrong among N completions:

        R    = 1 - C(N-, k) / C(N, k),  sigma = sqrt(R (1 - R))
        A(+) = (1 - R) / sigma
        A(-) = (1 - R - C(N- - 1, k - 1) / C(N - 1, k - 1)) / sigma

    k = 1 is the group-normalised advantage of the binary reward (population standard deviation).

    Args:
      correct: whether each completion passes.
      mask: completions that count.
      k: size of the sets, 1 <= k <= G.
      epsilon: added to sigma; a group that always or never passes gets 0.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    correct, mask = check_shapes(
        "pass_at_k_advantages", correct=(correct, "N G", GROUPS_HINT), mask=(mask, "N G")
    )
    mask = mask_or_all(mask, correct)
    wrong = jnp.sum(~correct & mask, axis=-1, keepdims=True)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    all_wrong = _all_drawn_from(wrong, count, k)
    others_wrong = _all_drawn_from(wrong - 1, count - 1, k - 1)
    sigma = jnp.sqrt(all_wrong * (1 - all_wrong)) + epsilon
    advantages = jnp.where(correct, all_wrong, all_wrong - others_wrong) / sigma
    return clean(advantages, mask & (count > 1))


def reinforce_plus_plus_advantages(
    rewards: Float[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "B T"]:
    """REINFORCE++: undiscounted returns with the KL in the reward, whitened over the batch (Hu et al. 2025).

        A_t = whiten(R - kl_coef sum_{i >= t} KL_i)

    Args:
      rewards: R, one for each completion.
      kl: KL of each token to the reference, `k1(logp, ref_logp)` in the paper.
      mask: tokens that count.
      kl_coef: beta.

    Returns:
      Advantages [B, T] of mean 0 and variance 1 over the unmasked tokens, 0 where masked; no gradient.
    """
    rewards, kl, mask = check_shapes(
        "reinforce_plus_plus_advantages", rewards=(rewards, "B"), kl=(kl, "B T"), mask=(mask, "B T")
    )
    of_tokens = token_rewards(rewards, kl, mask, kl_coef=kl_coef)
    nothing = jnp.zeros(mask.shape[0], of_tokens.dtype)
    return whiten(discounted_returns(of_tokens, jnp.ones_like(of_tokens), nothing, mask), mask)


def reinforce_plus_plus_baseline_advantages(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None = None
) -> Float[Array, "N G"]:
    """REINFORCE++ with baseline: the group's mean subtracted, then whitened over the batch (Hu et al. 2025).

    Unlike `batch_std`, the scale is that of the centred rewards: unequal prompts do not add to it.

    Args:
      rewards: one reward for each completion.
      mask: completions that count.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, mask = _prepare("reinforce_plus_plus_baseline_advantages", rewards, mask)
    return whiten(rewards - _group_mean(rewards, mask), mask)
