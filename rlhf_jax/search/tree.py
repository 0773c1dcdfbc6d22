"""Trees of thoughts (Yao et al. 2023), breadth first and depth first; step beam search is the former.

All shapes are fixed and all problems of a batch go on side by side, so that a search is one program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Bool, Float, PRNGKeyArray
from rlhf_jax.search.interface import (
    Candidates,
    DoneFn,
    EvaluateFn,
    ProposeFn,
    SearchResult,
    expand,
    flatten,
    gather,
    where_rows,
)

ScorerFn = Callable[[Candidates, PRNGKeyArray], tuple[Float[Array, "B M"], Float[Array, "B"]]]
"""(candidates [B, M], key) -> (scores, cost): all candidates of a problem are seen together."""


def value_scorer(evaluate: EvaluateFn) -> ScorerFn:
    """Each candidate by its own value: ToT's value function; a process reward model makes it PRM beam search.

    Cost is that of the candidates that are there.
    """

    def scorer(candidates: Candidates, key: PRNGKeyArray) -> tuple[Float[Array, "B M"], Float[Array, "B"]]:
        values, cost = evaluate(flatten(candidates.states), key)
        shape = candidates.mask.shape
        return values.reshape(shape), jnp.sum(jnp.where(candidates.mask, cost.reshape(shape), 0), axis=1)

    return scorer


def vote_scorer(candidates: Candidates, key: PRNGKeyArray) -> tuple[Float[Array, "B M"], Float[Array, "B"]]:
    """Candidates by how often the policy proposed them, by likelihood between equals: ToT's vote, by samples.

    With a width of one it is self-consistency at every step.
    """
    del key
    likelihood = jnp.exp(candidates.logp)
    return candidates.count + 0.5 * likelihood, jnp.zeros(candidates.mask.shape[0])


def breadth_first(
    propose: ProposeFn,
    scorer: ScorerFn,
    done: DoneFn,
    roots: Any,
    key: PRNGKeyArray,
    *,
    beam_width: int,
    depth: int,
) -> SearchResult:
    """Keeps the best `beam_width` states of each depth (Yao et al. 2023, algorithm 1).

    A finished state stays as its own only candidate and competes with what is still being written.

    Args:
      scorer: `value_scorer(evaluate)` or `vote_scorer`.
      roots: states [B].

    Returns:
      The best finished state after `depth` steps, the best of all where none is finished.
    """
    count = done(roots).shape[0]

    def step(frontier: tuple[Any, Array, Array, Array], key: PRNGKeyArray):
        states, scores, live, cost = frontier
        propose_key, judge_key = jax.random.split(key)
        found = expand(propose, done, flatten(states), live.reshape(-1), propose_key)
        wide = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[2:]), (found.states, found.logp))
        candidates = Candidates(
            *wide,
            count=found.count.reshape(count, -1),
            mask=found.mask.reshape(count, -1),
            cost=found.cost.reshape(count, -1).sum(axis=1),
        )
        judged, judge_cost = scorer(candidates, judge_key)
        scores, index = jax.lax.top_k(jnp.where(candidates.mask, judged, -jnp.inf), beam_width)
        live = jnp.take_along_axis(candidates.mask, index, axis=1)
        return (gather(candidates.states, index), scores, live, cost + candidates.cost + judge_cost), None

    states = jax.tree.map(lambda x: jnp.repeat(x[:, None], beam_width, axis=1), roots)
    live = jnp.broadcast_to(jnp.arange(beam_width) == 0, (count, beam_width))
    start = (states, jnp.where(live, 0.0, -jnp.inf), live, jnp.zeros(count))
    (states, scores, live, cost), _ = jax.lax.scan(step, start, jax.random.split(key, depth))
    ended = done(flatten(states)).reshape(count, beam_width) & live
    rank = jnp.where(jnp.any(ended, axis=1, keepdims=True) & ~ended, -jnp.inf, scores)
    best = jnp.argmax(rank, axis=1)
    return SearchResult(gather(states, best), gather(scores, best), gather(ended, best), cost)


def depth_first(
    propose: ProposeFn,
    evaluate: EvaluateFn,
    done: DoneFn,
    roots: Any,
    key: PRNGKeyArray,
    *,
    expansions: int,
    threshold: float,
    accept: float,
) -> SearchResult:
    """Goes on from the most promising candidate, and back where none is left (Yao et al. 2023, algorithm 2).

    Args:
      roots: states [B].
      expansions: of each problem, at most.
      threshold: candidates of less value are pruned.
      accept: a finished state of this value ends the search of its problem.

    Returns:
      The most valuable finished state; the most valuable of all where none was reached.
    """
    count = done(roots).shape[0]
    branching = jax.eval_shape(propose, roots, key).mask.shape[1]
    capacity = 1 + expansions * max(branching - 1, 1)  # pops one, pushes `branching` at most

    def step(carry: tuple[Any, Array, Any, Array, Array, Array], key: PRNGKeyArray):
        stack, size, best, best_value, best_done, cost = carry
        propose_key, value_key = jax.random.split(key)
        live = (size > 0) & ~(best_done & (best_value >= accept))
        state = gather(stack, jnp.maximum(size - 1, 0))
        found = expand(propose, done, state, live, propose_key)
        values, value_cost = evaluate(flatten(found.states), value_key)
        values = jnp.where(found.mask, values.reshape(count, branching), -jnp.inf)
        ended = done(flatten(found.states)).reshape(count, branching) & found.mask

        # Finished states before others, then by value.
        rank = values + jnp.where(jnp.any(ended, axis=1, keepdims=True) & ~ended, -jnp.inf, 0)
        top = jnp.argmax(rank, axis=1)
        top_value, top_done = gather(values, top), gather(ended, top)
        better = live & jnp.where(top_done == best_done, top_value > best_value, top_done)
        best = where_rows(better, gather(found.states, top), best)
        best_value, best_done = jnp.where(better, top_value, best_value), best_done | (better & top_done)

        # The best goes on top of the stack, behind those less good.
        kept = found.mask & ~ended & (values >= threshold)
        order = jnp.argsort(jnp.where(kept, values, jnp.inf), axis=1)
        places = size[:, None] - live[:, None] + jnp.arange(branching)
        places = jnp.where(jnp.arange(branching) < jnp.sum(kept, axis=1, keepdims=True), places, capacity)
        rows = jnp.arange(count)[:, None]
        stack = jax.tree.map(
            lambda old, new: old.at[rows, places].set(new, mode="drop"), stack, gather(found.states, order)
        )
        size = size - live + jnp.sum(kept, axis=1)
        cost = (
            cost
            + found.cost
            + jnp.sum(jnp.where(found.mask, value_cost.reshape(count, branching), 0), axis=1)
        )
        return (stack, size, best, best_value, best_done, cost), None

    stack = jax.tree.map(lambda x: jnp.repeat(x[:, None], capacity, axis=1), roots)
    nothing: Bool[Array, "B"] = jnp.zeros(count, bool)
    start = (stack, jnp.ones(count, int), roots, jnp.full(count, -jnp.inf), nothing, jnp.zeros(count))
    keys = jax.random.split(key, expansions)
    (_, _, best, value, ended, cost), _ = jax.lax.scan(step, start, keys)
    return SearchResult(best, value, ended, cost)
