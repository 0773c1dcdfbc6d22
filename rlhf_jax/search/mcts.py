"""Monte Carlo tree search over steps, through mctx: a node is a state, an action one of its K candidates.

The candidates of a node are proposed once, when it is first reached. Priors are the policy's likelihoods of
its candidates, values those of a process reward model or of rollouts, and a finished state pays its value as
reward. The search is that of Gumbel MuZero without its noise: it improves on the policy however few its
simulations are, where choosing by visits would need many. Problems are searched side by side in one program.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.importing import optional
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from rlhf_jax.search.interface import (
    Candidates,
    DoneFn,
    EvaluateFn,
    ProposeFn,
    SearchResult,
    expand,
    gather,
    where_rows,
)


def _mctx() -> Any:
    # Loaded by those who search; its dataclasses have constructors that type checkers do not see.
    return optional("mctx", extra="search")


@pytree_dataclass
class Node:
    """Tree node of a state: its embedding in mctx.

    Attributes:
      state: itself, [B, ...].
      children: the states its candidates lead to, [B, K, ...].
      value: what it is worth.
      done: nothing follows it.
      cost: of proposing its candidates and of its value.
    """

    state: Any
    children: Any
    value: Float[Array, "B"]
    done: Bool[Array, "B"]
    cost: Float[Array, "B"]


@pytree_dataclass
class SearchSummary:
    """One search from each of B roots.

    Attributes:
      child: the state that the chosen candidate leads to.
      visits: of the root's candidates, as shares.
      values: mean value of the simulations of each of them.
      best: the most valuable finished state in the tree; anything where there is none.
      best_value: its value; -inf where there is none.
      cost: of the whole search.
    """

    child: Any
    visits: Float[Array, "B K"]
    values: Float[Array, "B K"]
    best: Any
    best_value: Float[Array, "B"]
    cost: Float[Array, "B"]


def search_step(
    propose: ProposeFn,
    evaluate: EvaluateFn,
    done: DoneFn,
    states: Any,
    key: PRNGKeyArray,
    *,
    num_simulations: int,
    prior_temperature: Scalar = 1.0,
    value_scale: Scalar = 0.1,
    max_depth: int | None = None,
) -> SearchSummary:
    """Search from states [B] by sequential halving at the root (Danihelka et al. 2022).

    Takes the candidate with the greatest log prior + sigma(value), sigma as in section 3.4 there.

    Args:
      num_simulations: each adds a node and costs K proposals and a value.
      prior_temperature: divides the candidates' log-likelihoods; the greater, the more alike the priors.
      value_scale: weight of values, which are rescaled to [0, 1], against priors; the less, the more the
        search explores.
      max_depth: of the tree, in steps.
    """

    def open_node(states: Any, live: Bool[Array, "B"], key: PRNGKeyArray):
        propose_key, value_key = jax.random.split(key)
        found = expand(propose, done, states, live, propose_key)
        values, value_cost = evaluate(states, value_key)
        cost = found.cost + jnp.where(live, value_cost, 0)
        node = Node(states, found.states, values, done(states), cost)
        return node, _prior(found, prior_temperature), values

    def recurrent(_: Any, key: PRNGKeyArray, action: Int[Array, "B"], parent: Node):
        states = gather(parent.children, action)
        node, prior, values = open_node(states, ~parent.done, key)
        ends = node.done & ~parent.done  # nothing below a finished state pays again
        output = _mctx().RecurrentFnOutput(
            reward=jnp.where(ends, values, 0),
            discount=jnp.where(node.done, 0.0, 1.0),
            prior_logits=prior,
            value=jnp.where(node.done, 0, values),
        )
        return output, node

    root_key, tree_key = jax.random.split(key)
    node, prior, values = open_node(states, ~done(states), root_key)
    root = _mctx().RootFnOutput(prior_logits=prior, value=values, embedding=node)
    invalid = jnp.where(jnp.any(prior > _NEVER, axis=1, keepdims=True), prior <= _NEVER, False)
    output = _mctx().gumbel_muzero_policy(
        (),
        tree_key,
        root,
        recurrent,
        num_simulations=num_simulations,
        invalid_actions=invalid,
        max_depth=max_depth,
        qtransform=functools.partial(_mctx().qtransform_completed_by_mix_value, value_scale=value_scale),
        gumbel_scale=0.0,
    )
    tree = output.search_tree
    summary = tree.summary()
    child = where_rows(done(states), states, gather(node.children, output.action))
    nodes: Node = tree.embeddings
    finished = jnp.where(nodes.done, nodes.value, -jnp.inf)
    place = jnp.argmax(finished, axis=1)
    return SearchSummary(
        child=child,
        visits=summary.visit_probs,
        values=summary.qvalues,
        best=gather(nodes.state, place),
        best_value=gather(finished, place),
        cost=jnp.sum(nodes.cost, axis=1),
    )


_NEVER = -1e30


def _prior(found: Candidates, temperature: Scalar) -> Float[Array, "B K"]:
    return jnp.where(found.mask, found.logp / temperature, _NEVER)


def monte_carlo_tree_search(
    propose: ProposeFn,
    evaluate: EvaluateFn,
    done: DoneFn,
    roots: Any,
    key: PRNGKeyArray,
    *,
    num_simulations: int,
    depth: int,
    **options: Any,
) -> SearchResult:
    """Searches, takes a step, searches again from there, until all are finished or `depth` steps are done.

    What is returned is the most valuable finished state that any of the searches came upon: where values do
    not lie, that is never worse than the last one.

    Args:
      roots: states [B].
      num_simulations: of each search.
      options: of `search_step`.
    """

    def step(carry: tuple[Any, ...], key: PRNGKeyArray):
        states, best, best_value, cost = carry
        found = search_step(propose, evaluate, done, states, key, num_simulations=num_simulations, **options)
        better = found.best_value > best_value
        best = where_rows(better, found.best, best)
        spent = jnp.where(done(states), 0, found.cost)
        return (found.child, best, jnp.maximum(found.best_value, best_value), cost + spent), None

    count = done(roots).shape[0]
    start = (roots, roots, jnp.full(count, -jnp.inf), jnp.zeros(count))
    (states, best, value, cost), _ = jax.lax.scan(step, start, jax.random.split(key, depth))
    finished = value > -jnp.inf
    return SearchResult(where_rows(finished, best, states), value, finished, cost)
