"""Options (Sutton, Precup & Singh 1999): courses of action with a beginning and an end, as actions.

An option is a policy, the states in which it may begin, and the chance that it ends in each state. Here they
are given, as arrays. Their exact models by linear equations make a decision process on the scale of options,
whose value iteration is `smdp_value_iteration`; `make_train` learns the same values from samples, by one of
two rules: `smdp_learning` once an option has ended, `intra_option_learning` at every step, for all options
that would have done the same.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.mazes import hallways, maze, rooms
from rlhf_jax.rl.loops.exploration import epsilon_greedy
from rlhf_jax.rl.tabular.dynamic_programming import (
    DecisionProcess,
    action_values,
    fixed_point,
    greedy_policy,
    value_iteration,
)
from rlhf_jax.rl.tabular.steps import Step, draw_start, make_take, whole_episodes


@pytree_dataclass
class OptionSet:
    """O options of a process.

    Attributes:
      policies: chance of each action in each state; anything where the option cannot be.
      terminations: chance that the option ends on arrival in each state.
      initiations: states in which it may begin.
    """

    policies: Float[Array, "O S A"]
    terminations: Float[Array, "O S"]
    initiations: Bool[Array, "O S"]


def primitive_options(process: DecisionProcess) -> OptionSet:
    """Each action as an option of one step."""
    size, count = process.rewards.shape[:2]
    policies = jnp.broadcast_to(jnp.eye(count)[:, None], (count, size, count))
    return OptionSet(policies, jnp.ones((count, size)), jnp.ones((count, size), bool))


def hallway_options(rows: tuple[str, ...], *, slip: float = 0.0, gamma: float = 0.9) -> OptionSet:
    """For each room and each hallway beside it: the shortest way there, from the room or its other hallways.

    Args:
      rows: as for `mazes.maze`; where S and G are does not matter.
      slip: what shortest ways reckon with.
      gamma: discount that makes a way short.
    """
    numbers, beside = rooms(rows), hallways(rows)
    pairs = [(room, hallway) for hallway, near in beside.items() for room in near]
    inside = np.stack(
        [
            (numbers == room) | np.isin(np.arange(len(numbers)), [h for h in beside if room in beside[h]])
            for room, _ in pairs
        ]
    )
    targets = jnp.asarray([hallway for _, hallway in pairs])
    is_target = jnp.arange(len(numbers)) == targets[:, None]
    initiations = jnp.asarray(inside) & ~is_target
    plain = maze(tuple(row.replace("G", ".") for row in rows), slip=slip)

    def policy(initiation: Bool[Array, " S"], is_target: Bool[Array, " S"]) -> Float[Array, "S A"]:
        rewards = jnp.broadcast_to(is_target.astype(jnp.float32), plain.rewards.shape)
        way = dataclasses.replace(plain, rewards=rewards, terminal=~initiation)
        values, _ = value_iteration(way, gamma=gamma)
        return greedy_policy(action_values(way, values, gamma=gamma))

    policies = jax.vmap(policy)(initiations, is_target)
    return OptionSet(policies, (~initiations).astype(jnp.float32), initiations)


def joined(*several: OptionSet) -> OptionSet:
    """Union of several option sets."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *several)


# Exact ------------------------------------------------------------------------------------------------


@pytree_dataclass
class OptionModels:
    """Option models (reward and discounted transition), begun in each state.

    Attributes:
      rewards: expected discounted reward until the option ends.
      reached: sum over k of gamma^k times the chance to end in each state after k steps.
    """

    rewards: Float[Array, "O S"]
    reached: Float[Array, "O S S"]


def option_models(process: DecisionProcess, options: OptionSet, *, gamma: Scalar) -> OptionModels:
    """Exact models by linear equations (Sutton, Precup & Singh 1999, section 2: their Bellman equations).

        r = r_pi + gamma P_pi (1 - beta) r,   p = gamma P_pi (beta + (1 - beta) p)

    An option ends where the episode does, and terminal states lead nowhere.

    Args:
      gamma: below 1, or 1 where every option ends.
    """

    def one(policy: Float[Array, "S A"], termination: Float[Array, " S"]) -> tuple[Array, Array]:
        live = ~process.terminal[:, None]
        onwards = jnp.where(live, jnp.einsum("sa,sat->st", policy, process.transitions), 0)
        rewards = jnp.einsum("sa,sat,sat->s", policy, process.transitions, process.rewards)
        ends = jnp.where(process.terminal, 1, termination)
        system = jnp.eye(len(ends)) - gamma * onwards * (1 - ends)
        right = jnp.concatenate(
            [jnp.where(process.terminal, 0, rewards)[:, None], gamma * onwards * ends], axis=1
        )
        solved = jnp.linalg.solve(system, right)
        return solved[:, 0], solved[:, 1:]

    rewards, reached = jax.vmap(one)(options.policies, options.terminations)
    return OptionModels(rewards, reached)


def best_values(option_values: Float[Array, "S O"], initiations: Bool[Array, "O S"]) -> Float[Array, " S"]:
    """Value of the best option that may begin in each state; 0 where none may."""
    allowed = initiations.T
    best = jnp.max(jnp.where(allowed, option_values, -jnp.inf), axis=-1)
    return jnp.where(jnp.any(allowed, axis=-1), best, 0)


def smdp_value_iteration(
    process: DecisionProcess,
    options: OptionSet,
    *,
    gamma: Scalar,
    tolerance: Scalar = 1e-6,
    max_sweeps: int = 10_000,
) -> tuple[Float[Array, "S O"], Int[Array, ""]]:
    """The best values that choices among these options reach (Sutton, Precup & Singh 1999, section 3).

        Q(s, o) = r_o(s) + sum_s' p_o(s' | s) max_o' Q(s', o')

    Returns:
      (Q, sweeps), Q being 0 where an option may not begin.
    """
    models = option_models(process, options, gamma=gamma)

    def backup(q: Float[Array, "S O"]) -> Float[Array, "S O"]:
        next_values = jnp.where(process.terminal, 0, best_values(q, options.initiations))
        return jnp.where(options.initiations.T, (models.rewards + models.reached @ next_values).T, 0)

    return fixed_point(
        backup, jnp.zeros(options.initiations.T.shape), tolerance=tolerance, max_sweeps=max_sweeps
    )


# Learning ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      episodes: in a whole run.
      max_episode_steps: an episode is cut, not terminated, after so many.
    """

    episodes: int = 100
    max_episode_steps: int = 10_000


@pytree_dataclass
class Hyper:
    """Hyperparameters of option learning that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of every change of Q.
      gamma: discount per step of the process, however long an option takes.
      epsilon: share of random options, where one is chosen.
    """

    learning_rate: Scalar = 0.25
    gamma: Scalar = 0.9
    epsilon: Scalar = 0.1


@pytree_dataclass
class Course:
    """An option on its way.

    Attributes:
      option: which.
      begun: state in which it began.
      reward: discounted, since then.
      discount: gamma^steps since then.
    """

    option: Int[Array, ""]
    begun: Int[Array, ""]
    reward: Float[Array, ""]
    discount: Float[Array, ""]


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      option_values: Q.
      state: where the episode is.
      course: of the option that is followed.
      episode_steps: taken in this episode.
    """

    option_values: Float[Array, "S O"]
    state: Int[Array, ""]
    course: Course
    episode_steps: Int[Array, ""]
    key: PRNGKeyArray


Rule = Callable[[Float[Array, "S O"], OptionSet, Course, Step, Bool[Array, ""], Hyper], Float[Array, "S O"]]
"""(Q, options, course after the step, step, whether the option ended with it, hyper) -> Q."""


def smdp_learning(
    option_values: Float[Array, "S O"],
    options: OptionSet,
    course: Course,
    step: Step,
    ended: Bool[Array, ""],
    hyper: Hyper,
) -> Float[Array, "S O"]:
    """Q-learning between decisions (Sutton, Precup & Singh 1999, section 3.2).

    Q(s, o) += learning_rate (r + gamma^k max_o' Q(s', o') - Q(s, o))

    for an option begun in s that ended in s' after k steps, r being discounted.
    """
    best = best_values(option_values, options.initiations)[step.next_state]
    target = course.reward + course.discount * jnp.where(step.terminated, 0, best)
    place = (course.begun, course.option)
    error = jnp.where(ended, target - option_values[place], 0)
    return option_values.at[place].add(hyper.learning_rate * error)


def intra_option_learning(
    option_values: Float[Array, "S O"],
    options: OptionSet,
    course: Course,
    step: Step,
    ended: Bool[Array, ""],
    hyper: Hyper,
) -> Float[Array, "S O"]:
    """One step teaches every option that may be there and takes the action (the same, section 6.2).

        Q(s, o) += learning_rate (r + gamma U(s', o) - Q(s, o))
        U(s, o)  = (1 - beta_o(s)) Q(s, o) + beta_o(s) max_o' Q(s, o')

    weighted by pi_o(a | s), which is 1 or 0 for the policies without chance that the paper has.
    """
    ends = options.terminations[:, step.next_state]
    best = best_values(option_values, options.initiations)[step.next_state]
    next_values = (1 - ends) * option_values[step.next_state] + ends * best
    targets = step.reward + hyper.gamma * jnp.where(step.terminated, 0, next_values)
    weights = options.policies[:, step.state, step.action] * options.initiations[:, step.state]
    errors = weights * (targets - option_values[step.state])
    return option_values.at[step.state].add(hyper.learning_rate * errors)


def choose(
    option_values: Float[Array, "S O"], options: OptionSet, state: Array, key: PRNGKeyArray, hyper: Hyper
) -> Course:
    """An option to begin in `state`, epsilon-greedily among those that may."""
    allowed = options.initiations[:, state]
    option = epsilon_greedy(option_values[state], key, epsilon=hyper.epsilon, available=allowed)
    return Course(option, state, jnp.float32(0), jnp.float32(1))


def init(process: DecisionProcess, options: OptionSet, key: PRNGKeyArray, hyper: Hyper) -> State:
    """The state at step 0, Q being 0."""
    key, start_key, option_key = jax.random.split(key, 3)
    q = jnp.zeros(options.initiations.T.shape)
    start = draw_start(process, start_key)
    return State(q, start, choose(q, options, start, option_key, hyper), jnp.int32(0), key)


def make_step(
    config: Config, process: DecisionProcess, options: OptionSet, rule: Rule
) -> Callable[[State, Hyper], tuple[State, Metrics]]:
    """`step(state, hyper) -> (state, sums)`: one transition, and what it teaches."""
    take = make_take(process, max_episode_steps=config.max_episode_steps)
    log_policies = jnp.log(options.policies)

    def step(state: State, hyper: Hyper) -> tuple[State, Metrics]:
        key, action_key, walk_key, start_key, end_key, option_key = jax.random.split(state.key, 6)
        course = state.course
        action = jax.random.categorical(action_key, log_policies[course.option, state.state])
        taken = take((walk_key, start_key), state.state, action, state.episode_steps)
        course = dataclasses.replace(
            course,
            reward=course.reward + course.discount * taken.reward,
            discount=course.discount * hyper.gamma,
        )
        chance = options.terminations[course.option, taken.next_state]
        ended = taken.done | jax.random.bernoulli(end_key, chance)
        q = rule(state.option_values, options, course, taken, ended, hyper)
        fresh = choose(q, options, taken.onwards, option_key, hyper)
        course = jax.tree.map(lambda a, b: jnp.where(ended, a, b), fresh, course)
        length = jnp.where(taken.done, 0, state.episode_steps + 1)
        sums = {"episodes": taken.done.astype(jnp.int32), "length": jnp.int32(1), "return": taken.reward}
        return State(q, taken.onwards, course, length, key), sums

    return step


def make_train(
    config: Config, process: DecisionProcess, options: OptionSet, rule: Rule
) -> Callable[[PRNGKeyArray, Hyper], tuple[State, Metrics]]:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`.

    Args:
      options: at least one may begin wherever another ends.
      rule: `smdp_learning`, `intra_option_learning`, or your own.

    Returns:
      A function whose history has the `length` and the undiscounted `return` of each episode.
    """
    step = make_step(config, process, options, rule)

    def train(key: PRNGKeyArray, hyper: Hyper) -> tuple[State, Metrics]:
        state = init(process, options, key, hyper)
        return whole_episodes(step, state, hyper, episodes=config.episodes)

    return train
