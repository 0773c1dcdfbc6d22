"""DDPG: targets against NumPy, a bandit's best action, Pendulum; what all continuous algorithms share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import ddpg, sac, td3
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.continuous import Box, critic_fns
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import DeterministicActor, applied

PENDULUM = environments.make("Pendulum-v1")
BODY = MLP((16,), nn.relu)
BOX = Box((-2.0,), (2.0,))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))
SHORT = RunConfig(
    total_steps=300, learning_starts=40, capacity=100, batch_size=8, num_logs=2, num_envs=2, train_every=2
)


def batch_of(count: int = 8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        action=jnp.asarray(rng.uniform(-2, 2, (count, 1)), jnp.float32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        weight=jnp.ones(count),
    )


def parts(seed: int = 0):
    actor = DeterministicActor(ObsEncoder(BODY, (3,)), BOX.low, BOX.high)
    init_critic, critic_fn = critic_fns(PENDULUM[0], BODY, BOX, count=1)
    params = actor.init(jax.random.key(seed), jnp.zeros((1, 3)))["params"]
    return params, init_critic(jax.random.key(seed + 1)), applied(actor), critic_fn


def test_targets_against_numpy_and_targets_follow():
    actor, critic, actor_fn, critic_fn = parts()
    other_actor, other_critic, _, _ = parts(seed=5)
    state = dataclasses.replace(
        ddpg.init(actor, critic, TX), target_actor=other_actor, target_critic=other_critic
    )
    batch, hyper = batch_of(), ddpg.Hyper(tau=0.25)
    after, metrics, errors = jax.jit(ddpg.make_update(ddpg.Config(), actor_fn, critic_fn, TX))(
        state, hyper, batch
    )
    next_values = critic_fn(other_critic, batch.next_obs, actor_fn(other_actor, batch.next_obs))[0]
    values = critic_fn(critic, batch.obs, batch.action)[0]
    expected = np.asarray(values) - (np.asarray(batch.reward) + batch.discount * np.asarray(next_values))
    np.testing.assert_allclose(errors, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["value_loss"], np.mean(expected**2) / 2, rtol=1e-5)
    for new, old, trained in zip(
        *map(jax.tree.leaves, (after.target_critic, other_critic, after.critic.params)), strict=True
    ):
        np.testing.assert_allclose(new, 0.75 * old + 0.25 * trained, atol=1e-6)


def bandit_batch(count: int = 256) -> Batch:
    """One step, reward -4 (a - 0.5)^2: the best action is 0.5."""
    action = jnp.linspace(-0.5, 1.5, count)[:, None]
    blank = jnp.zeros((count, 3))
    reward = -4 * jnp.square(action[:, 0] - 0.5)
    return Batch(blank, action, reward, jnp.zeros(count), blank, jnp.ones(count))


def test_it_finds_the_best_action_of_a_bandit():
    actor, critic, actor_fn, critic_fn = parts()
    update = ddpg.make_update(ddpg.Config(), actor_fn, critic_fn, TX)
    hyper = ddpg.Hyper(learning_rate=5e-3, actor_learning_rate=1e-3)

    def step(state, _):
        return update(state, hyper, bandit_batch())[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=1500)[0])(ddpg.init(actor, critic, TX))
    np.testing.assert_allclose(actor_fn(state.actor.params, jnp.zeros((1, 3))), [[0.5]], atol=0.1)


def test_critics_see_actions_scaled_to_the_box():
    """The same network on a box twice as wide, at twice the action, says the same."""
    init, critic_fn = critic_fns(PENDULUM[0], BODY, BOX, count=2)
    _, wide_fn = critic_fns(PENDULUM[0], BODY, Box((-4.0,), (4.0,)), count=2)
    params, batch = init(jax.random.key(0)), batch_of()
    values = critic_fn(params, batch.obs, batch.action)
    assert values.shape == (2, 8)
    assert not jnp.allclose(values[0], values[1])
    np.testing.assert_allclose(values, wide_fn(params, batch.obs, 2 * batch.action), rtol=1e-5)


@pytest.mark.parametrize("algorithm", [ddpg, td3, sac])
def test_discrete_actions_are_refused(algorithm):
    with pytest.raises(UserError, match="continuous actions"):
        algorithm.make_run(algorithm.Config(), *environments.make("CartPole-v1"))


@pytest.mark.slow
def test_a_short_run_explores_inside_the_box_and_never_terminates():
    run = ddpg.make_run(ddpg.Config(run=SHORT, encoder=BODY), *PENDULUM)
    state, history = jax.jit(make_train_fn(run))(jax.random.key(0), ddpg.Hyper(action_noise_std=3.0))
    data = state.replay.data
    assert jnp.all(jnp.abs(data.action) <= 2)
    assert jnp.any(jnp.abs(data.action) == 2)
    assert not jnp.any(data.terminated)
    assert np.all(np.isfinite(history["value_loss"]))


def test_held_noise_stays_for_its_steps():
    config = dataclasses.replace(SHORT, train_every=10, capacity=40, noise_repeat=4)
    run = ddpg.make_run(ddpg.Config(run=config, encoder=BODY), *PENDULUM)
    state = jax.jit(run.init)(jax.random.key(0), ddpg.Hyper())
    collected = np.asarray(state.replay.data.action[:10, :, 0])  # the first collection, of uniform actions
    changes = np.abs(np.diff(collected, axis=0)) > 0
    np.testing.assert_array_equal(np.flatnonzero(changes.all(axis=1)), [3, 7])
    np.testing.assert_array_equal(np.flatnonzero(changes.any(axis=1)), [3, 7])
    assert collected[0, 0] != collected[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "score"), [(ddpg, -300.0), (td3, -300.0), (sac, -300.0)], ids=["ddpg", "td3", "sac"]
)
def test_pendulum(algorithm, score):
    """Two seeds, 10,000 steps each (a random policy gets about -1200)."""
    config = algorithm.Config(
        run=RunConfig(
            total_steps=10_000,
            learning_starts=1000,
            train_every=1,
            capacity=10_000,
            batch_size=64,
            num_logs=4,
        )
    )
    run = algorithm.make_run(config, *PENDULUM)
    keys = jax.random.split(jax.random.key(0), 2)
    states, _ = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=compiler_options())(
        keys, algorithm.Hyper()
    )

    def returns(state, key):
        return evaluate(run, state, *PENDULUM, key, episodes=32, deterministic=True)[0]

    assert jnp.mean(jax.jit(jax.vmap(returns), compiler_options=compiler_options())(states, keys)) > score
