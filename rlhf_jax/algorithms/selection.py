"""Selection of sampled answers for training: pairs for preferences, the best of N for imitation.

Rows of one prompt stand together: B = N x G.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.kernels.prepare import mask_or_all


@pytree_dataclass
class Pairs:
    """Two answers to each prompt.

    Attributes:
      chosen: the better ones.
      rejected: the worse ones.
      mask: pairs of different reward.
      first_is_chosen: which of the two it was, where the pair came in an order.
    """

    chosen: Sequences
    rejected: Sequences
    mask: Bool[Array, " N"]
    first_is_chosen: Bool[Array, " N"]


def take_rows(sequences: Sequences, rows: Int[Array, " N"]) -> Sequences:
    """Rows by index."""
    return jax.tree.map(lambda leaf: leaf[rows], sequences)


def best_and_worst(sequences: Sequences, rewards: Float[Array, "N G"]) -> Pairs:
    """The answers of highest and of lowest reward to each prompt; the first of equals.

    Args:
      rewards: an answer of -inf is left out. A pair whose sides are of equal reward is out of the mask.
    """
    start = jnp.arange(rewards.shape[0]) * rewards.shape[1]
    left_out = rewards == -jnp.inf
    best = jnp.argmax(rewards, axis=1)
    worst = jnp.argmin(jnp.where(left_out, jnp.inf, rewards), axis=1)
    return Pairs(
        chosen=take_rows(sequences, start + best),
        rejected=take_rows(sequences, start + worst),
        mask=jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1, where=~left_out, initial=jnp.inf),
        first_is_chosen=best < worst,
    )


def judged(first: Sequences, second: Sequences, prefers_first: Bool[Array, " N"]) -> Pairs:
    """Pairs by a judge's choice between `first` and `second`."""

    def pick(a: Array, b: Array, first_wins: bool) -> Array:
        choose_a = prefers_first == first_wins
        return jnp.where(choose_a.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return Pairs(
        chosen=jax.tree.map(lambda a, b: pick(a, b, True), first, second),
        rejected=jax.tree.map(lambda a, b: pick(a, b, False), first, second),
        mask=jnp.ones(prefers_first.shape, bool),
        first_is_chosen=prefers_first,
    )


def best_of_group(
    sequences: Sequences, rewards: Float[Array, "N G"], *, reward_threshold: Scalar = -jnp.inf
) -> tuple[Sequences, Bool[Array, " N"]]:
    """The best answer to each prompt, to imitate: best-of-n distillation, RAFT (Dong et al. 2023).

    Args:
      reward_threshold: answers of less reward are left out: with 1 for right and 0 for wrong, rejection
        sampling.

    Returns:
      (answers [N, T], which of them count); what does not count is out of the mask.
    """
    start = jnp.arange(rewards.shape[0]) * rewards.shape[1]
    answers = take_rows(sequences, start + jnp.argmax(rewards, axis=1))
    counts = jnp.max(rewards, axis=1) >= reward_threshold
    return _only(answers, counts), counts


def all_above(
    sequences: Sequences, rewards: Float[Array, "N G"], *, reward_threshold: Scalar
) -> tuple[Sequences, Bool[Array, " B"]]:
    """Every answer of enough reward (expert iteration; ReST, Gulcehre et al. 2023)."""
    counts = rewards.reshape(-1) >= reward_threshold
    return _only(sequences, counts), counts


def _only(answers: Sequences, counts: Bool[Array, " B"]) -> Sequences:
    mask = answers.mask & counts[:, None]
    return dataclasses.replace(answers, mask=mask, experts=None)


def groups_that_differ(
    rewards: Float[Array, "N G"], scored: Bool[Array, "N G"] | None = None, *, keep: int
) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """`keep` of the prompts, those whose answers differ in reward first (DAPO, Yu et al. 2025).

    Args:
      scored: answers that have a reward; None for all.

    Returns:
      (which prompts, whether each one's answers do differ): there may be too few.
    """
    differs = reward_spread(rewards, scored) > 0
    chosen = jnp.argsort(~differs, stable=True)[:keep]
    return chosen, differs[chosen]


def largest_advantages(advantages: Float[Array, "N G"], *, keep: int) -> Int[Array, " K"]:
    """Rows of the `keep` answers to each prompt whose advantages are largest in size (CPPO, Lin et al. 2025).

    They stay in their order; of equals the first are kept.
    """
    order = jnp.argsort(-jnp.abs(advantages), axis=1, stable=True)[:, :keep]
    start = jnp.arange(advantages.shape[0])[:, None] * advantages.shape[1]
    return (start + jnp.sort(order, axis=1)).reshape(-1)


# Policy filtration ---------------------------------------------------------------------------------

RankWeightsFn = Callable[[Int[Array, "N G"], Int[Array, "N 1"]], Float[Array, "N G"]]
"""(rank of each answer by reward, 0 for the best; how many of its group have one) -> its weight."""


def best_of_n_weights(rank: Int[Array, "N G"], count: Int[Array, "N 1"]) -> Float[Array, "N G"]:
    """PF-PPO's BoN: the best answer."""
    del count
    return (rank == 0).astype(jnp.float32)


def best_random_weights(rank: Int[Array, "N G"], count: Int[Array, "N 1"]) -> Float[Array, "N G"]:
    """PF-PPO's BR: the best answer, or one of the others, each half of the time.

    Weights are 1/2 and 1 / (2 (N - 1)): with the five answers of the authors' code 0.4 to 0.1 each.
    """
    return jnp.where(rank == 0, 0.5, 0.5 / jnp.maximum(count - 1, 1))


def best_worst_weights(rank: Int[Array, "N G"], count: Int[Array, "N 1"]) -> Float[Array, "N G"]:
    """PF-PPO's BW: the best answer or the worst, each half of the time."""
    return 0.5 * (rank == 0) + 0.5 * (rank == count - 1)


def filter_by_rank(
    rewards: Float[Array, "N G"],
    scored: Bool[Array, "N G"] | None,
    key: PRNGKeyArray,
    *,
    weights_fn: RankWeightsFn,
) -> Int[Array, " N"]:
    """Policy filtration (PF-PPO, Shen & Zhang 2024, arXiv 2409.06957): one of the answers to each prompt,
    drawn by weights of their ranks.

    A reward model is surest of answers that it rates very high or very low: to learn from these alone leaves
    out much of its noise.

    Args:
      rewards: one for each answer; anything where `scored` is False.
      scored: answers that have a reward, which are ranked; None for all.
      key: decides the draw.
      weights_fn: `best_of_n_weights`, `best_random_weights` or `best_worst_weights`.

    Returns:
      Rows of the chosen ones, among B = N x G.
    """
    scored = mask_or_all(scored, rewards)
    order = jnp.argsort(jnp.where(scored, -rewards, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    count = jnp.maximum(jnp.sum(scored, axis=1, keepdims=True), 1)
    weights = jnp.where(rank < count, weights_fn(rank, count), 0)
    chosen = jax.random.categorical(key, jnp.log(weights), axis=1)
    return jnp.arange(rewards.shape[0]) * rewards.shape[1] + chosen
