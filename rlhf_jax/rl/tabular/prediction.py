"""Values of a Markov chain from its episodes: Monte Carlo, TD(0), n-step TD and TD(lambda).

A rule takes what is known and one episode and returns what is known after it; `learn` folds a rule over
episodes. Offline rules add up all changes of an episode before they make them (the targets are those of
`rlhf_jax.kernels`); online rules make each change before they compute the next. An episode that was cut
by the length limit counts, and is bootstrapped from the value of its last state.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import last_unmasked_index
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from rlhf_jax.kernels.returns import discounted_returns, lambda_returns, n_step_returns
from rlhf_jax.rl.tabular.dynamic_programming import MarkovChain

Known = TypeVar("Known")


@pytree_dataclass
class Episode:
    """One episode, or a stack of them with a leading axis E.

    Attributes:
      states: in which each step began.
      rewards: of each step.
      next_states: in which it ended.
      terminated: the step ended the episode.
      mask: steps that took place.
    """

    states: Int[Array, "*E T"]
    rewards: Float[Array, "*E T"]
    next_states: Int[Array, "*E T"]
    terminated: Bool[Array, "*E T"]
    mask: Bool[Array, "*E T"]


@pytree_dataclass
class Averages:
    """Running means of the returns.

    Attributes:
      values: mean return of each state, 0 before its first visit.
      visits: how many returns it is the mean of.
    """

    values: Float[Array, " S"]
    visits: Int[Array, " S"]


def init_averages(num_states: int) -> Averages:
    """Initial averages: no visits, values of 0."""
    return Averages(jnp.zeros(num_states), jnp.zeros(num_states, jnp.int32))


def sample_episodes(chain: MarkovChain, key: PRNGKeyArray, *, episodes: int, length: int) -> Episode:
    """`episodes` independent episodes [E, T] of at most `length` steps."""
    start_key, walk_key = jax.random.split(key)
    log_transitions = jnp.log(chain.transitions)

    def step(carry: tuple[Array, Array], step_key: PRNGKeyArray):
        states, running = carry
        next_states = jax.random.categorical(step_key, log_transitions[states])
        terminated = chain.terminal[next_states]
        taken = Episode(
            states, chain.rewards[states, next_states], next_states, terminated & running, running
        )
        return (next_states, running & ~terminated), taken

    states = jax.random.categorical(start_key, jnp.log(chain.start), shape=(episodes,))
    first = (states, ~chain.terminal[states])
    _, taken = jax.lax.scan(step, first, jax.random.split(walk_key, length))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), taken)


def learn(rule: Callable[[Known, Episode], Known], known: Known, episodes: Episode) -> tuple[Known, Known]:
    """(what is known after the last episode, the same after each)."""

    def step(known: Known, episode: Episode) -> tuple[Known, Known]:
        known = rule(known, episode)
        return known, known

    return jax.lax.scan(step, known, episodes)


def _rows(values: Float[Array, " S"], episode: Episode, gamma: Scalar) -> tuple[Array, ...]:
    """(rewards, values, discounts, bootstrap value, mask) of the episode as a batch of one row."""
    discounts = jnp.where(episode.terminated, 0.0, gamma)
    last_state = episode.next_states[last_unmasked_index(episode.mask)]
    rows = (episode.rewards, values[episode.states], discounts, values[last_state], episode.mask)
    return tuple(x[None] for x in rows)


def monte_carlo_targets(values: Float[Array, " S"], episode: Episode, *, gamma: Scalar) -> Float[Array, " T"]:
    """Discounted return from each step on."""
    rewards, _, discounts, bootstrap, mask = _rows(values, episode, gamma)
    return discounted_returns(rewards, discounts, bootstrap, mask)[0]


def n_step_targets(
    values: Float[Array, " S"], episode: Episode, *, n: int, gamma: Scalar
) -> Float[Array, " T"]:
    """n-step returns from each step on; n = 1 is TD(0)."""
    return n_step_returns(*_rows(values, episode, gamma), n=n)[0]


def lambda_targets(
    values: Float[Array, " S"], episode: Episode, *, lambda_: Scalar, gamma: Scalar
) -> Float[Array, " T"]:
    """Lambda-returns from each step on; 0 is TD(0), 1 is Monte Carlo."""
    return lambda_returns(*_rows(values, episode, gamma), lambda_=lambda_)[0]


def first_visits(states: Int[Array, " T"], mask: Bool[Array, " T"], num_states: int) -> Bool[Array, " T"]:
    """Mask of first visits: steps that are the first in their state."""
    length = len(states)
    time = jnp.arange(length)
    first = jnp.full(num_states, length).at[states].min(jnp.where(mask, time, length))
    return mask & (first[states] == time)


def first_visit_monte_carlo(known: Averages, episode: Episode, *, gamma: Scalar) -> Averages:
    """Mean of the returns after first visits (Sutton & Barto 2018, section 5.1)."""
    targets = monte_carlo_targets(known.values, episode, gamma=gamma)
    first = first_visits(episode.states, episode.mask, len(known.values))
    visits = known.visits.at[episode.states].add(first)
    errors = jnp.where(first, targets - known.values[episode.states], 0)
    # At most one return a state and episode, so this is the exact running mean.
    values = known.values.at[episode.states].add(errors / jnp.maximum(visits[episode.states], 1))
    return Averages(values, visits)


def offline_update(
    values: Float[Array, " S"], episode: Episode, targets: Float[Array, " T"], *, learning_rate: Scalar
) -> Float[Array, " S"]:
    """V(s_t) += learning_rate sum_t (target_t - V(s_t)), every error computed with the V before the episode.

    With `monte_carlo_targets` this is every-visit Monte Carlo at a constant rate, with `n_step_targets` and
    `lambda_targets` offline n-step TD and the forward view of offline TD(lambda).
    """
    errors = jnp.where(episode.mask, targets - values[episode.states], 0)
    return values.at[episode.states].add(learning_rate * errors)


def td_lambda(
    values: Float[Array, " S"],
    episode: Episode,
    *,
    learning_rate: Scalar,
    gamma: Scalar,
    lambda_: Scalar = 0.0,
    online: bool = True,
) -> Float[Array, " S"]:
    """TD(lambda) with accumulating traces, the backward view (Sutton & Barto 2018, section 12.2).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        e_t     = gamma lambda e_{t-1} + [s = s_t]
        V      += learning_rate delta_t e_t

    lambda = 0 is TD(0) (eq. 6.2).

    Args:
      online: False makes all changes after the episode; equals the forward view exactly.
    """

    def step(carry: tuple[Array, Array, Array], now: Episode):
        current, changed, traces = carry
        next_values = jnp.where(now.terminated, 0, current[now.next_states])
        error = now.rewards + gamma * next_values - current[now.states]
        traces = (gamma * lambda_ * traces).at[now.states].add(1)
        changed = changed + jnp.where(now.mask, learning_rate * error, 0) * traces
        return (changed if online else current, changed, traces), None

    (_, changed, _), _ = jax.lax.scan(step, (values, values, jnp.zeros_like(values)), episode)
    return changed


def n_step_td(
    values: Float[Array, " S"], episode: Episode, *, n: int, learning_rate: Scalar, gamma: Scalar
) -> Float[Array, " S"]:
    """Online n-step TD (Sutton & Barto 2018, eq. 7.2); n = 1 is TD(0).

    The change at s_t is made once s_{t+n} is reached, with the values as they then are.
    """
    rewards, _, discounts, _, mask = _rows(values, episode, gamma)
    zeros, ones = jnp.zeros_like(rewards), jnp.ones_like(rewards)
    sums = n_step_returns(rewards, zeros, discounts, zeros[:, 0], mask, n=n)[0]
    factors = n_step_returns(zeros, ones, discounts, ones[:, 0], mask, n=n)[0]
    ahead = jnp.minimum(jnp.arange(len(sums)) + n - 1, last_unmasked_index(episode.mask))

    def step(values: Float[Array, " S"], now: tuple[Array, ...]):
        state, reached, reward, factor, counts = now
        error = reward + factor * values[reached] - values[state]
        return values.at[state].add(jnp.where(counts, learning_rate * error, 0)), None

    steps = (episode.states, episode.next_states[ahead], sums, factors, episode.mask)
    return jax.lax.scan(step, values, steps)[0]
