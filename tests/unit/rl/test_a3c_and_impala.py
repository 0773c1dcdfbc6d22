"""A3C and IMPALA: A2C where nothing lags, whose parameters act and learn where something does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.rl.algorithms import a2c, a3c, impala
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import RolloutConfig
from rlhf_jax.rl.networks.networks import MLP

CARTPOLE = environments.make("CartPole-v1")
SAME = {
    "total_steps": 1_000,
    "rollout": RolloutConfig(num_envs=2, num_steps=5),
    "network": NetworkConfig(encoder=MLP((8,))),
    "optimizer": OptimizerConfig(clip_norm=0.5, b2=0.999),
}


def steps_of(run, hyper, count):
    state, states = jax.jit(run.init)(jax.random.key(0), hyper), []
    step = jax.jit(run.step)
    for _ in range(count):
        state, _ = step(state, hyper)
        states.append(state)
    return states


def assert_same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def expected():
    run = a2c.make_run(a2c.Config(**SAME), *CARTPOLE)
    return [state.agent.learner.params for state in steps_of(run, a2c.default_hyper(), 4)]


def test_without_lag_impala_is_a2c(expected):
    run = impala.make_run(impala.Config(max_lag=2, **SAME), *CARTPOLE)
    found = steps_of(run, impala.default_hyper(lag=0), 4)
    assert_same(found[-1].agent.learner.params, expected[-1], rtol=1e-4, atol=1e-6)


def test_actors_have_the_parameters_of_so_many_updates_ago():
    run = impala.make_run(impala.Config(max_lag=3, **SAME), *CARTPOLE)
    states = steps_of(run, impala.default_hyper(lag=2), 4)
    acting = impala.actor_params(states[3].agent)
    assert_same(acting, states[1].agent.learner.params, rtol=0)
    newest = jax.tree.map(lambda x: x[0], states[3].agent.past)
    assert_same(newest, states[3].agent.learner.params, rtol=0)
    bound = jax.jit(run.init)(jax.random.key(0), impala.default_hyper(lag=99)).agent.lag
    assert int(bound) == 3


@pytest.mark.parametrize("lag", few([0, 2], 0))
@pytest.mark.slow
def test_without_a_correction_experience_counts_as_the_policys_own(lag):
    """Without lag nothing changes by that, and with it something does."""
    made = [impala.make_run(impala.Config(max_lag=2, correct=on, **SAME), *CARTPOLE) for on in (True, False)]
    found = [steps_of(run, impala.default_hyper(lag=lag), 4)[-1].agent.learner.params for run in made]
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, found), strict=True))
    assert (apart < 1e-6) == (lag == 0)


@pytest.mark.slow
def test_with_one_worker_a3c_is_a2c():
    config = a3c.Config(num_workers=1, **SAME)
    run, hyper = a3c.make_run(config, *CARTPOLE), a2c.default_hyper()
    start = jax.jit(run.init)(jax.random.key(0), hyper)
    other = a2c.make_run(a2c.Config(**SAME), *CARTPOLE)
    same = jax.jit(other.init)(jax.random.key(0), hyper)
    same = dataclasses.replace(same, envs=jax.tree.map(lambda x: x[0], start.envs))
    found, _ = jax.jit(run.step)(start, hyper)
    wanted, _ = jax.jit(other.step)(same, hyper)
    assert_same(found.agent.learner.params, wanted.agent.learner.params, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_workers_take_turns_each_with_its_copy_and_its_environments():
    run = a3c.make_run(a3c.Config(num_workers=3, **SAME), *CARTPOLE)
    hyper = a2c.default_hyper()
    start = jax.jit(run.init)(jax.random.key(0), hyper)
    states = [start, *steps_of(run, hyper, 4)]
    for turn in range(4):
        before, after = states[turn], states[turn + 1]
        for worker in range(3):
            moved = worker == turn % 3
            same = np.array_equal(before.envs.states.obs[worker], after.envs.states.obs[worker])
            assert same != moved
            copy = jax.tree.map(lambda x, i=worker: x[i], after.agent.copies)
            kept = jax.tree.map(lambda x, i=worker: x[i], before.agent.copies)
            assert_same(copy, after.agent.learner.params if moved else kept, rtol=0)
    # The fourth turn is the first worker's again: its gradient is at what it copied three changes ago.
    assert_same(a3c.own_copy(states[3].agent), states[1].agent.learner.params, rtol=0)


def test_statistics_that_workers_would_not_share_are_refused():
    config = a3c.Config(rollout=RolloutConfig(normalize_obs=True))
    with pytest.raises(UserError, match="leave out normalize_obs"):
        a3c.make_run(config, *CARTPOLE)


@pytest.mark.slow
def test_lag_is_swept_under_one_jit():
    train = impala.make_train(impala.Config(max_lag=4, **{**SAME, "total_steps": 100}), *CARTPOLE)
    hyper = dataclasses.replace(impala.default_hyper(), lag=jnp.array([0.0, 4.0]))
    axes = dataclasses.replace(jax.tree.map(lambda _: None, impala.default_hyper()), lag=0)
    states, history = jax.jit(jax.vmap(train, (None, axes)))(jax.random.key(0), hyper)
    assert states.agent.lag.tolist() == [0, 4]
    ratios = history["clipped_ratio_mean"][:, -1]
    np.testing.assert_allclose(ratios[0], 1.0, atol=1e-5)
    assert ratios[1] < 1 - 1e-5
