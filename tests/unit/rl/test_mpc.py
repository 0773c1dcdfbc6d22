"""Planning with a learned model: the cross-entropy method, the ensemble's loss, and a short run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import make_optimizer
from rlhf_jax.rl.algorithms import mpc
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.continuous import Box
from rlhf_jax.rl.loops.planning import cross_entropy_method
from rlhf_jax.rl.loops.replay import Batch

ENV, PARAMS = environments.make("Pendulum-v1")
RUN = mpc.RunConfig(
    total_steps=60, learning_starts=20, train_every=10, updates=4, batch_size=12, capacity=100, num_logs=2
)
CONFIG = mpc.Config(run=RUN, widths=(8,), ensemble_size=3, horizon=4, population=12, elites=3, iterations=3)
TX = make_optimizer(CONFIG.optimizer)


def agent(member_fn_params, gamma: float = 1.0) -> mpc.State:
    state = mpc.init(
        member_fn_params, TX, jax.random.key(1), mpc.Hyper(gamma=gamma), obs_size=1, action_size=1
    )
    ones = jax.tree.map(jnp.ones_like, (state.inputs, state.outputs))
    zero_mean = [dataclasses.replace(x, mean=jnp.zeros_like(x.mean)) for x in ones]
    return dataclasses.replace(state, inputs=zero_mean[0], outputs=zero_mean[1])


@pytest.mark.parametrize(("peak", "expected"), [(0.4, 0.4), (9.0, 1.0)])
def test_cross_entropy_finds_the_peak_within_its_bounds(peak, expected):
    def score(x):
        worth = -jnp.square(x[:, 0] - peak) - jnp.square(x[:, 1] + 0.2)
        return jnp.where(x[:, 1] > 0.3, jnp.nan, worth)  # what is no number is never the best

    found = cross_entropy_method(
        score,
        jax.random.key(0),
        jnp.zeros(2),
        jnp.ones(2),
        low=jnp.float32(-1),
        high=jnp.float32(1),
        population=200,
        elites=20,
        iterations=10,
    )
    np.testing.assert_allclose(found, [expected, -0.2], atol=0.03)


def test_a_plan_looks_ahead():
    """The first action costs a little and the observation it leads to pays: worth it for all but one step."""

    def member(params, inputs):
        obs, action = inputs[:, :1], inputs[:, 1:]
        return jnp.concatenate([action, params * obs - 0.5 * action], axis=-1)

    state = agent(jnp.asarray([0.5, 1.5]))
    box = Box((-1.0,), (1.0,))
    for horizon, gamma, best in ((1, 1.0, -1.0), (4, 1.0, 1.0), (4, 0.1, -1.0)):
        config = dataclasses.replace(CONFIG, horizon=horizon, population=60, elites=6, iterations=6)
        now = dataclasses.replace(state, gamma=jnp.float32(gamma))
        action = mpc.make_plan(config, member, box)(now, jnp.zeros(1), jax.random.key(2))
        np.testing.assert_allclose(action, [best], atol=0.1)


def test_the_loss_against_numpy():
    rng = np.random.default_rng(0)
    init_ensemble, dynamics_fn = mpc.make_ensemble(CONFIG, ENV)
    sizes = {"obs_size": 3, "action_size": 1}
    state = mpc.init(init_ensemble(jax.random.key(0)), TX, jax.random.key(1), mpc.Hyper(), **sizes)
    obs, action, after = (rng.normal(size=(12, n)).astype(np.float32) for n in (3, 1, 3))
    reward = rng.normal(size=12).astype(np.float32)
    batch = Batch(*map(jnp.asarray, (obs, action, reward)), jnp.ones(12), jnp.asarray(after), jnp.ones(12))
    new, metrics, errors = jax.jit(mpc.make_update(CONFIG, dynamics_fn, TX))(state, mpc.Hyper(), batch)

    def scaled(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-8)

    inputs = scaled(np.concatenate([obs, action], 1))
    targets = scaled(np.concatenate([after - obs, reward[:, None]], 1))
    total = 0.0
    for member in range(3):
        part = slice(4 * member, 4 * member + 4)
        params = jax.tree.map(lambda x, member=member: x[member], state.ensemble.params)
        total += np.mean((np.asarray(dynamics_fn(params, jnp.asarray(inputs[part]))) - targets[part]) ** 2)
    np.testing.assert_allclose(metrics["model_loss"], total / 6, rtol=1e-4)
    assert errors.shape == (12,)
    np.testing.assert_allclose(new.outputs.mean[:3], (after - obs).mean(0), rtol=1e-4, atol=1e-6)
    spread = np.std(np.asarray(state.ensemble.params["Dense_0"]["kernel"]), axis=0)
    assert np.all(spread > 0)  # members begin apart


@pytest.mark.slow
def test_a_short_run_and_what_it_refuses():
    run = mpc.make_run(CONFIG, ENV, PARAMS)
    state, history = jax.jit(mpc.make_train(CONFIG, ENV, PARAMS))(jax.random.key(0), mpc.Hyper())
    assert history["steps"].tolist() == [40, 60]
    assert jnp.all(jnp.isfinite(history["model_loss"]))
    assert int(state.agent.ensemble.steps) == 16
    obs = jnp.ones((2, 3))
    action, _ = run.act(state, obs, jnp.ones(2, bool), (), jax.random.key(3), deterministic=True)
    assert action.shape == (2, 1)
    assert jnp.all(jnp.abs(action) <= 2)
    with pytest.raises(UserError, match="ensemble_size=3 does not divide"):
        mpc.make_run(dataclasses.replace(CONFIG, run=dataclasses.replace(RUN, batch_size=10)), ENV, PARAMS)
    with pytest.raises(UserError, match="needs a vector of continuous actions"):
        mpc.make_run(CONFIG, *environments.make("CartPole-v1"))


@pytest.mark.slow
def test_pendulum_in_a_thousand_steps():
    run = dataclasses.replace(mpc.Config().run, total_steps=1200, num_logs=5)
    config = mpc.Config(run=run)
    _, history = jax.jit(mpc.make_train(config, ENV, PARAMS))(jax.random.key(0), mpc.Hyper())
    returns = history["episode_return_sum"] / jnp.maximum(history["episodes"], 1)
    assert jnp.mean(returns[-2:]) > -400  # at random it is about -1200
