"""Search interface: states, candidates that follow them, and values.

A state is any pytree; searches see batches of them, [N] or [B, M]. Two callables say all that a search knows:

    propose(states [N], key) -> Candidates [N, K]      ways to go on: samples of a policy, or all moves
    evaluate(states [N], key) -> (values [N], cost [N])   how good a state looks, the higher the better

and `done(states [N]) -> [N]` says which states nothing follows. Cost is counted in tokens generated, or in
whatever unit `propose` and `evaluate` agree on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray


@pytree_dataclass
class Candidates:
    """K ways to go on from each of some states.

    Attributes:
      states: what each leads to; a pytree [*N, K, ...].
      logp: of each way under the policy, in nats.
      count: how often the policy proposed it; at least 1 where the mask is True.
      mask: False for those that are not there, such as repetitions of others.
      cost: of having proposed them all, repetitions included.
    """

    states: Any
    logp: Float[Array, "*N K"]
    count: Int[Array, "*N K"] | Float[Array, "*N K"]
    mask: Bool[Array, "*N K"]
    cost: Float[Array, "*N"]


@pytree_dataclass
class SearchResult:
    """Best state found by a search, for each of B problems.

    Attributes:
      states: the best state found; a pytree [B, ...].
      values: what it was worth to the search; -inf where nothing was found.
      done: whether it is finished.
      cost: of the whole search.
    """

    states: Any
    values: Float[Array, "B"]
    done: Bool[Array, "B"]
    cost: Float[Array, "B"]


ProposeFn = Callable[[Any, PRNGKeyArray], Candidates]
EvaluateFn = Callable[[Any, PRNGKeyArray], tuple[Float[Array, "N"], Float[Array, "N"]]]
DoneFn = Callable[[Any], Bool[Array, "N"]]


def gather(states: Any, index: Int[Array, "B *K"]) -> Any:
    """States [B, M, ...] at `index`, [B] or [B, K]."""
    rows = jnp.arange(index.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
    return jax.tree.map(lambda x: x[rows, index], states)


def flatten(states: Any) -> Any:
    """[B, M, ...] as [B M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)


def where_rows(condition: Bool[Array, "N"], if_true: Any, if_false: Any) -> Any:
    """Row by row one of two batches of states."""
    return jax.tree.map(
        lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), if_true, if_false
    )


def expand(
    propose: ProposeFn, done: DoneFn, states: Any, live: Bool[Array, "N"], key: PRNGKeyArray
) -> Candidates:
    """Candidates of states [N]; one that is finished only leads to itself, at no cost.

    Args:
      live: states that are there at all; the others have no candidates and no cost.
    """
    found = propose(states, key)
    ended = done(states)
    first = jnp.arange(found.mask.shape[1]) == 0

    def itself(candidates: Array, state: Array) -> Array:
        # In all places, so that not even a masked one leads out of a finished state.
        return jnp.where(ended.reshape(-1, *[1] * state.ndim), state[:, None], candidates)

    return Candidates(
        states=jax.tree.map(itself, found.states, states),
        logp=jnp.where(ended[:, None], 0, found.logp),
        count=jnp.where(ended[:, None], first, found.count),
        mask=jnp.where(ended[:, None], first, found.mask) & live[:, None],
        cost=jnp.where(live & ~ended, found.cost, 0),
    )


def follow(
    propose: ProposeFn, done: DoneFn, states: Any, key: PRNGKeyArray, *, steps: int
) -> tuple[Any, Float[Array, "N"]]:
    """Goes on from states [N] by the first candidate, until they are finished or `steps` are done.

    Returns:
      (states, cost).
    """

    def step(carry: tuple[Any, Array], key: PRNGKeyArray):
        states, cost = carry
        found = expand(propose, done, states, ~done(states), key)
        first = jax.tree.map(lambda x: x[:, 0], found.states)
        going = ~done(states) & found.mask[:, 0]
        return (where_rows(going, first, states), cost + found.cost), None

    cost = jnp.zeros(done(states).shape)
    return jax.lax.scan(step, (states, cost), jax.random.split(key, steps))[0]


def make_rollout_fn(propose: ProposeFn, evaluate: EvaluateFn, done: DoneFn, *, steps: int) -> EvaluateFn:
    """Values by rollout: what `evaluate` says of where `propose` leads to, at most `steps` on."""

    def rollout(states: Any, key: PRNGKeyArray) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        follow_key, value_key = jax.random.split(key)
        ends, cost = follow(propose, done, states, follow_key, steps=steps)
        values, more = evaluate(ends, value_key)
        return values, cost + more

    return rollout
