"""Learned rewards inside whole runs: preferences of noisy people, reward models from them, and ensembles.

    pairs = draw_pairs(world, params, key, 1024, noise=0.5)
    start = RewardSeedState(key, decoder, pairs, held_out)
    model, seen = make_reward_train(policy, optimizer, steps=300)(start, hyper)
    learned = dataclasses.replace(world, reward_fn=learned_reward_fn(policy, model))

Everything is traceable: reward models of many seeds are trained side by side, and a policy against each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import preference, reward, selection
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    Rollout,
    Scalar,
    Sequences,
)
from rlhf_jax.jitted.train import Algorithm, RewardFn, TaskSetup
from rlhf_jax.losses.reward import bradley_terry_loss
from rlhf_jax.models import Policy
from rlhf_jax.tasks.base import Prompts
from rlhf_jax.tasks.style import prefers_first

_PAIRS_AT_ONCE = 256


@pytree_dataclass
class JudgedPairs:
    """Two answers to each of N prompts, and what a noisy person said of them.

    Attributes:
      gold_is_chosen: whether the chosen answer is the one of higher gold reward; ties count.
    """

    chosen: Sequences
    rejected: Sequences
    gold_is_chosen: Bool[Array, " N"]

    def take(self, rows: Int[Array, " B"]) -> "JudgedPairs":
        """Some of the pairs."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    @property
    def responses(self) -> reward.Pairs:
        """Preference pairs as a reward model learns from them."""
        return reward.Pairs(self.chosen, self.rejected)


def draw_pairs(
    task_setup: TaskSetup, params: Params, key: PRNGKeyArray, count: int, *, noise: Scalar
) -> JudgedPairs:
    """Two sampled answers to each of `count` training prompts, judged by gold reward and noise.

    Args:
      noise: P(first preferred) = sigmoid(difference in gold reward / noise).
    """
    size = min(count, _PAIRS_AT_ONCE)
    if count % size:
        raise ValueError(f"{count} pairs are no multiple of {size}")

    def part(key: PRNGKeyArray) -> JudgedPairs:
        draw_key, *answer_keys, judge_key = jax.random.split(key, 4)
        prompts = task_setup.draw(draw_key, num_prompts=size, num_samples=1)
        first, second = (task_setup.answer(params, prompts, answer_key) for answer_key in answer_keys)
        gold, other = (task_setup.gold(rollout, prompts) for rollout in (first, second))
        prefers = prefers_first(judge_key, gold, other, noise=noise)
        pairs = selection.judged(first.sequences, second.sequences, prefers)
        return JudgedPairs(pairs.chosen, pairs.rejected, jnp.where(prefers, gold >= other, other >= gold))

    parts = jax.lax.map(part, jax.random.split(key, count // size))
    return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), parts)


# Reward models ---------------------------------------------------------------------------------------


@pytree_dataclass
class RewardModel:
    """A reward model whose scores are standardised: mean 0 and variance 1 on the answers it was checked with.

    Attributes:
      params: a scalar model.
      mean: of its own scores there.
      scale: their standard deviation.
    """

    params: Params
    mean: Float[Array, ""]
    scale: Float[Array, ""]


@pytree_dataclass
class RewardSeedState:
    """Seed state of reward-model training: key, decoder and pairs of one seed.

    Attributes:
      decoder: body to start from.
      pairs: to learn from; `RewardHyper.pairs` says how many of them.
      held_out: to choose the best step by, and to standardise on.
    """

    key: PRNGKeyArray
    decoder: Params
    pairs: JudgedPairs
    held_out: JudgedPairs


@pytree_dataclass
class RewardHyper:
    """Hyperparameters of reward-model training that a sweep may vary (array leaves).

    Attributes:
      pairs: how many of the pairs are learned from: the first ones.
      update: of the reward model's update.
    """

    pairs: Int[Array, ""]
    update: reward.Hyper


def make_reward_train(
    policy: Policy,
    optimizer: OptimizerConfig,
    *,
    steps: int,
    batch_size: int = 64,
    every: int = 20,
) -> Callable[[RewardSeedState, RewardHyper], tuple[RewardModel, dict[str, Array]]]:
    """`train(start, hyper) -> (model, history)`: the parameters of least loss on held-out pairs.

    The number of pairs is traced, so one program serves all amounts of data. All train for as many steps, so
    little data is seen more often; it is the choice of the step that keeps it from being learned by heart.
    The history holds, of held-out pairs: `loss` and `accuracy` on the noisy labels, `gold_accuracy` (how
    often the better answer gets the higher score), and `best_step`.

    Args:
      every: steps between two looks at the held-out pairs; divides `steps`.
    """
    reward_fn, tx = policy.make_reward_fn(), make_optimizer(optimizer)
    update = reward.make_update(reward.Config(), reward_fn, tx)

    def described(params: Params, pairs: JudgedPairs) -> dict[str, Array]:
        chosen, rejected = reward.score_pairs(reward_fn, params, pairs.responses)
        loss, metrics = bradley_terry_loss(chosen, rejected)
        gold = jnp.mean((chosen > rejected) == pairs.gold_is_chosen)
        return {"loss": loss, "accuracy": metrics["accuracy"], "gold_accuracy": gold}

    def train(start: RewardSeedState, hyper: RewardHyper) -> tuple[RewardModel, dict[str, Array]]:
        head_key, state_key, data_key = jax.random.split(start.key, 3)
        params = policy.init_scalar_model(head_key, start.decoder)
        state = reward.init(params, tx, state_key)

        def step(state: reward.State, number: Array) -> tuple[reward.State, None]:
            rows = jax.random.randint(jax.random.fold_in(data_key, number), (batch_size,), 0, hyper.pairs)
            return update(state, hyper.update, start.pairs.take(rows).responses)[0], None

        def part(carry: tuple, first: Array) -> tuple[tuple, None]:
            state, best, seen = carry
            state, _ = jax.lax.scan(step, state, first + jnp.arange(every))
            now = {**described(state.learner.params, start.held_out), "best_step": first + every}
            better = now["loss"] < seen["loss"]
            return (
                state,
                tree_where(better, state.learner.params, best),
                tree_where(better, now, seen),
            ), None

        seen = {**described(params, start.held_out), "best_step": jnp.int32(0)}
        carry, _ = jax.lax.scan(part, (state, params, seen), jnp.arange(0, steps, every))
        _, best, seen = carry
        scores = jnp.concatenate(reward.score_pairs(reward_fn, best, start.held_out.responses))
        return RewardModel(best, jnp.mean(scores), jnp.std(scores)), seen

    return train


# Rewards of worlds -----------------------------------------------------------------------------------


def score_sequences(policy: Policy, model: RewardModel, sequences: Sequences) -> Float[Array, " B"]:
    """Standardised scores of a reward model."""
    return (policy.make_reward_fn()(model.params, sequences) - model.mean) / model.scale


def learned_reward_fn(policy: Policy, model: RewardModel) -> RewardFn:
    """A reward model as the reward of a `TaskSetup`."""

    def reward_fn(rollout: Rollout, prompts: Prompts) -> Float[Array, " B"]:
        del prompts
        return score_sequences(policy, model, rollout.sequences)

    return reward_fn


def ensemble_reward_fn(
    policy: Policy,
    members: RewardModel,
    combine_fn: Callable[[Float[Array, "N B"]], Float[Array, " B"]],
) -> RewardFn:
    """Several reward models as the reward of a `TaskSetup`.

    Args:
      members: reward models of one architecture, [N] in every leaf.
      combine_fn: [N, B] -> [B], such as `rewards.ensembles.ensemble_worst_case`.
    """

    def reward_fn(rollout: Rollout, prompts: Prompts) -> Float[Array, " B"]:
        del prompts
        return combine_fn(jax.vmap(lambda model: score_sequences(policy, model, rollout.sequences))(members))

    return reward_fn


# Pairs instead of a reward ---------------------------------------------------------------------------


def stored_pairs_algorithm(
    task_setup: TaskSetup,
    config: preference.Config,
    optimizer: OptimizerConfig,
    pairs: JudgedPairs,
    *,
    count: Int[Array, ""],
) -> Algorithm:
    """The DPO family on pairs that were judged before; nothing is sampled.

    Args:
      count: how many of the pairs are learned from, the first ones; may be traced, as the pairs may.
    """
    tx = make_optimizer(optimizer)
    update = preference.make_update(config, task_setup.logprob_fn, tx)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        rows = jax.random.randint(key, (task_setup.num_prompts * task_setup.num_samples // 2,), 0, count)
        part = pairs.take(rows)
        batch = preference.make_batch(
            task_setup.logprob_fn, ref_params, part.chosen, part.rejected, ld_alpha=hyper.ld_alpha
        )
        state, metrics = update(state, hyper, batch)
        return state, {**metrics, "tokens": jnp.int32(0)}

    return Algorithm(lambda params, key, _: preference.init(params, tx, key), step)
