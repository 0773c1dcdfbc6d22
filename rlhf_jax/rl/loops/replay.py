"""Circular replay of transitions, uniform and prioritised, for use inside `jit`, `scan` and `vmap`.

Data lies as [rows, B, ...]: a row is one step of B environments, so the next row of an environment is what
happened to it next, and n-step targets are made when a row is sampled. Each leaf keeps its dtype (bool and
uint8 observations stay so). Rows are written some at a time by one slice at an index that does not
depend on what is learnt; under `vmap` over agents it is therefore one slice for all of them, and nothing is
copied. Transitions are known by flat numbers row * B + environment.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, PRNGKeyArray, Scalar
from rlhf_jax.losses.reductions import Reduction, token_mean
from rlhf_jax.rl.envs.environments import Transition


@pytree_dataclass
class Replay:
    """The last rows of experience.

    Attributes:
      data: transitions [rows, B, ...].
      position: the row that is written next.
      size: rows that have been written.
    """

    data: Transition
    position: Int[Array, ""]
    size: Int[Array, ""]


@pytree_dataclass
class Batch:
    """Sampled transitions, n steps long.

    Attributes:
      obs: where they began: an array, or a tree of them where several agents act.
      action: the first one.
      reward: sum of the discounted rewards on the way; [N, agents] where each has its own.
      discount: gamma^steps, 0 where the episode terminated on the way.
      next_obs: where they led; the true last observation where an episode ended or was cut.
      weight: of each in the loss; 1 unless sampling was prioritised.
    """

    obs: Any
    action: Array
    reward: Float[Array, "N ..."]
    discount: Float[Array, " N"]
    next_obs: Any
    weight: Float[Array, " N"]


def weighted_mean(weights: Float[Array, " N"]) -> Reduction:
    """Mean over [C, N] with weights of the columns, divided by C N: their own sum would undo them."""
    return Reduction(weights=lambda mask: mask * weights, total=token_mean.total)


def init_replay(example: Transition, *, rows: int, num_envs: int) -> Replay:
    """An empty replay for transitions like `example` (one transition; arrays or shapes of arrays)."""
    data = jax.tree.map(lambda x: jnp.zeros((rows, num_envs, *x.shape), x.dtype), example)
    return Replay(data, jnp.int32(0), jnp.int32(0))


def insert(replay: Replay, transitions: Transition) -> Replay:
    """Writes T rows [T, B, ...] over the oldest.

    Raises:
      UserError: T does not divide the number of rows (a slice must not wrap round).
    """
    rows, count = replay.data.reward.shape[0], transitions.reward.shape[0]
    if rows % count:
        raise UserError(f"Replay: {count} rows at a time do not divide {rows}; choose a multiple.")

    def write(buffer: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), replay.position, 0)

    return Replay(
        data=jax.tree.map(write, replay.data, transitions),
        position=(replay.position + count) % rows,
        size=jnp.minimum(replay.size + count, rows),
    )


def sample_uniform(
    replay: Replay, key: PRNGKeyArray, *, batch_size: int, n_step: int = 1
) -> Int[Array, " N"]:
    """Numbers of `batch_size` transitions with all their n steps on record, with replacement, O(N)."""
    rows, num_envs = replay.data.reward.shape
    age_key, env_key = jax.random.split(key)
    ages = jax.random.randint(age_key, (batch_size,), n_step, jnp.maximum(replay.size, n_step) + 1)
    envs = jax.random.randint(env_key, (batch_size,), 0, num_envs)
    return (replay.position - ages) % rows * num_envs + envs


def gather(replay: Replay, indices: Int[Array, " N"], *, gamma: Scalar, n_step: int = 1) -> Batch:
    """The transitions of these numbers, n steps long or up to the end of their episode.

        reward = sum_{k < m} gamma^k r_k,  discount = gamma^m or 0

    where m is n_step, or fewer where the episode ends or is cut before. Weights are 1.
    """
    rows, num_envs = replay.data.reward.shape
    row, env = indices // num_envs, indices % num_envs
    data, rewards = replay.data, replay.data.learning_reward
    reward = jnp.zeros((*indices.shape, *rewards.shape[2:]), rewards.dtype)
    weight = jnp.ones(indices.shape, data.reward.dtype)
    discount, last, open_ = weight, row, jnp.ones(indices.shape, bool)

    def taken(tree: Any, row: Int[Array, " N"]) -> Any:
        return jax.tree.map(lambda x: x[row, env], tree)

    for step in range(n_step):
        now = (row + step) % rows
        terminated = data.terminated[now, env]
        factor = jnp.where(open_, discount, 0)
        reward = reward + factor.reshape(-1, *[1] * (reward.ndim - 1)) * rewards[now, env]
        discount = jnp.where(open_, jnp.where(terminated, 0, gamma * discount), discount)
        last = jnp.where(open_, now, last)
        open_ = open_ & ~terminated & ~data.truncated[now, env]
    return Batch(
        obs=taken(data.obs, row),
        action=taken(data.action, row),
        reward=reward,
        discount=discount,
        next_obs=taken(data.next_obs, last),
        weight=weight,
    )


def gather_windows(replay: Replay, indices: Int[Array, " N"], *, length: int) -> Transition:
    """[N, length]: the transitions of these numbers, and what happened next in their environments."""
    rows, num_envs = replay.data.reward.shape[:2]
    row = (indices // num_envs)[:, None] + jnp.arange(length)
    env = (indices % num_envs)[:, None]
    return jax.tree.map(lambda x: x[row % rows, env], replay.data)


@pytree_dataclass
class Priorities:
    """Sampling weights in blocks, and the sum of each block: a sum-tree two levels deep.

    With about sqrt(capacity) blocks, a draw is two short cumulative sums, one over blocks and one within
    a block, where a binary tree needs log2(capacity) dependent look-ups; a change re-adds its whole
    block, so that sums never drift.

    Attributes:
      weights: priority^alpha by number of transition; 0 where there is none to sample.
      sums: of the blocks.
      largest: the largest so far, which new transitions get.
    """

    weights: Float[Array, "K W"]
    sums: Float[Array, " K"]
    largest: Float[Array, ""]


def init_priorities(capacity: int) -> Priorities:
    """Nothing to sample among `capacity` transitions."""
    width = math.isqrt(max(capacity - 1, 0)) + 1
    blocks = -(-capacity // width)
    return Priorities(jnp.zeros((blocks, width)), jnp.zeros(blocks), jnp.float32(1))


def set_weights(priorities: Priorities, indices: Int[Array, " N"], weights: Float[Array, " N"]) -> Priorities:
    """Sets the weights of these transitions; of equal numbers one wins."""
    width = priorities.weights.shape[1]
    block = indices // width
    table = priorities.weights.at[block, indices % width].set(weights)
    return dataclasses.replace(
        priorities, weights=table, sums=priorities.sums.at[block].set(jnp.sum(table[block], axis=1))
    )


def update_priorities(
    priorities: Priorities,
    indices: Int[Array, " N"],
    errors: Float[Array, " N"],
    *,
    alpha: Scalar,
    epsilon: float = 1e-6,
) -> Priorities:
    """Proportional priorities (Schaul et al. 2016, section 3.3): (|error| + epsilon)^alpha."""
    weights = (jnp.abs(errors) + epsilon) ** alpha
    changed = set_weights(priorities, indices, weights)
    return dataclasses.replace(changed, largest=jnp.maximum(priorities.largest, jnp.max(weights)))


def admit(priorities: Priorities, replay: Replay, *, count: int, n_step: int = 1) -> Priorities:
    """After `insert` of `count` rows: what now has all its n steps can be sampled, what has not cannot."""
    rows, num_envs = replay.data.reward.shape

    def numbers(ages: Int[Array, " R"]) -> Int[Array, " N"]:
        row = (replay.position - ages) % rows
        return (row[:, None] * num_envs + jnp.arange(num_envs)).reshape(-1)

    ages = jnp.arange(n_step, n_step + count)
    weights = jnp.where(ages <= replay.size, priorities.largest, 0)
    priorities = set_weights(priorities, numbers(ages), jnp.repeat(weights, num_envs))
    if n_step == 1:
        return priorities
    incomplete = numbers(jnp.arange(1, n_step))
    return set_weights(priorities, incomplete, jnp.zeros(incomplete.shape))


def sample_prioritized(
    priorities: Priorities, key: PRNGKeyArray, *, batch_size: int, beta: Scalar
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """One draw from each of `batch_size` equal shares of the whole weight (Schaul et al. 2016, section 3.3).

        P(i) = weight_i / sum,  importance weight (1 / (N P(i)))^beta / max over the batch

    Returns:
      (numbers, importance weights).
    """
    ends = jnp.cumsum(priorities.sums)
    shares = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
    marks = shares * ends[-1]
    block = _first_above(ends, marks)
    inner = jnp.cumsum(priorities.weights[block], axis=1)
    place = jax.vmap(_first_above)(inner, marks - (ends[block] - priorities.sums[block]))
    chosen = priorities.weights[block, place]
    # (1 / (N P))^beta over its largest needs neither N nor the sum.
    least = jnp.min(chosen)
    return block * inner.shape[1] + place, (least / chosen) ** beta


def _first_above(ends: Float[Array, " K"], marks: Float[Array, "..."]) -> Int[Array, "..."]:
    """The first entry whose end lies above the mark; rounding never leads to one of no width."""
    # The last end that is above the end before it is where the total is reached.
    last = jnp.argmax(ends >= ends[-1])
    return jnp.minimum(jnp.searchsorted(ends, marks, side="right"), last)
