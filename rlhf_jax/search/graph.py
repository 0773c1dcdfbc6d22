"""Graphs of thoughts (Besta et al. 2024): thoughts branch, are scored, merged and refined, the best kept.

Each operation maps thoughts to thoughts; a graph of operations is their composition:

    thoughts = branch(split, evaluate, roots, key)
    thoughts = refine(improve, evaluate, thoughts, key, rounds=2)
    thoughts = merge(join, evaluate, thoughts, key, size=2)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, PRNGKeyArray
from rlhf_jax.search.interface import EvaluateFn, flatten, gather, where_rows

BranchFn = Callable[[Any, PRNGKeyArray], tuple[Any, Float[Array, "B"]]]
"""(states [B], key) -> (states [B, N], cost [B])."""
MergeFn = Callable[[Any, PRNGKeyArray], tuple[Any, Float[Array, "G"]]]
"""(groups of states [G, size], key) -> (one state for each group [G], cost [G])."""
RefineFn = Callable[[Any, PRNGKeyArray], tuple[Any, Float[Array, "M"]]]
"""(states [M], key) -> (states [M], cost [M])."""


@pytree_dataclass
class Thoughts:
    """N thoughts on each of B problems.

    Attributes:
      states: a pytree [B, N, ...].
      values: the higher, the better.
      cost: of all operations that led here.
    """

    states: Any
    values: Float[Array, "B N"]
    cost: Float[Array, "B"]


def _scored(evaluate: EvaluateFn, states: Any, cost: Float[Array, "B"], key: PRNGKeyArray) -> Thoughts:
    values, value_cost = evaluate(flatten(states), key)
    count = cost.shape[0]
    return Thoughts(states, values.reshape(count, -1), cost + value_cost.reshape(count, -1).sum(axis=1))


def branch(split: BranchFn, evaluate: EvaluateFn, roots: Any, key: PRNGKeyArray) -> Thoughts:
    """Several thoughts from one: samples of an answer, or the parts of a problem."""
    split_key, value_key = jax.random.split(key)
    states, cost = split(roots, split_key)
    return _scored(evaluate, states, cost, value_key)


def keep_best(thoughts: Thoughts, *, count: int) -> Thoughts:
    """The `count` most valuable thoughts, best first."""
    values, index = jax.lax.top_k(thoughts.values, count)
    return Thoughts(gather(thoughts.states, index), values, thoughts.cost)


def merge(
    join: MergeFn, evaluate: EvaluateFn, thoughts: Thoughts, key: PRNGKeyArray, *, size: int
) -> Thoughts:
    """Each `size` neighbours become one thought: the step that a tree has not.

    Args:
      size: divides the number of thoughts.
    """
    join_key, value_key = jax.random.split(key)
    count, width = thoughts.values.shape
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[2:]), thoughts.states)
    joined, cost = join(groups, join_key)
    states = jax.tree.map(lambda x: x.reshape(count, width // size, *x.shape[1:]), joined)
    return _scored(evaluate, states, thoughts.cost + cost.reshape(count, -1).sum(axis=1), value_key)


def refine(
    improve: RefineFn, evaluate: EvaluateFn, thoughts: Thoughts, key: PRNGKeyArray, *, rounds: int
) -> Thoughts:
    """Tries to improve each thought `rounds` times; what is not better than before is dropped."""
    count = thoughts.values.shape[0]

    def step(now: Thoughts, key: PRNGKeyArray) -> tuple[Thoughts, None]:
        improve_key, value_key = jax.random.split(key)
        states, cost = improve(flatten(now.states), improve_key)
        values, value_cost = evaluate(states, value_key)
        better = values > now.values.reshape(-1)
        chosen = where_rows(better, states, flatten(now.states))
        spent = (cost + value_cost).reshape(count, -1).sum(axis=1)
        return Thoughts(
            jax.tree.map(lambda x, like: x.reshape(like.shape), chosen, now.states),
            jnp.where(better, values, now.values.reshape(-1)).reshape(now.values.shape),
            now.cost + spent,
        ), None

    return jax.lax.scan(step, thoughts, jax.random.split(key, rounds))[0]
