"""MAXQ: Taxi and processes as environments, the update against a recursion, no hierarchy as Q-learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import maxq
from rlhf_jax.rl.envs import environments, mazes, processes
from rlhf_jax.rl.envs.environments import adapt, first_state
from rlhf_jax.rl.envs.processes import ProcessEnvironment, ProcessParams, ProcessState
from rlhf_jax.rl.envs.taxi import taxi, taxi_tasks
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.tabular.dynamic_programming import value_iteration
from rlhf_jax.rl.tabular.task_graphs import TaskGraph, flat_tasks

PICTURE = ("R .|. . G", ". .|. . .", ". . . . .", ".|. .|. .", "Y|. .|B .")
TAXI = taxi()
STARTS = np.flatnonzero(np.asarray(TAXI.start))


# Environments ----------------------------------------------------------------------------------------


def distances(letter):
    """Steps to a place from each of the cells, walls being bars of the picture."""
    place = next((y, row.index(letter) // 2) for y, row in enumerate(PICTURE) if letter in row)
    found, line = {place: 0}, [place]
    for y, x in line:
        near = [(y - 1, x), (y + 1, x)]
        near += [(y, x - 1)] * (x > 0 and PICTURE[y][2 * x - 1] != "|")
        near += [(y, x + 1)] * (x < 4 and PICTURE[y][min(2 * x + 1, 8)] != "|")
        for cell in near:
            if 0 <= cell[0] < 5 and cell not in found:
                found[cell] = found[y, x] + 1
                line.append(cell)
    return {5 * y + x: steps for (y, x), steps in found.items()}


def test_the_best_taxi_takes_the_shortest_way():
    values, _ = value_iteration(TAXI, gamma=1.0)
    ways = {place: distances(letter) for place, letter in enumerate("RGYB")}
    places = [min(way, key=way.get) for way in ways.values()]
    assert len(STARTS) == 400
    for state in STARTS.tolist():
        cell, passenger, destination = state // 20, state // 4 % 5, state % 4
        steps = ways[passenger][cell] + 1 + ways[destination][places[passenger]] + 1
        np.testing.assert_allclose(values[state], 21 - steps, atol=1e-4)


def test_what_is_in_vain_costs_ten():
    at_r_with_passenger_at_g = 0 * 20 + 1 * 4 + 2
    riding_to_b = 0 * 20 + 4 * 4 + 3
    for state, action in ((at_r_with_passenger_at_g, 4), (at_r_with_passenger_at_g, 5), (riding_to_b, 5)):
        assert TAXI.transitions[state, action, state] == 1
        assert TAXI.rewards[state, action, state] == -10


def test_a_process_as_an_environment_has_its_chances():
    env, params = processes.make("HallwayRooms")
    process = mazes.maze(mazes.FOUR_ROOMS, slip=1 / 3)
    state = first_state(ProcessState(jnp.int32(14), jnp.int32(499)), jnp.int32(14))
    step = jax.jit(jax.vmap(env.step, (0, None, None, None)))
    _, seen = step(jax.random.split(jax.random.key(0), 6000), state, jnp.int32(2), params)
    shares = np.bincount(seen.next_obs, minlength=169) / 6000
    np.testing.assert_allclose(shares, process.transitions[14, 2], atol=0.03)
    assert jnp.all(seen.truncated)
    assert jnp.all(seen.reward == -1)
    assert env.num_states == 169
    assert env.num_actions == 4
    start = jax.vmap(processes.make("Taxi")[0].reset, (0, None))(
        jax.random.split(jax.random.key(1), 99), None
    )
    assert jnp.all(TAXI.start[start.obs] > 0)


# The update ------------------------------------------------------------------------------------------


def recorded(process, tasks, steps, hyper, *, max_steps=30, config=maxq.Config()):
    """(stacks and states before each of so many steps, the tables after them)."""
    params = ProcessParams(max_steps)
    env = adapt("process", ProcessEnvironment(process, tasks), params)
    run = maxq.make_run(dataclasses.replace(config, total_steps=steps, num_logs=steps), env, params)

    def one(state, _):
        return run.step(state, hyper)[0], (state.stack, state.env.obs, state.env.episode_length)

    def whole(key):
        return jax.lax.scan(one, run.init(key, hyper), length=steps)

    state, (stack, obs, length) = jax.jit(whole)(jax.random.key(0))
    done = np.append(np.asarray(length)[1:] == 0, False)
    return np.asarray(stack.nodes), np.asarray(obs), done, jax.tree.map(np.asarray, state.tables)


def outcome(process, state, action):
    reached = int(np.argmax(process.transitions[state, action]))
    return reached, float(process.rewards[state, action, reached]), bool(process.terminal[reached])


@pytest.mark.slow
def test_without_a_hierarchy_it_is_q_learning():
    rows = ("#######", "#S.+..#", "#..#.G#", "#######")
    process = mazes.maze(rows)
    hyper = maxq.Hyper(gamma=0.9, learning_rate=0.3, epsilon_start=1.0, epsilon_end=1.0)
    with jax.enable_x64(True):
        tasks = flat_tasks(28, 4)
        nodes, states, done, tables = recorded(process, tasks, 2000, hyper)
    q, finds = np.zeros((28, 4)), 0
    for path, state in zip(nodes, states, strict=True):
        reached, reward, terminated = outcome(process, state, path[1] - 1)
        target = reward + 0.9 * (0 if terminated else q[reached].max())
        q[state, path[1] - 1] += 0.3 * (target - q[state, path[1] - 1])
        finds += terminated
    assert finds > 10
    assert done.sum() > finds  # some were cut, and bootstrapped
    found = tables.rewards.T + tables.completions[0, :, 1:]
    np.testing.assert_allclose(found, q, rtol=0, atol=1e-12)


class Recursion:
    """MAXQ-Q as the paper has it: values by recursion, frames on a list."""

    def __init__(self, tasks, process, rate, gamma):
        self.tasks, self.process, self.rate, self.gamma = tasks, process, rate, gamma
        self.count, nodes = tasks.children.shape
        states = tasks.abstractions.shape[1]
        self.rewards = np.zeros((nodes - self.count, states))
        self.plain, self.inner = np.zeros((2, self.count, states, nodes))
        self.frames = []

    def callable(self, task, state):
        for child in np.flatnonzero(self.tasks.children[task]):
            if child >= self.count or not self.tasks.terminations[child, state]:
                yield child

    def value(self, node, state):
        place = self.tasks.abstractions[node, state]
        if node >= self.count:
            return self.rewards[node - self.count, place]
        if self.tasks.terminations[node, state]:
            return 0.0
        best = self.best(node, state)
        return self.value(best, state) + self.plain[node, place, best]

    def best(self, task, state):
        place = self.tasks.abstractions[task, state]
        return max(
            self.callable(task, state),
            key=lambda child: self.value(child, state) + self.inner[task, place, child],
        )

    def step(self, path, state, done):
        for node, frame in zip(path, self.frames, strict=False):
            assert node == frame[0]
        for level in range(len(self.frames), len(path)):
            assert level == 0 or path[level] in self.callable(path[level - 1], state)
            self.frames.append([path[level], state, 0])
        action = path[-1] - self.count
        reached, reward, terminated = outcome(self.process, state, action)
        changes = [(self.rewards, (action, self.tasks.abstractions[path[-1], state]), reward)]
        over = [terminated or node >= self.count or self.tasks.terminations[node, reached] for node in path]
        first = over.index(True)
        for (task, _, _), (child, begun, steps) in zip(self.frames[:-1], self.frames[1:], strict=True):
            if path.index(child) < first:
                continue
            stops = terminated or self.tasks.terminations[task, reached]
            plain = 0.0 if stops else self.value(task, reached)
            bonus = self.tasks.pseudo_rewards[task, reached] * self.tasks.terminations[task, reached]
            inner = bonus
            if not stops:
                best = self.best(task, reached)
                inner += self.value(best, reached)
                inner += self.inner[task, self.tasks.abstractions[task, reached], best]
            place = (task, self.tasks.abstractions[task, begun], child)
            discount = self.gamma ** (steps + 1)
            changes += [(self.plain, place, discount * plain), (self.inner, place, discount * inner)]
        for table, place, target in changes:
            table[place] += self.rate * (target - table[place])
        self.frames = [] if done else self.frames[:first]
        for frame in self.frames:
            frame[2] += 1
        return terminated


def test_the_update_against_a_recursion():
    tasks, rng = taxi_tasks(), np.random.default_rng(0)
    tasks = dataclasses.replace(tasks, pseudo_rewards=rng.normal(size=tasks.terminations.shape))
    near = (np.arange(501) // 20 < 2) & np.isin(np.arange(501) % 20, [0, 1])  # at R, to R or G
    close = TAXI.start * near
    process = dataclasses.replace(TAXI, start=close / close.sum())
    hyper = maxq.Hyper(gamma=0.9, learning_rate=0.5, epsilon_start=0.5, epsilon_end=0.5)
    nodes, states, done, tables = recorded(process, tasks, 600, hyper, max_steps=40)
    twin, deliveries = Recursion(tasks, process, 0.5, 0.9), 0
    for path, state, end in zip(nodes, states, done, strict=True):
        deliveries += twin.step([int(node) for node in path if node >= 0], int(state), end)
    assert deliveries > 1
    np.testing.assert_allclose(tables.rewards, twin.rewards, atol=1e-4)
    np.testing.assert_allclose(tables.completions, twin.plain, atol=1e-4)
    np.testing.assert_allclose(tables.inner_completions, twin.inner, atol=1e-4)


def test_a_task_that_calls_itself_and_unnumbered_states_are_refused():
    circle = flat_tasks(3, 2)
    children = np.array([[False, True, True, True], [True, False, True, True]])
    with pytest.raises(UserError, match="task 0 calls itself"):
        TaskGraph(children, circle.terminations, circle.pseudo_rewards, circle.abstractions).depth  # noqa: B018
    with pytest.raises(UserError, match="numbered states and actions, which CartPole-v1 has not"):
        maxq.make_run(maxq.Config(), *environments.make("CartPole-v1"))


@pytest.mark.slow
def test_taxi_is_solved():
    """From every start the return of value iteration: what is best for each task is best for Taxi."""
    env, params = processes.make("Taxi")
    run = maxq.make_run(maxq.Config(), env, params)
    keys, options = jax.random.split(jax.random.key(0), 4), compiler_options()
    train = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=options)
    states, _ = train(keys, maxq.Hyper())
    starts = jnp.asarray(STARTS, jnp.int32)

    def returns(state):
        def step(carry, key):
            envs, stack, total, alive = carry
            first = envs.episode_length == 0
            action, stack = run.act(state, envs.obs, first, stack, key, deterministic=True)
            envs, seen = jax.vmap(env.auto_reset_step, (0, 0, 0, None, 0))(
                jax.random.split(key, 400), envs, action, params, envs
            )
            return (envs, stack, total + alive * seen.reward, alive & ~seen.done), None

        begin = jax.vmap(first_state)(ProcessState(starts, jnp.zeros_like(starts)), starts)
        carry = (begin, run.initial_carry(400), jnp.zeros(400), jnp.ones(400, bool))
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), 40))[0][2]

    found = jax.jit(jax.vmap(returns), compiler_options=options)(states)
    best = value_iteration(TAXI, gamma=1.0)[0][starts]
    np.testing.assert_allclose(found, jnp.broadcast_to(best, found.shape), atol=1e-3)
