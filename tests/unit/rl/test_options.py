"""Options and the feudal hierarchy in two rooms: exact models, what rules teach, what is learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.algorithms import feudal, options
from rlhf_jax.rl.envs import mazes
from rlhf_jax.rl.loops.exploration import epsilon_greedy
from rlhf_jax.rl.tabular import dynamic_programming
from rlhf_jax.rl.tabular.steps import Step

ROWS = ("#######", "#S.+..#", "#..#.G#", "#######")
SLIP, GAMMA = 0.2, 0.9
PROCESS = mazes.maze(ROWS, slip=SLIP)
FREE = mazes.free_cells(ROWS)
HALLWAYS = options.hallway_options(ROWS, slip=SLIP, gamma=GAMMA)
ACTIONS = options.primitive_options(PROCESS)
BOTH = options.joined(HALLWAYS, ACTIONS)
OPTIMUM = dynamic_programming.value_iteration(PROCESS, gamma=GAMMA)[0]
HYPER = options.Hyper(gamma=GAMMA, learning_rate=0.5)
REGIONS = mazes.regions(ROWS)
START, HALLWAY, GOAL = 8, 10, 19


def step_of(state: int, action: int, reward: float, next_state: int, terminated: bool = False) -> Step:
    places = (jnp.int32(state), jnp.int32(action), jnp.float32(reward), jnp.int32(next_state))
    return Step(*places, jnp.bool_(terminated), jnp.bool_(terminated), jnp.int32(next_state))


def test_hallway_options_stay_inside_and_reach_the_hallway():
    assert HALLWAYS.initiations.shape[0] == 2
    rooms = mazes.rooms(ROWS)
    for room in range(2):
        np.testing.assert_array_equal(HALLWAYS.initiations[room], rooms == room)
        np.testing.assert_array_equal(HALLWAYS.terminations[room], rooms != room)
    models = options.option_models(
        dataclasses.replace(PROCESS, terminal=jnp.zeros_like(PROCESS.terminal)), HALLWAYS, gamma=1.0
    )
    inside = jnp.asarray(rooms == 0)
    np.testing.assert_allclose(models.reached[0][inside][:, HALLWAY], 1, atol=1e-4)


def test_models_against_steps_one_at_a_time():
    models = options.option_models(PROCESS, BOTH, gamma=GAMMA)
    p, r, terminal = (np.asarray(x) for x in (PROCESS.transitions, PROCESS.rewards, PROCESS.terminal))
    for option in (0, 3):
        policy, ends = np.asarray(BOTH.policies[option]), np.asarray(BOTH.terminations[option])
        at = np.zeros(len(terminal))
        at[START] = 1
        reward, reached = 0.0, np.zeros(len(terminal))
        for k in range(200):
            moves = at[:, None, None] * policy[:, :, None] * p
            reward += GAMMA**k * np.sum(moves * r)
            at = moves.sum((0, 1))
            stops = np.where(terminal, 1, ends)
            reached += GAMMA ** (k + 1) * at * stops
            at = at * (1 - stops)
        np.testing.assert_allclose(models.rewards[option, START], reward, atol=1e-5)
        np.testing.assert_allclose(models.reached[option, START], reached, atol=1e-5)


def test_value_iteration_over_options():
    q, sweeps = options.smdp_value_iteration(PROCESS, BOTH, gamma=GAMMA)
    best = options.best_values(q, BOTH.initiations)
    np.testing.assert_allclose(best[FREE], OPTIMUM[FREE], atol=1e-4)  # actions are among them
    assert jnp.all(jnp.where(BOTH.initiations.T, 0, q) == 0)
    alone, longer = options.smdp_value_iteration(PROCESS, ACTIONS, gamma=GAMMA)
    np.testing.assert_allclose(options.best_values(alone, ACTIONS.initiations), OPTIMUM, atol=1e-5)
    assert sweeps <= longer
    given, _ = options.smdp_value_iteration(PROCESS, HALLWAYS, gamma=GAMMA)
    assert jnp.all(options.best_values(given, HALLWAYS.initiations) <= OPTIMUM + 1e-5)


def test_epsilon_greedy_keeps_to_what_is_available():
    values, available = jnp.array([3.0, 1.0, 2.0, 0.0]), jnp.array([False, True, True, True])
    keys = jax.random.split(jax.random.key(0), 3000)
    draw = jax.vmap(lambda key: epsilon_greedy(values, key, epsilon=0.3, available=available))
    counts = jnp.bincount(draw(keys), length=4) / 3000
    np.testing.assert_allclose(counts, [0, 0.1, 0.8, 0.1], atol=0.03)


def test_rules_against_a_loop():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(28, 6)), jnp.float32)
    step = step_of(9, 2, 0.3, HALLWAY)
    course = options.Course(jnp.int32(0), jnp.int32(START), jnp.float32(0.5), jnp.float32(0.81))
    allowed, values = np.asarray(BOTH.initiations), np.asarray(q)

    def best(state: int) -> float:
        return max(values[state, o] for o in range(6) if allowed[o, state])

    after = options.smdp_learning(q, BOTH, course, step, jnp.bool_(True), HYPER)
    target = 0.5 + 0.81 * best(HALLWAY)
    np.testing.assert_allclose(after[START, 0], (values[START, 0] + target) / 2, rtol=1e-5)
    assert int(jnp.sum(after != q)) == 1
    same = options.smdp_learning(q, BOTH, course, step, jnp.bool_(False), HYPER)
    np.testing.assert_array_equal(same, q)

    after = np.asarray(options.intra_option_learning(q, BOTH, course, step, jnp.bool_(False), HYPER))
    expected = values.copy()
    for option in range(6):
        chance = float(BOTH.policies[option, 9, 2]) * allowed[option, 9]
        ends = float(BOTH.terminations[option, HALLWAY])
        next_values = (1 - ends) * values[HALLWAY, option] + ends * best(HALLWAY)
        expected[9, option] += 0.5 * chance * (0.3 + GAMMA * next_values - values[9, option])
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    assert (after != values).sum() == 2  # the hallway option of the room, and the action itself


@pytest.mark.parametrize("rule", [options.smdp_learning, options.intra_option_learning])
def test_what_ends_the_episode_is_worth_its_reward(rule):
    q = jnp.ones((28, 6))
    step = step_of(18, 2, 1.0, GOAL, terminated=True)
    course = options.Course(jnp.int32(4), jnp.int32(18), jnp.float32(3.0), jnp.float32(0.9))
    after = rule(q, BOTH, course, step, jnp.bool_(True), HYPER)
    paid = 3.0 if rule is options.smdp_learning else 1.0
    np.testing.assert_allclose(after[18, 4], 0.5 + 0.5 * paid)


def test_a_run_of_options():
    """Lengths add up, and an option is left only where it may end."""
    config = options.Config(episodes=4, max_episode_steps=60)
    train = jax.jit(options.make_train(config, PROCESS, BOTH, options.intra_option_learning))
    state, history = train(jax.random.key(0), HYPER)
    assert jnp.all((history["length"] > 0) & (history["length"] <= 60))
    assert jnp.all(history["return"] == (history["length"] < 60))
    assert jnp.all(jnp.where(BOTH.initiations.T, 0, state.option_values) == 0)
    assert BOTH.initiations[state.course.option, state.course.begun]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [options.smdp_learning, options.intra_option_learning])
def test_learned_values_are_the_exact_ones(rule):
    anywhere = dataclasses.replace(PROCESS, start=jnp.where(FREE & ~PROCESS.terminal, 1.0, 0.0))
    anywhere = dataclasses.replace(anywhere, start=anywhere.start / anywhere.start.sum())
    hyper = dataclasses.replace(HYPER, learning_rate=0.02, epsilon=1.0)
    config = options.Config(episodes=6000, max_episode_steps=200)
    train = jax.jit(jax.vmap(options.make_train(config, anywhere, BOTH, rule), (0, None)))
    state, _ = train(jax.random.split(jax.random.key(0), 8), hyper)
    exact, _ = options.smdp_value_iteration(PROCESS, BOTH, gamma=GAMMA)
    live = np.asarray(BOTH.initiations.T & (FREE & ~PROCESS.terminal)[:, None])
    np.testing.assert_allclose(np.mean(state.option_values, axis=0)[live], exact[live], atol=0.03)


# Feudal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "terminated"),
    [
        ((START, 2, 0.0, 9), False),
        ((9, 2, 0.0, HALLWAY), False),
        ((HALLWAY, 2, 0.0, 11), False),
        ((18, 2, 1.0, GOAL), True),
    ],
)
def test_the_worker_is_paid_for_what_it_was_told(step, terminated):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 28, 4)).astype(np.float32)
    hyper = feudal.Hyper(gamma=GAMMA, learning_rate=0.5)
    found = feudal.teach_worker(jnp.asarray(q), jnp.asarray(REGIONS), step_of(*step, terminated), hyper)
    state, action, reward, reached = step
    here, there = REGIONS[state], REGIONS[reached]
    expected = q.copy()
    for told in range(2):
        pay = reward if told == here else float(told == there)
        over = terminated or here != there
        target = pay + (0 if over else GAMMA * q[told, reached].max())
        expected[told, state, action] += 0.5 * (target - q[told, state, action])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_manager_learns_over_the_time_of_its_command():
    q = jnp.asarray([[0.2, 0.4], [0.6, 0.1]])
    hyper = feudal.Hyper(gamma=0.5, manager_learning_rate=0.5)
    order = feudal.Order(jnp.int32(1), jnp.int32(0), jnp.int32(3), jnp.float32(0.25))

    def taught(over: bool, terminated: bool) -> np.ndarray:
        return np.asarray(
            feudal.teach_manager(
                q,
                order,
                jnp.int32(1),
                over=jnp.bool_(over),
                terminated=jnp.bool_(terminated),
                hyper=hyper,
            )
        )

    np.testing.assert_array_equal(taught(False, False), q)
    np.testing.assert_allclose(taught(True, False)[0, 1], 0.2 + 0.5 * (0.25 + 0.5**3 * 0.6))
    np.testing.assert_allclose(taught(True, True)[0, 1], 0.2 + 0.5 * 0.25)


@pytest.mark.slow
def test_a_feudal_run_finds_its_way():
    config = feudal.Config(episodes=40, max_episode_steps=400, patience=20)
    train = jax.jit(jax.vmap(feudal.make_train(config, PROCESS, REGIONS), (0, None)))
    hyper = feudal.Hyper(gamma=GAMMA, epsilon=0.05, manager_epsilon=0.05)
    state, history = train(jax.random.split(jax.random.key(0), 4), hyper)
    assert jnp.mean(history["length"][:, -10:]) < 20 < jnp.mean(history["length"][:, 0])
    # From the first room it sends to the second, and there it says to stay.
    assert jnp.argmax(jnp.mean(state.manager_values, axis=0), axis=-1).tolist() == [1, 1]
