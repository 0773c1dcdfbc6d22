"""Dyna (Sutton 1990): learning from what happened, and from what a model of it says would happen.

Every transition teaches Q as Q-learning does, and teaches the model: how often each state followed and what
was paid. Then Q is improved in `planning_steps` further places without moving. Which places, a planner
decides: `uniform_planning` takes pairs of state and action seen before (Dyna-Q; Sutton & Barto 2018, section
8.2), `prioritized_sweeping` those where most would change (Moore & Atkeson 1993; section 8.4). Without
planning steps both are Q-learning.

Planning uses the mean over the next states that the model knows, where Dyna-Q draws one: the same in a
process without chance, and without noise in others.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.loops.exploration import epsilon_greedy
from rlhf_jax.rl.tabular.dynamic_programming import DecisionProcess, greedy_policy, policy_values
from rlhf_jax.rl.tabular.steps import Step, draw_start, make_take, whole_episodes


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      episodes: in a whole run.
      max_episode_steps: an episode is cut, not terminated, after so many.
    """

    episodes: int = 50
    max_episode_steps: int = 10_000


@pytree_dataclass
class Hyper:
    """Hyperparameters of Dyna-Q that a sweep may vary (array leaves).

    The defaults are those of Sutton & Barto's figure 8.2.

    Attributes:
      learning_rate: of every change of Q, real or planned.
      gamma: discount per step, below 1.
      epsilon: share of random actions.
      planning_steps: changes of Q by the model after each transition; a whole number.
    """

    learning_rate: Scalar = 0.1
    gamma: Scalar = 0.95
    epsilon: Scalar = 0.1
    planning_steps: Scalar = 5.0


@pytree_dataclass
class TabularModel:
    """Tabular model of the process, learned from transitions.

    Attributes:
      counts: how often each state followed each state and action.
      reward_sums: all that was paid there.
      seen: numbers (state x actions + action) of the pairs seen, in that order; anything behind them.
      pairs: how many pairs were seen.
    """

    counts: Float[Array, "S A S"]
    reward_sums: Float[Array, "S A"]
    seen: Int[Array, " SA"]
    pairs: Int[Array, ""]


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      action_values: Q; it stays 0 in terminal states.
      priorities: by how much Q would change if it were computed anew; unused by `uniform_planning`.
      model: of the process.
      state: where the episode is.
      episode_steps: taken in this episode.
    """

    action_values: Float[Array, "S A"]
    priorities: Float[Array, "S A"]
    model: TabularModel
    state: Int[Array, ""]
    episode_steps: Int[Array, ""]
    key: PRNGKeyArray


Place = tuple[Int[Array, ""], Int[Array, ""]]
PlanFn = Callable[
    [Float[Array, "S A"], Float[Array, "S A"], TabularModel, PRNGKeyArray, Hyper],
    tuple[Float[Array, "S A"], Float[Array, "S A"]],
]
"""(Q, priorities, model, key, hyper) -> (Q, priorities) after one planning step."""


def init_model(num_states: int, num_actions: int) -> TabularModel:
    """A model that knows nothing."""
    zeros = jnp.zeros((num_states, num_actions))
    seen = jnp.zeros(num_states * num_actions, jnp.int32)
    return TabularModel(jnp.zeros((num_states, num_actions, num_states)), zeros, seen, jnp.int32(0))


def observe(model: TabularModel, step: Step) -> TabularModel:
    """The model that also knows of `step`."""
    place = (step.state, step.action)
    is_new = jnp.sum(model.counts[place]) == 0
    number = step.state * model.counts.shape[1] + step.action
    return TabularModel(
        counts=model.counts.at[(*place, step.next_state)].add(1),
        reward_sums=model.reward_sums.at[place].add(step.reward),
        # A pair seen before writes behind the end of those seen, where anything may stand.
        seen=model.seen.at[model.pairs].set(number, mode="drop"),
        pairs=model.pairs + is_new,
    )


def expected_target(
    model: TabularModel, action_values: Float[Array, "S A"], place: Place, *, gamma: Scalar
) -> Float[Array, ""]:
    """mean r(s, a) + gamma sum_s' P(s' | s, a) max_a' Q(s', a'), P and r being the model's."""
    counts = model.counts[place]
    visits = jnp.maximum(jnp.sum(counts), 1)
    next_values = jnp.sum(counts * jnp.max(action_values, axis=-1))
    return (model.reward_sums[place] + gamma * next_values) / visits


def uniform_planning(
    action_values: Float[Array, "S A"],
    priorities: Float[Array, "S A"],
    model: TabularModel,
    key: PRNGKeyArray,
    hyper: Hyper,
) -> tuple[Float[Array, "S A"], Float[Array, "S A"]]:
    """Any of the pairs seen so far, each alike (Sutton & Barto 2018, section 8.2, step f)."""
    number = model.seen[jax.random.randint(key, (), 0, model.pairs)]
    place = jnp.divmod(number, action_values.shape[1])
    error = expected_target(model, action_values, place, gamma=hyper.gamma) - action_values[place]
    return action_values.at[place].add(hyper.learning_rate * error), priorities


def prioritized_sweeping(
    action_values: Float[Array, "S A"],
    priorities: Float[Array, "S A"],
    model: TabularModel,
    key: PRNGKeyArray,
    hyper: Hyper,
) -> tuple[Float[Array, "S A"], Float[Array, "S A"]]:
    """The pair of the highest priority; then what leads to its state (Moore & Atkeson 1993).

        priority(s', a') <- max(priority(s', a'), P(s | s', a') |change of max_a Q(s, a)|)

    for all pairs that led to s. What the learning rate leaves of an error stays as its priority.
    """
    del key  # nothing here is left to chance
    place = jnp.divmod(jnp.argmax(priorities), action_values.shape[1])
    state = place[0]
    error = expected_target(model, action_values, place, gamma=hyper.gamma) - action_values[place]
    # With nothing to do, the first pair of all comes up, which may never have been tried.
    error = jnp.where(priorities[place] > 0, error, 0)
    changed = action_values.at[place].add(hyper.learning_rate * error)
    moved = jnp.abs(jnp.max(changed[state]) - jnp.max(action_values[state]))
    reaching = model.counts[:, :, state] / jnp.maximum(jnp.sum(model.counts, axis=-1), 1)
    priorities = priorities.at[place].set(jnp.abs((1 - hyper.learning_rate) * error))
    return changed, jnp.maximum(priorities, reaching * moved)


def init(process: DecisionProcess, key: PRNGKeyArray) -> State:
    """The state at step 0, Q being 0."""
    key, start_key = jax.random.split(key)
    zeros = jnp.zeros(process.rewards.shape[:2])
    return State(zeros, zeros, init_model(*zeros.shape), draw_start(process, start_key), jnp.int32(0), key)


def make_step(
    config: Config, process: DecisionProcess, plan_fn: PlanFn
) -> Callable[[State, Hyper], tuple[State, Metrics]]:
    """`step(state, hyper) -> (state, sums)`: one transition, what it teaches, and the planning after it."""
    take = make_take(process, max_episode_steps=config.max_episode_steps)

    def step(state: State, hyper: Hyper) -> tuple[State, Metrics]:
        key, action_key, walk_key, start_key, plan_key = jax.random.split(state.key, 5)
        q = state.action_values
        action = epsilon_greedy(q[state.state], action_key, epsilon=hyper.epsilon)
        taken = take((walk_key, start_key), state.state, action, state.episode_steps)
        place = (state.state, action)
        next_values = jnp.max(q[taken.next_state])
        q = q.at[place].add(hyper.learning_rate * (taken.reward + hyper.gamma * next_values - q[place]))
        model = observe(state.model, taken)
        surprise = jnp.abs(expected_target(model, q, place, gamma=hyper.gamma) - q[place])

        def plan(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return plan_fn(*carry, model, jax.random.fold_in(plan_key, number), hyper)

        carry = (q, state.priorities.at[place].set(surprise))
        q, priorities = jax.lax.fori_loop(0, jnp.asarray(hyper.planning_steps, jnp.int32), plan, carry)
        length = jnp.where(taken.done, 0, state.episode_steps + 1)
        sums = {"episodes": taken.done.astype(jnp.int32), "length": jnp.int32(1), "return": taken.reward}
        return State(q, priorities, model, taken.onwards, length, key), sums

    return step


def make_train(
    config: Config, process: DecisionProcess, plan_fn: PlanFn = uniform_planning
) -> Callable[[PRNGKeyArray, Hyper], tuple[State, Metrics]]:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`.

    Args:
      plan_fn: `uniform_planning`, `prioritized_sweeping`, or your own.

    Returns:
      A function whose history has a number for each episode: its `length` in steps, its undiscounted
      `return`, and `greedy_value`, the exact value of the start under the greedy policy after it.
    """
    step = make_step(config, process, plan_fn)

    def train(key: PRNGKeyArray, hyper: Hyper) -> tuple[State, Metrics]:
        def episode(state: State, _: None) -> tuple[State, Metrics]:
            state, sums = whole_episodes(step, state, hyper, episodes=1)
            values = policy_values(process, greedy_policy(state.action_values), gamma=hyper.gamma)
            sums = {"length": sums["length"][0], "return": sums["return"][0]}
            return state, {**sums, "greedy_value": jnp.sum(process.start * values)}

        return jax.lax.scan(episode, init(process, key), length=config.episodes)

    return train
