"""Feudal Q-learning with tables, two levels (after Dayan & Hinton 1993).

A manager sees only in which region it is, and commands: be in that region next, or, naming the one it is in,
stay and look for reward. A worker sees the state and the command, and acts. Reward is hidden: the worker is
paid for what it was told, 1 on arrival in the region, and by the environment only under the command to stay.
Information is hidden: the manager knows nothing of where in a region the worker is.

Both learn by Q-learning, the manager over the time that a command lasts: until the region changes, the
episode ends, or `patience` steps have passed. Each step teaches the worker every command, whichever was
given, as Q-learning, being off-policy, allows. What a command means does not change with the task, so that
a worker's skills outlive a goal.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.loops.exploration import epsilon_greedy
from rlhf_jax.rl.tabular.dynamic_programming import DecisionProcess
from rlhf_jax.rl.tabular.steps import Step, draw_start, make_take, whole_episodes


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      episodes: in a whole run.
      max_episode_steps: an episode is cut, not terminated, after so many.
      patience: steps after which the manager commands anew.
    """

    episodes: int = 100
    max_episode_steps: int = 10_000
    patience: int = 50


@pytree_dataclass
class Hyper:
    """Hyperparameters of the feudal hierarchy that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the worker.
      manager_learning_rate: of the manager.
      gamma: discount per step, of both.
      epsilon: share of random actions of the worker.
      manager_epsilon: share of random commands.
    """

    learning_rate: Scalar = 0.25
    manager_learning_rate: Scalar = 0.25
    gamma: Scalar = 0.9
    epsilon: Scalar = 0.1
    manager_epsilon: Scalar = 0.1


@pytree_dataclass
class Order:
    """A command on its way.

    Attributes:
      region: where to be.
      begun: region in which it was given.
      steps: since then.
      reward: of the environment, discounted, since then.
    """

    region: Int[Array, ""]
    begun: Int[Array, ""]
    steps: Int[Array, ""]
    reward: Float[Array, ""]


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      worker_values: Q of each action under each command.
      manager_values: Q of each command in each region.
      state: where the episode is.
      order: the command that is followed.
      episode_steps: taken in this episode.
    """

    worker_values: Float[Array, "R S A"]
    manager_values: Float[Array, "R R"]
    state: Int[Array, ""]
    order: Order
    episode_steps: Int[Array, ""]
    key: PRNGKeyArray


def command(manager_values: Float[Array, "R R"], region: Array, key: PRNGKeyArray, hyper: Hyper) -> Order:
    """The manager's command in `region`, epsilon-greedily; neither neighbours nor ways are known to it."""
    chosen = epsilon_greedy(manager_values[region], key, epsilon=hyper.manager_epsilon)
    return Order(chosen, region, jnp.int32(0), jnp.float32(0))


def teach_worker(
    worker_values: Float[Array, "R S A"], regions: Int[Array, " S"], step: Step, hyper: Hyper
) -> Float[Array, "R S A"]:
    """One step of Q-learning for every command.

    A command to go elsewhere ends with any change of region and pays 1 if it led to the one named; the
    command to stay ends with a change of region as well, and pays what the environment pays.
    """
    ordered = jnp.arange(worker_values.shape[0])
    here, there = regions[step.state], regions[step.next_state]
    staying = ordered == here
    over = step.terminated | (here != there)
    arrived = (ordered == there) & (here != there)
    rewards = jnp.where(staying, step.reward, arrived.astype(jnp.float32))
    next_values = jnp.where(over, 0, jnp.max(worker_values[:, step.next_state], axis=-1))
    errors = rewards + hyper.gamma * next_values - worker_values[:, step.state, step.action]
    return worker_values.at[:, step.state, step.action].add(hyper.learning_rate * errors)


def teach_manager(
    manager_values: Float[Array, "R R"],
    order: Order,
    region: Int[Array, ""],
    *,
    over: Bool[Array, ""],
    terminated: Bool[Array, ""],
    hyper: Hyper,
) -> Float[Array, "R R"]:
    """Q-learning over the time a command lasted; nothing while it lasts.

    Args:
      order: with the steps and rewards of all its time.
      region: where it ended.
      over: whether it ended.
      terminated: whether the episode did.
    """
    next_values = jnp.where(terminated, 0, jnp.max(manager_values[region]))
    discount = jnp.asarray(hyper.gamma, jnp.float32) ** order.steps
    place = (order.begun, order.region)
    error = jnp.where(over, order.reward + discount * next_values - manager_values[place], 0)
    return manager_values.at[place].add(hyper.manager_learning_rate * error)


def init(process: DecisionProcess, regions: Int[np.ndarray, " S"], key: PRNGKeyArray, hyper: Hyper) -> State:
    """The state at step 0, both Q being 0.

    Args:
      regions: number of the region of each state, from 0.
    """
    key, start_key, command_key = jax.random.split(key, 3)
    count = int(regions.max()) + 1
    manager_values = jnp.zeros((count, count))
    start = draw_start(process, start_key)
    return State(
        worker_values=jnp.zeros((count, *process.rewards.shape[:2])),
        manager_values=manager_values,
        state=start,
        order=command(manager_values, jnp.asarray(regions)[start], command_key, hyper),
        episode_steps=jnp.int32(0),
        key=key,
    )


def make_step(
    config: Config, process: DecisionProcess, regions: Int[np.ndarray, " S"]
) -> Callable[[State, Hyper], tuple[State, Metrics]]:
    """`step(state, hyper) -> (state, sums)`: one transition, and what it teaches both."""
    take = make_take(process, max_episode_steps=config.max_episode_steps)
    region_of = jnp.asarray(regions)

    def step(state: State, hyper: Hyper) -> tuple[State, Metrics]:
        key, action_key, walk_key, start_key, command_key = jax.random.split(state.key, 5)
        order = state.order
        values = state.worker_values[order.region, state.state]
        action = epsilon_greedy(values, action_key, epsilon=hyper.epsilon)
        taken = take((walk_key, start_key), state.state, action, state.episode_steps)
        discount = jnp.asarray(hyper.gamma, jnp.float32) ** order.steps
        order = dataclasses.replace(
            order, steps=order.steps + 1, reward=order.reward + discount * taken.reward
        )
        region = region_of[taken.next_state]
        over = taken.done | (region != order.begun) | (order.steps >= config.patience)
        manager_values = teach_manager(
            state.manager_values, order, region, over=over, terminated=taken.terminated, hyper=hyper
        )
        fresh = command(manager_values, region_of[taken.onwards], command_key, hyper)
        new = State(
            worker_values=teach_worker(state.worker_values, region_of, taken, hyper),
            manager_values=manager_values,
            state=taken.onwards,
            order=jax.tree.map(lambda a, b: jnp.where(over, a, b), fresh, order),
            episode_steps=jnp.where(taken.done, 0, state.episode_steps + 1),
            key=key,
        )
        sums = {"episodes": taken.done.astype(jnp.int32), "length": jnp.int32(1), "return": taken.reward}
        return new, sums

    return step


def make_train(
    config: Config, process: DecisionProcess, regions: Int[np.ndarray, " S"]
) -> Callable[[PRNGKeyArray, Hyper], tuple[State, Metrics]]:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`.

    Args:
      regions: number of the region of each state, from 0, such as `mazes.regions`.

    Returns:
      A function whose history has the `length` and the undiscounted `return` of each episode.
    """
    step = make_step(config, process, regions)

    def train(key: PRNGKeyArray, hyper: Hyper) -> tuple[State, Metrics]:
        state = init(process, regions, key, hyper)
        return whole_episodes(step, state, hyper, episodes=config.episodes)

    return train
