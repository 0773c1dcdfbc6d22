"""SARSA and Q-learning on FrozenLake against exact dynamic programming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.loops import exploration
from rlhf_jax.rl.tabular import control, dynamic_programming

LAKE = dynamic_programming.frozen_lake()
GAMMA = 0.95
# Episodes that start anywhere visit everything often; the optimum is the same.
ANYWHERE = dataclasses.replace(LAKE, start=jnp.where(LAKE.terminal, 0, 1 / 11))
OPTIMUM = dynamic_programming.value_iteration(LAKE, gamma=GAMMA)[0]
HYPER = control.Hyper(gamma=GAMMA)
KEYS = jax.random.split(jax.random.key(0), 8)


def greedy_values(action_values):
    return dynamic_programming.policy_values(
        LAKE, dynamic_programming.greedy_policy(action_values), gamma=GAMMA
    )


def soft_values(hyper, epsilon: float):
    """Exact Q of the best epsilon-greedy policy: value iteration on the process that mixes actions."""
    mixed = epsilon / 4 * jnp.sum(LAKE.transitions, axis=1, keepdims=True)
    process = dataclasses.replace(LAKE, transitions=(1 - epsilon) * LAKE.transitions + mixed)
    values, _ = dynamic_programming.value_iteration(process, gamma=GAMMA)
    return dynamic_programming.action_values(LAKE, values, gamma=GAMMA)


@pytest.mark.slow
@pytest.mark.parametrize("online", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_q_learning_finds_the_optimum(online):
    """Off-policy: exploring at random all the time, it still learns the greedy policy's values."""
    hyper = dataclasses.replace(HYPER, epsilon_end=1.0, learning_rate_power=0.7)
    config = control.Config(steps=50_000, online=online)
    state, _ = jax.jit(jax.vmap(control.make_train(config, ANYWHERE, control.q_learning_target), (0, None)))(
        KEYS, hyper
    )
    exact = dynamic_programming.action_values(LAKE, OPTIMUM, gamma=GAMMA)
    np.testing.assert_allclose(jnp.mean(state.action_values, axis=0), exact, atol=0.03)
    np.testing.assert_allclose(jax.vmap(greedy_values)(state.action_values)[:, 0], OPTIMUM[0], atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("target_fn", [control.sarsa_target, control.expected_sarsa_target])
def test_sarsa_learns_the_values_of_the_policy_it_follows(target_fn):
    hyper = dataclasses.replace(HYPER, epsilon_start=0.5, epsilon_end=0.5, learning_rate_power=0.7)
    config = control.Config(steps=50_000)
    state, _ = jax.jit(jax.vmap(control.make_train(config, ANYWHERE, target_fn), (0, None)))(KEYS, hyper)
    exact = soft_values(hyper, 0.5)
    np.testing.assert_allclose(jnp.mean(state.action_values, axis=0), exact, atol=0.03)


def test_history_counts_what_happened():
    config = control.Config(steps=4000, num_logs=4, max_episode_steps=50)
    state, history = jax.jit(control.make_train(config, LAKE, control.q_learning_target))(KEYS[0], HYPER)
    assert history["episodes"].shape == (4,)
    # Every transition belongs to an ended episode or to the one that runs.
    assert jnp.sum(history["length_sum"]) + state.episode_steps == state.steps == 4000
    assert jnp.sum(state.visits) == 4000
    assert jnp.all(history["return_sum"] <= history["episodes"])


def test_offline_control_waits_for_the_end_of_the_episode():
    config = control.Config(online=False, max_episode_steps=5)
    certain = dynamic_programming.frozen_lake(("SFFFFFFFFG",), slippery=False)
    rewarded = dataclasses.replace(certain, rewards=jnp.ones_like(certain.rewards))
    step = jax.jit(control.make_step(config, rewarded, control.q_learning_target))
    state = control.init(rewarded, KEYS[0], HYPER)
    for _ in range(4):
        state, _ = step(state, HYPER)
        assert not jnp.any(state.action_values)
        assert jnp.any(state.pending)
    state, sums = step(state, HYPER)
    assert sums["episodes"] == 1
    assert jnp.any(state.action_values)
    assert not jnp.any(state.pending)


def test_a_cut_episode_is_bootstrapped():
    """A certain lake with a reward at every step, cut after one: Q rises above the one reward."""
    endless = dynamic_programming.DecisionProcess(
        jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1), jnp.zeros(1, bool)
    )
    config = control.Config(steps=200, num_logs=1, max_episode_steps=1)
    hyper = dataclasses.replace(HYPER, gamma=0.5, learning_rate=0.5, learning_rate_power=0.0)
    state, history = control.make_train(config, endless, control.sarsa_target)(KEYS[0], hyper)
    np.testing.assert_allclose(state.action_values, 2.0, rtol=1e-4)
    assert history["episodes"][0] == 200


def test_resume_is_bit_identical():
    config = control.Config()
    step = control.make_step(config, LAKE, control.sarsa_target)
    run = jax.jit(lambda s, n: jax.lax.fori_loop(0, n, lambda _, s: step(s, HYPER)[0], s))
    first = control.init(LAKE, KEYS[1], HYPER)
    straight, resumed = run(first, 300), run(run(first, 120), 180)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        same = jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        other = jax.random.key_data(b) if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key) else b
        np.testing.assert_array_equal(same, other)


@pytest.mark.slow
def test_vmap_over_every_hyper_equals_single_runs():
    hypers = jax.tree.map(
        lambda x: jnp.asarray(x) * jnp.array([1.0, 0.7]), dataclasses.replace(HYPER, epsilon_steps=300.0)
    )
    train = jax.jit(
        control.make_train(control.Config(steps=500, num_logs=1), LAKE, control.expected_sarsa_target)
    )
    together, _ = jax.vmap(train)(KEYS[:2], hypers)
    for i in range(2):
        alone, _ = train(KEYS[i], jax.tree.map(lambda x, i=i: x[i], hypers))
        np.testing.assert_allclose(together.action_values[i], alone.action_values, atol=1e-6)


def test_epsilon_greedy_and_its_decay():
    values = jnp.array([0.0, 1.0, 1.0, 0.0])
    draw = jax.vmap(lambda key: exploration.epsilon_greedy(values, key, epsilon=0.4))
    counts = jnp.bincount(draw(jax.random.split(jax.random.key(2), 4000)), length=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.4, 0.1], atol=0.03)
    decay = [float(exploration.linear_decay(s, start=1.0, end=0.2, steps=10)) for s in (0, 5, 10, 99)]
    np.testing.assert_allclose(decay, [1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def test_log_learning_is_value_iteration_on_the_empirical_process():
    rng = np.random.default_rng(0)
    states, actions = rng.integers(16, size=3000), rng.integers(4, size=3000)
    next_states = np.array(
        [rng.choice(16, p=np.asarray(LAKE.transitions[s, a])) for s, a in zip(states, actions, strict=True)]
    )
    rewards = np.asarray(LAKE.rewards[states, actions, next_states])
    counts = np.zeros((16, 4, 16))
    np.add.at(counts, (states, actions, next_states), 1)
    empirical = dataclasses.replace(
        LAKE, transitions=jnp.asarray(counts / counts.sum(-1, keepdims=True), jnp.float32)
    )
    values, _ = dynamic_programming.value_iteration(empirical, gamma=GAMMA, tolerance=1e-7)
    exact = dynamic_programming.action_values(empirical, values, gamma=GAMMA)
    log = control.Log(
        *(jnp.asarray(x) for x in (states, actions, rewards, next_states, LAKE.terminal[next_states]))
    )
    learned = control.learn_from_log(jnp.zeros((16, 4)), log, gamma=GAMMA, sweeps=400)
    free = ~np.asarray(LAKE.terminal)
    np.testing.assert_allclose(learned[free], exact[free], atol=1e-5)
