"""Replay: against Python lists, in place, under vmap; priorities against exact probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.loops import replay as replays

WEIGHTS = st.floats(0, 1e3, width=32, allow_subnormal=False)  # XLA's sums take subnormal numbers for 0

EXAMPLE = Transition(
    obs=jnp.zeros(2, jnp.uint8),
    action=jnp.int32(0),
    reward=jnp.float32(0),
    terminated=jnp.bool_(False),
    truncated=jnp.bool_(False),
    next_obs=jnp.zeros(2, jnp.uint8),
)


def chunk_of(start: int, count: int, num_envs: int, rng: np.random.Generator) -> Transition:
    """Rows that know their own number: obs = (row, environment), next_obs = (row + 1, environment)."""
    row, env = np.meshgrid(np.arange(start, start + count), np.arange(num_envs), indexing="ij")
    terminated = rng.random(row.shape) < 0.2
    return Transition(
        obs=jnp.asarray(np.stack([row, env], -1), jnp.uint8),
        action=jnp.asarray(row, jnp.int32),
        reward=jnp.asarray(rng.normal(size=row.shape), jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(~terminated & (rng.random(row.shape) < 0.2)),
        next_obs=jnp.asarray(np.stack([row + 1, env], -1), jnp.uint8),
    )


def filled(chunks: int, *, rows: int = 6, count: int = 2, num_envs: int = 2, seed: int = 0):
    rng = np.random.default_rng(seed)
    replay = replays.init_replay(EXAMPLE, rows=rows, num_envs=num_envs)
    history = [chunk_of(count * i, count, num_envs, rng) for i in range(chunks)]
    for chunk in history:
        replay = replays.insert(replay, chunk)
    return replay, jax.tree.map(lambda *x: np.concatenate(x), *history)


insert = jax.jit(replays.insert)
sample = jax.jit(replays.sample_uniform, static_argnames=("batch_size", "n_step"))
gather = jax.jit(replays.gather, static_argnames="n_step")


@settings(max_examples=15, deadline=None)
@given(chunks=st.integers(2, 9), n_step=st.integers(1, 3), seed=st.integers(0, 99))
def test_samples_are_the_last_rows_and_n_step_returns_a_loops(chunks, n_step, seed):
    replay, history = filled(chunks, seed=seed)
    indices = sample(replay, jax.random.key(seed), batch_size=32, n_step=n_step)
    batch = gather(replay, indices, gamma=0.9, n_step=n_step)
    written = 2 * chunks
    for i in range(32):
        row, env = np.asarray(batch.obs[i])
        assert max(0, written - 6) <= row <= written - n_step
        assert batch.action[i] == row
        reward, discount, step = 0.0, 1.0, int(row)
        for _ in range(n_step):
            reward += discount * history.reward[step, env]
            discount = 0.0 if history.terminated[step, env] else 0.9 * discount
            step += 1
            if history.terminated[step - 1, env] or history.truncated[step - 1, env]:
                break
        np.testing.assert_allclose([batch.reward[i], batch.discount[i]], [reward, discount], atol=1e-6)
        assert tuple(np.asarray(batch.next_obs[i])) == (step, env)


def test_sampling_is_uniform_over_what_there_is():
    replay, _ = filled(2)
    counts = np.bincount(np.asarray(sample(replay, jax.random.key(0), batch_size=8000)), minlength=12)
    np.testing.assert_allclose(counts[:8] / 8000, 1 / 8, atol=0.015)
    assert not counts[8:].any()


def test_storage_keeps_dtypes_and_rows_must_divide():
    replay = replays.init_replay(EXAMPLE, rows=4, num_envs=3)
    assert replay.data.obs.dtype == jnp.uint8
    assert replay.data.terminated.dtype == bool
    with pytest.raises(UserError, match="do not divide"):
        replays.insert(replay, chunk_of(0, 3, 3, np.random.default_rng(0)))


@pytest.mark.parametrize("agents", [None, 5])
def test_a_step_updates_the_buffer_in_place(agents):
    """Insert and sample in a loop, under vmap too: no second copy of the data."""
    rows, num_envs = 4096, 2
    chunk = jax.tree.map(lambda x: jnp.zeros((4, num_envs, *x.shape), x.dtype), EXAMPLE)

    def run(key):
        def step(carry, _):
            replay, key = carry
            key, sample_key = jax.random.split(key)
            replay = replays.insert(replay, chunk)
            indices = replays.sample_uniform(replay, sample_key, batch_size=8)
            return (replay, key), replays.gather(replay, indices, gamma=0.9).reward

        start = (replays.init_replay(EXAMPLE, rows=rows, num_envs=num_envs), key)
        (replay, _), rewards = jax.lax.scan(step, start, length=50)
        return replay, rewards

    keys = jax.random.key(0) if agents is None else jax.random.split(jax.random.key(0), agents)
    compiled = jax.jit(run if agents is None else jax.vmap(run)).lower(keys).compile()
    memory = compiled.memory_analysis()
    size = (agents or 1) * rows * num_envs * (2 + 2 + 4 + 4 + 1 + 1)
    assert memory is not None
    assert memory.output_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.2 * size


def test_a_donated_step_aliases_its_state():
    replay = replays.init_replay(EXAMPLE, rows=4096, num_envs=1)
    chunk = jax.tree.map(lambda x: jnp.zeros((4, 1, *x.shape), x.dtype), EXAMPLE)
    compiled = jax.jit(replays.insert, donate_argnums=0).lower(replay, chunk).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 4096 * 14
    assert memory.temp_size_in_bytes < 4096


def test_priorities_follow_their_weights():
    weights = np.arange(10.0)
    priorities = replays.set_weights(
        replays.init_priorities(10), jnp.arange(10), jnp.asarray(weights, jnp.float32)
    )
    draw = functools.partial(replays.sample_prioritized, batch_size=9000, beta=1.0)
    indices, importance = jax.jit(draw)(priorities, jax.random.key(0))
    frequency = np.bincount(np.asarray(indices), minlength=10) / 9000
    # Stratified draws are within a draw or two of their share.
    np.testing.assert_allclose(frequency, weights / weights.sum(), atol=5e-4)
    np.testing.assert_allclose(importance, 1 / weights[np.asarray(indices)], rtol=1e-5)
    # Importance weights undo the priorities: a weighted mean over draws is the plain mean.
    np.testing.assert_allclose(
        np.sum(importance * np.asarray(indices)) / np.sum(importance), np.mean(np.arange(1, 10)), atol=0.02
    )


@settings(max_examples=15, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 16), WEIGHTS), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
def test_sums_are_exact_and_empty_entries_are_never_drawn(changes, seed):
    priorities, expected = replays.init_priorities(17), np.zeros(17, np.float32)
    set_one = jax.jit(replays.set_weights)
    for index, weight in changes:
        priorities = set_one(priorities, jnp.array([index]), jnp.array([weight], jnp.float32))
        expected[index] = weight
    flat = np.asarray(priorities.weights).reshape(-1)
    np.testing.assert_array_equal(flat[:17], expected)
    np.testing.assert_allclose(priorities.sums, np.asarray(priorities.weights).sum(1), rtol=1e-6)
    if expected.sum() > 1e-30:
        indices, importance = replays.sample_prioritized(
            priorities, jax.random.key(seed), batch_size=16, beta=0.5
        )
        assert np.all(flat[np.asarray(indices)] > 0)
        assert np.all(np.isfinite(importance))


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_only_complete_windows_are_admitted(n_step, chunks):
    rows, count, num_envs = 6, 2, 2
    replay = replays.init_replay(EXAMPLE, rows=rows, num_envs=num_envs)
    priorities = replays.init_priorities(rows * num_envs)
    for i in range(chunks):
        replay = replays.insert(replay, chunk_of(2 * i, count, num_envs, np.random.default_rng(0)))
        priorities = replays.admit(priorities, replay, count=count, n_step=n_step)
    weights = np.asarray(priorities.weights).reshape(-1)[: rows * num_envs].reshape(rows, num_envs)
    written = count * chunks
    for row in range(rows):
        newest = max((w for w in range(written) if w % rows == row), default=None)
        expected = newest is not None and newest + n_step <= written
        assert np.all((weights[row] > 0) == expected)


def test_new_transitions_get_the_largest_priority_so_far():
    replay, _ = filled(3)
    priorities = replays.admit(replays.init_priorities(12), replay, count=2)
    priorities = replays.update_priorities(
        priorities, jnp.array([0, 1]), jnp.array([-4.0, 0.25]), alpha=0.5, epsilon=0.0
    )
    np.testing.assert_allclose(np.asarray(priorities.weights).reshape(-1)[:2], [2.0, 0.5])
    assert priorities.largest == 2.0


@pytest.mark.slow
def test_vmapped_replays_equal_single_ones():
    replay, _ = filled(4)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), replay)
    keys = jax.random.split(jax.random.key(1), 2)
    together = jax.vmap(functools.partial(replays.sample_uniform, batch_size=5, n_step=2))(two, keys)
    for i in range(2):
        np.testing.assert_array_equal(together[i], sample(replay, keys[i], batch_size=5, n_step=2))
