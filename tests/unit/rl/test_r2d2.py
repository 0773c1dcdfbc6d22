"""R2D2: DQN without memory, targets and burn-in against a loop, stored states, a task that needs memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.losses.value import rescale_values, unrescale_values
from rlhf_jax.rl.algorithms import dqn, r2d2
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops import replay as replays
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import ActionValues

CARTPOLE = environments.make("CartPole-v1")
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999, epsilon=1e-30))
SMALL = MLP((5,), nn.relu)


def batch_of(length, width, count=3):
    rng = np.random.default_rng(0)
    terminated, truncated = np.zeros((2, count, length), bool)
    if length > 4:
        terminated[0, 3] = truncated[1, 4] = True
    done = terminated | truncated
    obs, next_obs = (jnp.asarray(rng.normal(size=(count, length, 4)), jnp.float32) for _ in range(2))
    next_obs = next_obs.at[:, :-1].set(jnp.where(done[:, :-1, None], next_obs[:, :-1], obs[:, 1:]))
    seen = Transition(
        obs=obs,
        action=jnp.asarray(rng.integers(0, 2, (count, length)), jnp.int32),
        reward=jnp.asarray(rng.normal(size=(count, length)), jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        next_obs=next_obs,
    )
    is_first = jnp.asarray(np.concatenate([np.zeros((count, 1), bool), done[:, :-1]], axis=1))
    carry = jnp.asarray(rng.normal(size=(count, width)), jnp.float32)
    return r2d2.Batch(seen, is_first, carry, jnp.asarray(rng.uniform(0.1, 1, count), jnp.float32))


def agent_of(config):
    network = r2d2.make_network(config, CARTPOLE[0])

    def params_of(seed):
        inputs = (jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), bool), network.initial_carry(1))
        return jax.jit(network.init)(jax.random.key(seed), *inputs)["params"]

    return network, dataclasses.replace(r2d2.init(params_of(0), TX), target_params=params_of(1))


def test_rescaling_and_its_inverse():
    values = np.array([-1e4, -3.0, -1e-4, 0.0, 0.5, 8.0, 1e6])
    rescaled = np.sign(values) * (np.sqrt(np.abs(values) + 1) - 1) + 1e-3 * values
    np.testing.assert_allclose(rescale_values(jnp.asarray(values)), rescaled, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(unrescale_values(jnp.asarray(rescaled)), values, rtol=2e-3, atol=1e-6)


def test_without_memory_burn_in_and_rescaling_a_step_is_that_of_dqn():
    config = r2d2.Config(
        RunConfig(n_step=1), encoder=SMALL, memory_width=0, burn_in=0, length=1, dueling=False, rescale=False
    )
    network, state = agent_of(config)
    batch = batch_of(1, 0, count=8)
    found, metrics, errors = jax.jit(r2d2.make_update(config, network, TX))(state, r2d2.Hyper(), batch)

    def as_dqn(params):
        return {"torso": params["torso"], **params["head"]}

    plain = ActionValues(network.torso, 2)
    seen = jax.tree.map(lambda x: x[:, 0], batch.seen)
    steps = replays.Batch(
        seen.obs, seen.action, seen.reward, seen.discounts(0.99), seen.next_obs, batch.weight
    )
    update = dqn.make_update(dqn.Config(double=True), dqn.network_fns(plain), TX)
    start = dataclasses.replace(
        dqn.init(as_dqn(state.learner.params), TX), target_params=as_dqn(state.target_params)
    )
    expected, same_metrics, same_errors = jax.jit(update)(
        start, dqn.Hyper(learning_rate=5e-4, huber_delta=1e6), steps
    )
    np.testing.assert_allclose(errors, np.abs(same_errors), atol=1e-5)
    np.testing.assert_allclose(metrics["value_loss"], same_metrics["value_loss"], rtol=1e-5)
    pairs = zip(*map(jax.tree.leaves, (as_dqn(found.learner.params), expected.learner.params)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_targets_and_errors_against_a_loop():
    """Burn-in of 2 from a stored state, 3 steps learned, 2 rewards each, an end and a cut among them."""
    config = r2d2.Config(RunConfig(n_step=2), encoder=SMALL, memory_width=3, burn_in=2, length=3)
    (network, state), batch, hyper = agent_of(config), batch_of(6, 3), r2d2.Hyper(gamma=0.9)
    _, metrics, errors = jax.jit(r2d2.make_update(config, network, TX))(state, hyper, batch)

    @jax.jit
    def act(params, obs, is_first, carry):
        return network.apply({"params": params}, obs[None], is_first[None], carry[None], method="act")

    def both(params, row):
        """Values at each step, and of what followed each, one step at a time."""
        carry, values, after = batch.carry[row], [], []
        for t in range(6):
            q, carry = act(params, batch.seen.obs[row, t], batch.is_first[row, t], carry)
            carry = carry[0]
            values.append(np.asarray(q[0]))
            after.append(np.asarray(act(params, batch.seen.next_obs[row, t], jnp.bool_(False), carry)[0][0]))
        return values, after

    losses = []
    for row in range(3):
        online, online_after = both(state.learner.params, row)
        _, target_after = both(state.target_params, row)
        sizes = []
        for t in (2, 3, 4):
            total, factor = 0.0, 1.0
            for k in (t, t + 1):
                total, factor = total + factor * float(batch.seen.reward[row, k]), 0.9 * factor
                if batch.seen.terminated[row, k] or batch.seen.truncated[row, k]:
                    break
            if not batch.seen.terminated[row, k]:
                value = target_after[k][np.argmax(online_after[k])]
                total += factor * float(unrescale_values(jnp.asarray(value)))
            target = float(rescale_values(jnp.asarray(total)))
            sizes.append(abs(online[t][batch.seen.action[row, t]] - target))
        np.testing.assert_allclose(errors[row], 0.9 * max(sizes) + 0.1 * np.mean(sizes), atol=1e-4)
        losses.append(batch.weight[row] * np.mean(np.square(sizes)) / 2)
    np.testing.assert_allclose(metrics["value_loss"], np.mean(losses), rtol=1e-3)


def test_no_gradient_through_the_burn_in():
    config = r2d2.Config(RunConfig(n_step=1), encoder=SMALL, memory_width=3, burn_in=2, length=1)
    (network, state), batch = agent_of(config), batch_of(3, 3)

    def through(carry, config):
        changed = dataclasses.replace(batch, carry=carry)
        return jnp.sum(r2d2.values_of(config, network, state.learner.params, changed)[0])

    slope = jax.jit(jax.grad(through), static_argnums=1)
    assert not np.any(slope(batch.carry, config))
    assert np.any(slope(batch.carry, dataclasses.replace(config, burn_in=0)))


@pytest.mark.slow
def test_states_are_stored_as_they_were():
    course = RunConfig(
        total_steps=400,
        learning_starts=40,
        num_envs=2,
        train_every=10,
        batch_size=4,
        capacity=400,
        num_logs=1,
        n_step=2,
    )
    config = r2d2.Config(course, encoder=SMALL, memory_width=3, burn_in=2, length=3)
    run = r2d2.make_run(config, *CARTPOLE)
    state = jax.jit(run.init)(jax.random.key(0), r2d2.Hyper())  # nothing is learned yet
    network, _ = agent_of(config)
    data, count = state.replay.data, int(state.replay.size)
    assert np.asarray(data.terminated)[:count].any()
    carry = network.initial_carry(2)
    for row in range(count):
        np.testing.assert_allclose(data.obs.carry[row], carry, atol=1e-5)
        _, carry = network.apply(
            {"params": state.agent.learner.params},
            data.obs.obs[row],
            data.obs.is_first[row],
            carry,
            method="act",
        )
    after, metrics = jax.jit(run.step)(state, r2d2.Hyper())
    assert np.isfinite(metrics["value_loss"])
    assert np.any(np.asarray(after.priorities.weights) != np.asarray(state.priorities.weights))


def test_users_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="length=0 and burn_in=8: use at least 1 and 0"):
        r2d2.make_run(r2d2.Config(length=0), *CARTPOLE)
    with pytest.raises(UserError, match="R2D2 needs discrete"):
        r2d2.make_run(r2d2.Config(), *environments.make("Pendulum-v1"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [0, 64])
def test_a_bit_seen_at_the_beginning_is_asked_for_at_the_end(width):
    """Right is 1 and wrong is -1: with a memory it is nearly always right, without one it guesses."""
    env = environments.make("MemoryChain-bsuite")
    course = r2d2.Config().run
    course = dataclasses.replace(course, total_steps=30_000)
    run = r2d2.make_run(r2d2.Config(course, memory_width=width), *env)
    hyper = r2d2.Hyper(learning_rate=1e-3, epsilon_steps=10_000.0)
    options = compiler_options()
    state, _ = jax.jit(make_train_fn(run), compiler_options=options)(jax.random.key(0), hyper)
    returns, _ = jax.jit(lambda s, k: evaluate(run, s, *env, k, episodes=256, deterministic=True))(
        state, jax.random.key(1)
    )
    mean = float(jnp.mean(returns))
    assert mean > 0.9 if width else abs(mean) < 0.3  # 256 guesses: a deviation of 1/16
