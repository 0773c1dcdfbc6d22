"""Hindsight: goals of the same episode's future, rewards that they bring, and what they are worth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import her
from rlhf_jax.rl.envs import environments, goals
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Replay, gather
from rlhf_jax.rl.loops.runs import make_train_fn

ENV, PARAMS = goals.make("BitFlipping-4")


def bits_of(number):
    return (number >> np.arange(4)) & 1


def replay_of(rows=10, position=4):
    """Two environments whose bits count upwards, each state one of a kind; ends after rows 1 and 6.

    Row 4 is the oldest: the record goes on from 9 to 0 and ends with row 3.
    """
    number = np.arange(rows)[:, None] + np.array([0, 3])
    bits, after = (np.stack([[bits_of(n % 16) for n in row] for row in x]) for x in (number, number + 1))
    goal = np.broadcast_to(bits_of(15), bits.shape)
    done = np.broadcast_to(np.isin(np.arange(rows), (1, 6))[:, None], (rows, 2))
    terminated = done & (np.arange(rows) == 1)[:, None]
    data = Transition(
        obs=jnp.asarray(np.concatenate([bits, goal], axis=-1), jnp.float32),
        action=jnp.zeros((rows, 2), jnp.int32),
        reward=jnp.where(terminated, 0.0, -1.0),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(done & ~terminated),
        next_obs=jnp.asarray(np.concatenate([after, goal], axis=-1), jnp.float32),
    )
    return Replay(data, jnp.int32(position), jnp.int32(rows))


FUTURE = {4: [4, 5, 6], 5: [5, 6], 6: [6], 7: [7, 8, 9, 0], 9: [9, 0, 1], 1: [1], 2: [2, 3], 3: [3]}
"""By row: rows of the same episode from it on, as far as they are on record and no longer than an episode."""


def relabelled(replay, indices, rate, seed=0):
    options = {"gamma": 0.9, "relabel_rate": rate, "horizon": 4}
    relabel = jax.jit(lambda r, i, k: her.relabel(ENV.raw, r, i, k, **options))
    return relabel(replay, jnp.asarray(indices), jax.random.key(seed))


def test_new_goals_are_what_the_episode_reached_later_each_alike():
    replay, count = replay_of(), 400
    rows = np.repeat(list(FUTURE), count)
    batch = relabelled(replay, rows * 2 + 1, 1.0)
    achieved = np.asarray(replay.data.next_obs)[:, 1, :4]
    for i, (row, later) in enumerate(FUTURE.items()):
        part = slice(i * count, (i + 1) * count)
        found = np.asarray(batch.obs)[part, 4:]
        which = [[np.array_equal(goal, achieved[other]) for other in later] for goal in found]
        share = np.mean(which, axis=0)
        np.testing.assert_allclose(share, 1 / len(later), atol=0.12)  # and they sum to 1: no other goal
        np.testing.assert_allclose(share.sum(), 1)
        np.testing.assert_array_equal(batch.next_obs[part, 4:], found)
        reached = np.all(found == achieved[row], axis=1)
        np.testing.assert_allclose(batch.reward[part], np.where(reached, 0, -1))
        np.testing.assert_allclose(batch.discount[part], np.where(reached, 0, 0.9), rtol=1e-6)
        np.testing.assert_array_equal(
            batch.obs[part, :4], np.asarray(replay.data.obs)[row, 1, :4][None].repeat(count, 0)
        )


def test_without_relabelling_it_is_the_replay_s_batch():
    replay, indices = replay_of(), np.arange(20)
    found, expected = relabelled(replay, indices, 0.0), gather(replay, jnp.asarray(indices), gamma=0.9)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_share_of_them_is_relabelled():
    batch = relabelled(replay_of(), np.full(2000, 8), 0.3)
    kept = np.all(np.asarray(batch.obs)[:, 4:] == bits_of(15), axis=1)
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.05)


def test_bits_are_flipped_until_they_are_the_goal_s():
    state = ENV.reset(jax.random.key(0), PARAMS)
    step = jax.jit(ENV.step)
    bits, goal = np.split(np.array(state.obs), 2)
    wrong = np.flatnonzero(bits != goal)
    assert len(wrong)
    for i, place in enumerate(wrong):
        state, seen = step(jax.random.key(i), state, jnp.int32(place), PARAMS)
        bits[place] = goal[place]
        np.testing.assert_array_equal(seen.next_obs, np.concatenate([bits, goal]))
        last = i == len(wrong) - 1
        assert bool(seen.terminated) == last
        assert float(seen.reward) == (0 if last else -1)
    # Each episode has a wrong bit at least; flipping another on and off leads nowhere, until time is up.
    bits, goal = np.split(np.array(state.obs), 2)
    wrong = set(np.flatnonzero(bits != goal).tolist())
    other = next(place for place in range(4) if {place} != wrong)
    for left in (3, 2, 1, 0):
        state, seen = step(jax.random.key(9), state, jnp.int32(other), PARAMS)
        assert not bool(seen.terminated)
        assert bool(seen.truncated) == (left == 0)


def test_users_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="CartPole-v1 has none: use BitFlipping-8"):
        her.make_run(her.Config(), *environments.make("CartPole-v1"))
    with pytest.raises(UserError, match="n_step=3"):
        her.make_run(her.Config(RunConfig(n_step=3)), ENV, PARAMS)
    with pytest.raises(UserError, match="1 to 30 bits"):
        goals.make("BitFlipping-31")


@pytest.mark.slow
def test_twelve_bits_need_hindsight():
    """Chance rarely finds one of 4,096 goals: with hindsight nearly all are reached, without it none."""
    env = goals.make("BitFlipping-12")
    run = her.make_run(
        dataclasses.replace(her.Config(), run=dataclasses.replace(her.Config().run, total_steps=40_000)), *env
    )
    options = compiler_options()

    def success(rate, key):
        state, _ = make_train_fn(run)(key, dataclasses.replace(her.Hyper(), relabel_rate=rate))
        returns, lengths = evaluate(run, state, *env, key, episodes=128, deterministic=True)
        return jnp.mean(returns > -lengths)

    rates = jnp.array([0.0, 0.8])
    without, hindsight = jax.jit(jax.vmap(success, (0, None)), compiler_options=options)(
        rates, jax.random.key(0)
    )
    assert without < 0.1
    assert hindsight > 0.9
