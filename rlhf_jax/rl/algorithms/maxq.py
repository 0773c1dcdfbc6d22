"""MAXQ-Q (Dietterich 2000): Q-learning of a hierarchy of tasks whose values are sums.

    V(i, s) = max_a [V(a, s) + C(i, s, a)],  V(a, s) = E[r | s, a] of an action a

V(a, s) is what child a of task i earns, and C(i, s, a) what task i earns once that has completed (the
decomposition of section 3.3). Each task learns its own completion values, from whatever task called it, so
that the policy found is recursively optimal. The task graph is data (`tabular.task_graphs`).

All that a step teaches is computed from the tables before it, and a child teaches about the state in which
it was called alone. A task cut short by its
caller's end has completed as well; one cut by a time limit has not, and teaches nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.environments import Environment, EnvState, Transition, episode_metrics, take_statistics
from rlhf_jax.rl.envs.processes import ProcessEnvironment
from rlhf_jax.rl.loops.exploration import epsilon_greedy, linear_decay
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.tabular.task_graphs import TaskGraph, flat_tasks


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for Taxi.

    Attributes:
      total_steps: environment steps of a run, rounded down to whole reports.
      num_logs: reports.
      hierarchical: by the environment's own tasks; False for one task above all actions, which is Q-learning.
      abstract: tasks and actions look at what they need of a state only, as their graph says.
    """

    total_steps: int = 100_000
    num_logs: int = 20
    hierarchical: bool = True
    abstract: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of MAXQ-Q that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of all tables.
      gamma: discount per step of the environment, however long a child takes.
      epsilon_start: share of random choices at first, of every task.
      epsilon_end: and at last.
      epsilon_steps: steps over which it falls linearly.
    """

    learning_rate: Scalar = 0.5
    gamma: Scalar = 1.0
    epsilon_start: Scalar = 0.5
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 50_000.0


@pytree_dataclass
class Tables:
    """Tables of the decomposed values; the second axis of each is that of abstract states.

    Attributes:
      rewards: V of the actions.
      completions: C, of what the environment pays.
      inner_completions: the same with pseudo-rewards, by which each task chooses.
    """

    rewards: Float[Array, "A S"]
    completions: Float[Array, "N S M"]
    inner_completions: Float[Array, "N S M"]


@pytree_dataclass
class Stack:
    """The tasks under way, the root first, and below the last of them an action; -1 behind it.

    Attributes:
      nodes: which.
      begun: state in which each was called.
      steps: since then.
    """

    nodes: Int[Array, "*B D"]
    begun: Int[Array, "*B D"]
    steps: Int[Array, "*B D"]


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      stack: its action is the one to be taken next.
      epsilon: share of random choices now.
    """

    tables: Tables
    stack: Stack
    env: EnvState
    steps: Int[Array, ""]
    epsilon: Float[Array, ""]
    key: PRNGKeyArray


@pytree_dataclass
class Graph:
    """The arrays of a task graph."""

    children: Bool[Array, "N M"]
    terminations: Bool[Array, "N S"]
    pseudo_rewards: Float[Array, "N S"]
    abstractions: Int[Array, "M S"]

    @property
    def num_tasks(self) -> int:
        """N."""
        return self.children.shape[0]


def as_arrays(tasks: TaskGraph, *, abstract: bool = True) -> Graph:
    """The graph on the device; without abstraction every node sees the whole state."""
    whole = jnp.broadcast_to(jnp.arange(tasks.abstractions.shape[1]), tasks.abstractions.shape)
    abstractions = jnp.asarray(tasks.abstractions) if abstract else whole
    return Graph(
        jnp.asarray(tasks.children),
        jnp.asarray(tasks.terminations),
        jnp.asarray(tasks.pseudo_rewards),
        abstractions,
    )


def init_tables(graph: Graph) -> Tables:
    """All values 0."""
    (num_tasks, nodes), states = graph.children.shape, graph.abstractions.shape[1]
    completions = jnp.zeros((num_tasks, states, nodes))
    return Tables(jnp.zeros((nodes - num_tasks, states)), completions, completions)


@pytree_dataclass
class Values:
    """Values in one state.

    Attributes:
      nodes: V of each task and action; 0 of a task that is over there.
      inner: V(a, s) + C(i, s, a) with pseudo-rewards, of each task i and child a; -inf where it may not call.
      outer: the same without them.
    """

    nodes: Float[Array, " M"]
    inner: Float[Array, "N M"]
    outer: Float[Array, "N M"]


def values_at(tables: Tables, graph: Graph, state: Int[Array, ""], *, depth: int) -> Values:
    """The decomposed values in a state, from the actions up (Dietterich 2000, section 3.3).

    Args:
      depth: of the graph; V of a task is right after so many rounds as it has tasks below it.
    """
    count = graph.num_tasks
    seen = graph.abstractions[:, state]
    own = jnp.arange(count)
    over = graph.terminations[:, state]
    callable_ = graph.children & jnp.concatenate([~over, jnp.ones(seen.shape[0] - count, bool)])
    inner_completions = tables.inner_completions[own, seen[:count]]
    completions = tables.completions[own, seen[:count]]
    rewards = tables.rewards[jnp.arange(tables.rewards.shape[0]), seen[count:]]
    nodes = jnp.concatenate([jnp.zeros(count), rewards])
    for _ in range(depth):
        inner = jnp.where(callable_, nodes + inner_completions, -jnp.inf)
        outer = jnp.where(callable_, nodes + completions, -jnp.inf)
        best = outer[own, jnp.argmax(inner, axis=-1)]
        nodes = nodes.at[:count].set(jnp.where(over | ~jnp.any(callable_, axis=-1), 0, best))
    inner = jnp.where(callable_, nodes + inner_completions, -jnp.inf)
    return Values(nodes, inner, jnp.where(callable_, nodes + completions, -jnp.inf))


def root_alone(state: Int[Array, ""], *, depth: int) -> Stack:
    """The stack of an episode that begins in `state`."""
    nodes = jnp.full(depth + 1, -1).at[0].set(0)
    return Stack(nodes, jnp.full(depth + 1, state), jnp.zeros(depth + 1, jnp.int32))


def descend(
    stack: Stack, values: Values, graph: Graph, state: Int[Array, ""], key: PRNGKeyArray, *, epsilon: Scalar
) -> Stack:
    """The stack down to an action: every task without a child calls one, epsilon-greedily."""
    nodes, begun, steps = stack.nodes, stack.begun, stack.steps
    for level, own in enumerate(jax.random.split(key, len(nodes) - 1), start=1):
        task = nodes[level - 1]
        inner = values.inner[jnp.clip(task, 0, graph.num_tasks - 1)]
        child = epsilon_greedy(inner, own, epsilon=epsilon, available=inner > -jnp.inf)
        calls = (task >= 0) & (task < graph.num_tasks) & (nodes[level] < 0)
        nodes = nodes.at[level].set(jnp.where(calls, child, nodes[level]))
        begun = begun.at[level].set(jnp.where(calls, state, begun[level]))
        steps = steps.at[level].set(jnp.where(calls, 0, steps[level]))
    return Stack(nodes, begun, steps)


def action_of(stack: Stack, graph: Graph) -> Int[Array, ""]:
    """The action at the end of the stack."""
    return jnp.max(stack.nodes, axis=-1) - graph.num_tasks


def ended(stack: Stack, graph: Graph, state: Int[Array, ""], done: Bool[Array, ""]) -> Bool[Array, " D"]:
    """Nodes of the stack that are over in `state`: actions, tasks that say so, and all below such a task."""
    is_task = (stack.nodes >= 0) & (stack.nodes < graph.num_tasks)
    over = graph.terminations[jnp.clip(stack.nodes, 0, graph.num_tasks - 1), state]
    return jax.lax.cummax(jnp.where(is_task, over | done, True).astype(jnp.int32)).astype(bool)


def completed(stack: Stack, over: Bool[Array, " D"], state: Int[Array, ""], done: Bool[Array, ""]) -> Stack:
    """The stack without the nodes that are over; the root is called again at once."""
    kept = Stack(jnp.where(over, -1, stack.nodes), stack.begun, stack.steps)
    fresh = root_alone(state, depth=len(over) - 1)
    return jax.tree.map(lambda new, old: jnp.where(done | over[0], new, old), fresh, kept)


def maxq_update(
    tables: Tables,
    graph: Graph,
    stack: Stack,
    seen: Transition,
    hyper: Hyper,
    *,
    depth: int,
) -> Tables:
    """MAXQ-Q update (Dietterich 2000, section 4) by one step, for every child that it completed.

        V(a, s)     += learning_rate (r - V(a, s))
        C(i, s, a)  += learning_rate (gamma^N [V(b, s') + C(i, s', b)] - C(i, s, a))
        C~(i, s, a) += learning_rate (gamma^N [R~_i(s') + V(b, s') + C~(i, s', b)] - C~(i, s, a))

    for a child a that task i called in s and that took N steps to s', b being the best by C~ there. Where i
    is over in s' nothing follows but R~_i, its pseudo-reward.

    Args:
      stack: of the action taken, its steps those before it.
    """
    state = seen.next_obs
    values = values_at(tables, graph, state, depth=depth)
    over = ended(stack, graph, state, seen.terminated)
    rate, action = hyper.learning_rate, action_of(stack, graph)
    place = (action, graph.abstractions[graph.num_tasks + action, seen.obs])
    rewards = tables.rewards.at[place].add(rate * (seen.reward - tables.rewards[place]))
    # Every level at once, and all reading before any writing: the tables are changed in place.
    callers, children = jnp.clip(stack.nodes[:-1], 0, graph.num_tasks - 1), stack.nodes[1:]
    counts = over[1:] & (children >= 0)
    best = jnp.argmax(values.inner[callers], axis=-1)
    caller_over = graph.terminations[callers, state]
    stops = caller_over | seen.terminated
    bonus = jnp.where(caller_over, graph.pseudo_rewards[callers, state], 0)
    discounts = jnp.power(hyper.gamma, stack.steps[1:] + 1)
    places = (callers, graph.abstractions[callers, stack.begun[1:]], children)

    def moved(table: Float[Array, "N S M"], targets: Float[Array, " D"]) -> Float[Array, "N S M"]:
        return table.at[places].add(rate * jnp.where(counts, targets - table[places], 0))

    outer, inner = (jnp.where(stops, 0, x[callers, best]) for x in (values.outer, values.inner))
    completions = moved(tables.completions, discounts * outer)
    return Tables(rewards, completions, moved(tables.inner_completions, discounts * (inner + bonus)))


def tasks_of(config: Config, env: Environment) -> TaskGraph:
    """The hierarchy of an environment's states.

    Raises:
      UserError: its observations are no numbers of states, or its actions none.
    """
    if env.num_states is None or env.num_actions is None:
        raise UserError(f"MAXQ needs numbered states and actions, which {env.name} has not: use Taxi.")
    if config.hierarchical and isinstance(env.raw, ProcessEnvironment):
        return env.raw.tasks
    return flat_tasks(env.num_states, env.num_actions)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`; a step is a report.

    Raises:
      UserError: there are fewer steps than reports.
    """
    tasks = tasks_of(config, env)
    graph, depth = as_arrays(tasks, abstract=config.abstract), tasks.depth
    per_log = config.total_steps // config.num_logs
    if per_log < 1:
        raise UserError(f"MAXQ: total_steps={config.total_steps} is less than num_logs={config.num_logs}")

    def choose(tables: Tables, stack: Stack, obs: Array, key: PRNGKeyArray, epsilon: Scalar) -> Stack:
        return descend(stack, values_at(tables, graph, obs, depth=depth), graph, obs, key, epsilon=epsilon)

    def init(key: PRNGKeyArray, hyper: Hyper) -> State:
        key, env_key, choice_key = jax.random.split(key, 3)
        tables, start = init_tables(graph), env.reset(env_key, env_params)
        epsilon = jnp.asarray(hyper.epsilon_start, jnp.float32)
        stack = choose(tables, root_alone(start.obs, depth=depth), start.obs, choice_key, epsilon)
        return State(tables, stack, start, jnp.int32(0), epsilon, key)

    def transition(state: State, hyper: Hyper) -> State:
        key, env_key, choice_key = jax.random.split(state.key, 3)
        start, seen = env.step(env_key, state.env, action_of(state.stack, graph), env_params)
        tables = maxq_update(state.tables, graph, state.stack, seen, hyper, depth=depth)
        later = dataclasses.replace(state.stack, steps=state.stack.steps + 1)
        over = ended(later, graph, seen.next_obs, seen.terminated)
        stack = completed(later, over, start.obs, seen.done)
        steps = state.steps + 1
        epsilon = linear_decay(
            steps, start=hyper.epsilon_start, end=hyper.epsilon_end, steps=hyper.epsilon_steps
        )
        stack = choose(tables, stack, start.obs, choice_key, epsilon)
        return State(tables, stack, start, steps, jnp.asarray(epsilon, jnp.float32), key)

    def step(state: State, hyper: Hyper) -> tuple[State, Metrics]:
        state = jax.lax.fori_loop(0, per_log, lambda _, state: transition(state, hyper), state)
        after, statistics = take_statistics(state.env)
        metrics = {"steps": state.steps, "epsilon": state.epsilon, **episode_metrics(statistics)}
        return dataclasses.replace(state, env=after), metrics

    def act(
        state: State, obs: Array, is_first: Array, carry: Stack, key: PRNGKeyArray, *, deterministic: bool
    ) -> tuple[Array, Stack]:
        epsilon = 0.0 if deterministic else state.epsilon

        def one(stack: Stack, obs: Array, first: Array, key: PRNGKeyArray) -> Stack:
            over = ended(stack, graph, obs, first)
            return choose(state.tables, completed(stack, over, obs, first), obs, key, epsilon)

        stack = jax.vmap(one)(carry, obs, is_first, jax.random.split(key, len(obs)))
        return action_of(stack, graph), stack

    def initial_carry(count: int) -> Stack:
        return jax.vmap(lambda state: root_alone(state, depth=depth))(jnp.zeros(count, jnp.int32))

    return Run(init, step, act, config.num_logs, per_log, initial_carry)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
