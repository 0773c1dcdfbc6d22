"""Control of a decision process known only by its samples: SARSA, Q-learning, and learning from a log.

`make_train` is told which algorithm it is by its target function: `sarsa_target` is on-policy,
`q_learning_target` off-policy, `expected_sarsa_target` either. Exploration is epsilon-greedy with decay.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass, tree_add
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.loops.exploration import epsilon_greedy, linear_decay
from rlhf_jax.rl.tabular.dynamic_programming import DecisionProcess
from rlhf_jax.rl.tabular.steps import draw_start, make_take, no_sums

TargetFn = Callable[[Float[Array, " A"], Int[Array, ""], Scalar], Float[Array, ""]]
"""(Q of the next state, the action taken there, epsilon) -> value of the next state."""


def sarsa_target(
    next_values: Float[Array, " A"], next_action: Int[Array, ""], epsilon: Scalar
) -> Float[Array, ""]:
    """Q of the action that is taken next (Sutton & Barto 2018, eq. 6.7)."""
    return next_values[next_action]


def q_learning_target(
    next_values: Float[Array, " A"], next_action: Int[Array, ""], epsilon: Scalar
) -> Float[Array, ""]:
    """Q of the best action (Watkins & Dayan 1992; Sutton & Barto 2018, eq. 6.8)."""
    return jnp.max(next_values)


def expected_sarsa_target(
    next_values: Float[Array, " A"], next_action: Int[Array, ""], epsilon: Scalar
) -> Float[Array, ""]:
    """Mean Q under the epsilon-greedy policy (Sutton & Barto 2018, eq. 6.9)."""
    return (1 - epsilon) * jnp.max(next_values) + epsilon * jnp.mean(next_values)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      steps: transitions in a whole run; `num_logs` divides it.
      num_logs: entries of the history, each over `steps / num_logs` transitions.
      max_episode_steps: an episode is cut, not terminated, after so many.
      online: make each change at once; otherwise at the end of its episode.
    """

    steps: int = 100_000
    num_logs: int = 20
    max_episode_steps: int = 100
    online: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of tabular TD control that a sweep may vary (array leaves).

    Attributes:
      learning_rate: step size on the first visit of a state and action.
      learning_rate_power: it falls with visits^-power; 0 keeps it, above 1/2 and up to 1 converges.
      gamma: discount per step.
      epsilon_start: share of random actions at first.
      epsilon_end: and at last.
      epsilon_steps: transitions over which it falls linearly.
    """

    learning_rate: Scalar = 1.0
    learning_rate_power: Scalar = 0.7
    gamma: Scalar = 0.99
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 50_000.0


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      action_values: Q.
      pending: changes of the episode so far that wait for its end.
      visits: of each state and action.
      state: where the episode is.
      action: the one chosen there.
      episode_steps: taken in this episode.
      episode_return: undiscounted, of this episode.
      steps: transitions so far.
    """

    action_values: Float[Array, "S A"]
    pending: Float[Array, "S A"]
    visits: Int[Array, "S A"]
    state: Int[Array, ""]
    action: Int[Array, ""]
    episode_steps: Int[Array, ""]
    episode_return: Float[Array, ""]
    steps: Int[Array, ""]
    key: PRNGKeyArray


def init(process: DecisionProcess, key: PRNGKeyArray, hyper: Hyper) -> State:
    """The state at step 0, Q being 0."""
    key, start_key, action_key = jax.random.split(key, 3)
    zeros = jnp.zeros(process.rewards.shape[:2])
    start = draw_start(process, start_key)
    action = epsilon_greedy(zeros[start], action_key, epsilon=hyper.epsilon_start)
    nothing = jnp.int32(0)
    return State(zeros, zeros, zeros.astype(jnp.int32), start, action, nothing, jnp.float32(0), nothing, key)


def make_step(
    config: Config, process: DecisionProcess, target_fn: TargetFn
) -> Callable[[State, Hyper], tuple[State, Metrics]]:
    """`step(state, hyper) -> (state, sums)`: one transition, and what it learns from it."""
    take = make_take(process, max_episode_steps=config.max_episode_steps)

    def step(state: State, hyper: Hyper) -> tuple[State, Metrics]:
        key, walk_key, action_key, start_key, first_key = jax.random.split(state.key, 5)
        place, q = (state.state, state.action), state.action_values
        epsilon = linear_decay(
            state.steps, start=hyper.epsilon_start, end=hyper.epsilon_end, steps=hyper.epsilon_steps
        )
        taken = take((walk_key, start_key), *place, state.episode_steps)
        next_values, done = q[taken.next_state], taken.done

        next_action = epsilon_greedy(next_values, action_key, epsilon=epsilon)
        next_value = jnp.where(taken.terminated, 0, target_fn(next_values, next_action, epsilon))
        visits = state.visits.at[place].add(1)
        rate = hyper.learning_rate * visits[place].astype(jnp.float32) ** -hyper.learning_rate_power
        error = taken.reward + hyper.gamma * next_value - q[place]
        pending = state.pending.at[place].add(rate * error)
        apply = done | config.online
        q, pending = jnp.where(apply, q + pending, q), jnp.where(apply, 0, pending)

        first_action = epsilon_greedy(q[taken.onwards], first_key, epsilon=epsilon)
        episode_return, length = state.episode_return + taken.reward, state.episode_steps + 1
        sums = {
            "episodes": done.astype(jnp.int32),
            "return_sum": jnp.where(done, episode_return, 0),
            "length_sum": jnp.where(done, length, 0),
            "squared_error_sum": jnp.square(error),
        }
        new = State(
            action_values=q,
            pending=pending,
            visits=visits,
            state=taken.onwards,
            action=jnp.where(done, first_action, next_action),
            episode_steps=jnp.where(done, 0, length),
            episode_return=jnp.where(done, 0, episode_return),
            steps=state.steps + 1,
            key=key,
        )
        return new, sums

    return step


def make_train(
    config: Config, process: DecisionProcess, target_fn: TargetFn
) -> Callable[[PRNGKeyArray, Hyper], tuple[State, Metrics]]:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`.

    Args:
      target_fn: `sarsa_target`, `q_learning_target`, `expected_sarsa_target`, or your own.

    Returns:
      A function whose history has a sum for each report: `episodes` ended, `return_sum` and `length_sum`
      over these, `squared_error_sum` over all transitions.
    """
    step = make_step(config, process, target_fn)

    def train(key: PRNGKeyArray, hyper: Hyper) -> tuple[State, Metrics]:
        def report(state: State, _: None) -> tuple[State, Metrics]:
            zeros = no_sums(step, state, hyper)

            def one(_: Int[Array, ""], carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
                state, sums = step(carry[0], hyper)
                return state, tree_add(carry[1], sums)

            return jax.lax.fori_loop(0, config.steps // config.num_logs, one, (state, zeros))

        return jax.lax.scan(report, init(process, key, hyper), length=config.num_logs)

    return train


@pytree_dataclass
class Log:
    """Transitions from anywhere, in any order.

    Attributes:
      terminated: the transition ended its episode (not: it was cut there).
    """

    states: Int[Array, " N"]
    actions: Int[Array, " N"]
    rewards: Float[Array, " N"]
    next_states: Int[Array, " N"]
    terminated: Bool[Array, " N"]


def learn_from_log(
    action_values: Float[Array, "S A"],
    log: Log,
    *,
    gamma: Scalar,
    sweeps: int,
    learning_rate: Scalar = 1.0,
) -> Float[Array, "S A"]:
    """Offline Q-learning: every Q moves towards the mean of its targets, once a sweep.

        Q(s, a) += learning_rate (mean over the log of [r + gamma max_a' Q(s', a')] - Q(s, a))

    At rate 1 it is fitted Q-iteration (Ernst et al. 2005) with a table, which is value iteration on the
    process that the log suggests. States and actions that the log lacks keep their values.

    Args:
      action_values: Q to begin with.
      sweeps: passes over the log.
    """
    place = (log.states, log.actions)
    counts = jnp.zeros(action_values.shape).at[place].add(1)

    def sweep(_: Int[Array, ""], q: Float[Array, "S A"]) -> Float[Array, "S A"]:
        next_values = jnp.where(log.terminated, 0, jnp.max(q[log.next_states], axis=-1))
        errors = log.rewards + gamma * next_values - q[place]
        total = jnp.zeros_like(q).at[place].add(errors)
        return q + learning_rate * total / jnp.maximum(counts, 1)

    return jax.lax.fori_loop(0, sweeps, sweep, action_values)
