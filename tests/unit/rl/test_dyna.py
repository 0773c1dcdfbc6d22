"""Mazes and Dyna: models against counts, planning against dynamic programming, and what planning saves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rl.algorithms import dyna
from rlhf_jax.rl.envs import mazes
from rlhf_jax.rl.tabular import dynamic_programming
from rlhf_jax.rl.tabular.steps import Step
from rlhf_jax.sweep import product

CORRIDOR = mazes.maze(("S...G",))
GAMMA = 0.9
HYPER = dyna.Hyper(gamma=GAMMA, learning_rate=1.0)
RIGHT = 2
PLANNERS = {"uniform": dyna.uniform_planning, "sweeping": dyna.prioritized_sweeping}


def seen(process: dynamic_programming.DecisionProcess, visits: np.ndarray) -> dyna.TabularModel:
    """The model after `visits` [N, 3] of state, action and next state."""

    def one(model: dyna.TabularModel, visit: jax.Array) -> tuple[dyna.TabularModel, None]:
        reward = process.rewards[visit[0], visit[1], visit[2]]
        no = jnp.bool_(False)
        return dyna.observe(model, Step(visit[0], visit[1], reward, visit[2], no, no, visit[2])), None

    model = dyna.init_model(*process.rewards.shape[:2])
    return jax.jit(lambda model, visits: jax.lax.scan(one, model, visits)[0])(model, jnp.asarray(visits))


def everywhere(process: dynamic_programming.DecisionProcess) -> np.ndarray:
    """Each possible transition from where an episode goes on, once."""
    possible = (np.asarray(process.transitions) > 0) & ~np.asarray(process.terminal)[:, None, None]
    return np.argwhere(possible).astype(np.int32)


def plan(plan_fn, model: dyna.TabularModel, q, priorities, hyper: dyna.Hyper, steps: int):
    def step(number, carry):
        return plan_fn(*carry, model, jax.random.fold_in(jax.random.key(1), number), hyper)

    return jax.jit(lambda *carry: jax.lax.fori_loop(0, steps, step, carry))(q, priorities)


def test_the_maze_is_the_textbooks():
    maze = mazes.maze(mazes.DYNA_MAZE)
    values, _ = dynamic_programming.value_iteration(maze, gamma=0.95)
    np.testing.assert_allclose(jnp.sum(maze.start * values), 0.95**13, rtol=1e-5)
    slippery = mazes.maze(("S#G", "..."), slip=0.3)
    np.testing.assert_allclose(jnp.sum(slippery.transitions, axis=-1), 1, atol=1e-6)
    # From S: left and up end at the edge, right at the wall; only down moves.
    np.testing.assert_allclose(slippery.transitions[0, 1, [0, 3]], [0.3, 0.7], atol=1e-6)
    with pytest.raises(UserError, match="one length"):
        mazes.maze(("S.", "G"))


def test_rooms_and_hallways():
    numbers, beside = mazes.rooms(mazes.FOUR_ROOMS), mazes.hallways(mazes.FOUR_ROOMS)
    assert set(numbers) == {-1, 0, 1, 2, 3}
    assert sorted(beside.values()) == [[0, 1], [0, 2], [1, 3], [2, 3]]
    regions = mazes.regions(mazes.FOUR_ROOMS)
    assert all(regions[cell] == min(near) for cell, near in beside.items())
    moved = mazes.with_goal(mazes.maze(mazes.FOUR_ROOMS), 14)
    assert jnp.flatnonzero(moved.terminal).tolist() == [14]
    assert jnp.all(moved.rewards[:, :, 14] == 1)
    assert jnp.sum(moved.rewards) == moved.rewards[:, :, 14].size


def test_the_model_is_what_was_counted():
    rng = np.random.default_rng(0)
    process = mazes.maze(("S..", "#.G"), slip=0.4)
    visits = everywhere(process)[rng.integers(0, len(everywhere(process)), 60)]
    model, q = seen(process, visits), jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    pairs = list(dict.fromkeys((state, action) for state, action, _ in visits.tolist()))
    assert model.pairs == len(pairs)
    assert model.seen[: len(pairs)].tolist() == [state * 4 + action for state, action in pairs]
    for state, action in pairs[:5]:
        after = [int(t) for s, a, t in visits.tolist() if (s, a) == (state, action)]
        paid = [float(process.rewards[state, action, t]) + GAMMA * float(jnp.max(q[t])) for t in after]
        found = dyna.expected_target(model, q, (jnp.int32(state), jnp.int32(action)), gamma=GAMMA)
        np.testing.assert_allclose(found, np.mean(paid), rtol=1e-5)


@pytest.mark.parametrize("name", PLANNERS)
def test_planning_long_enough_is_value_iteration_on_the_model(name):
    model = seen(CORRIDOR, everywhere(CORRIDOR))
    values, _ = dynamic_programming.value_iteration(CORRIDOR, gamma=GAMMA)
    exact = dynamic_programming.action_values(CORRIDOR, values, gamma=GAMMA)
    q = jnp.zeros_like(exact)
    # What was never computed may be anything: all pairs are due.
    q, priorities = plan(PLANNERS[name], model, q, jnp.ones_like(q), HYPER, 400)
    np.testing.assert_allclose(q, exact, atol=1e-5)
    if name == "sweeping":
        assert not jnp.any(priorities > 1e-5)
        again, _ = plan(PLANNERS[name], model, q, priorities, HYPER, 3)
        np.testing.assert_allclose(again, q, atol=1e-6)


def test_sweeping_goes_backwards_from_what_changed():
    """After the goal is found, four planning steps bring its value to the start."""
    model = seen(CORRIDOR, everywhere(CORRIDOR))
    q = jnp.zeros((5, 4))
    due = jnp.zeros_like(q).at[3, RIGHT].set(1.0)
    swept, left = plan(dyna.prioritized_sweeping, model, q, due, HYPER, 1)
    assert float(swept[3, RIGHT]) == 1.0
    assert set(np.argwhere(np.asarray(left) > 0)[:, 0]) == {2, 3}  # 3: moves that stay in place
    half = dataclasses.replace(HYPER, learning_rate=0.5)
    swept, left = plan(dyna.prioritized_sweeping, model, q, due, half, 1)
    np.testing.assert_allclose([swept[3, RIGHT], left[3, RIGHT]], [0.5, 0.5])


def test_nothing_due_changes_nothing():
    model, q = dyna.init_model(5, 4), jnp.ones((5, 4))
    same, _ = plan(dyna.prioritized_sweeping, model, q, jnp.zeros_like(q), HYPER, 2)
    np.testing.assert_array_equal(same, q)


@pytest.mark.slow
def test_runs_under_vmap_equal_single_runs_and_end_at_the_optimum():
    config = dyna.Config(episodes=12, max_episode_steps=300)
    train = dyna.make_train(config, CORRIDOR)
    hypers, keys = product(HYPER, planning_steps=[0, 8]), jax.random.split(jax.random.key(0), 2)
    several = jax.jit(jax.vmap(jax.vmap(train, (0, None)), (None, 0)))
    state, history = several(keys, hypers)
    assert history["length"].shape == (2, 2, 12)
    assert jnp.all(history["return"] == 1)
    np.testing.assert_allclose(history["greedy_value"][1, :, -1], GAMMA**3, rtol=1e-5)
    np.testing.assert_array_equal(state.model.counts.sum((-1, -2, -3)), history["length"].sum(-1))
    alone, _ = jax.jit(train)(keys[1], dataclasses.replace(HYPER, planning_steps=8.0))
    np.testing.assert_allclose(alone.action_values, state.action_values[1, 1], atol=1e-6)


@pytest.mark.slow
def test_planning_saves_steps():
    """But none in the first episode, before which nothing is known (figure 8.2 leaves it out)."""
    train = dyna.make_train(dyna.Config(episodes=30), mazes.maze(mazes.DYNA_MAZE))
    keys = jax.random.split(jax.random.key(0), 8)
    several = jax.jit(jax.vmap(jax.vmap(train, (0, None)), (None, 0)))
    _, history = several(keys, product(dyna.Hyper(), planning_steps=[0, 5, 50]))
    first, total = history["length"][..., 0], history["length"][..., 1:].sum(-1).mean(-1)
    assert jnp.all(first == first[0])
    assert total[0] > 2 * total[1] > 2.4 * total[2]
    # Not every seed has found the shortest path, of 14 steps: a loop in NumPy ends on it in 37 of 60 seeds,
    # on paths of 16 steps in 20, of 18 and 20 in three.
    value = history["greedy_value"][2, :, -1]
    assert jnp.all(value > 0.99 * 0.95**19)
    assert jnp.mean(value > 0.99 * 0.95**13) >= 0.5
