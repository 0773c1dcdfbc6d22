"""AWAC and TD3+BC: targets and losses against NumPy, and what is left of them without values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.rl.algorithms import awac, bc, td3, td3_bc
from rlhf_jax.rl.envs import environments, transitions
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.continuous import Box, critic_fns
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import applied

CARTPOLE, _ = environments.make("CartPole-v1")
PENDULUM, PENDULUM_PARAMS = environments.make("Pendulum-v1")
BODY = MLP((8,), nn.relu)
BOX = Box((-2.0,), (2.0,))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))


def batch_of(action, obs_dim):
    rng = np.random.default_rng(0)
    count = len(action)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, obs_dim)), jnp.float32),
        action=jnp.asarray(action),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, obs_dim)), jnp.float32),
        weight=jnp.ones(count),
    )


def awac_parts():
    policy = offline.make_policy(CARTPOLE, BODY)
    init_critics, critic_fn = offline.make_critics(CARTPOLE, BODY, count=2)
    params = policy.init(jax.random.key(0), offline.no_observation(CARTPOLE))["params"]
    state = awac.init(params, init_critics(jax.random.key(1)), TX, jax.random.key(2))
    state = awac.State(state.policy, state.critics, init_critics(jax.random.key(3)), state.key)
    return state, applied(policy), critic_fn


def test_targets_and_weights_of_awac_against_numpy():
    state, policy_fn, critic_fn = awac_parts()
    batch = batch_of(np.random.default_rng(1).integers(0, 2, 12), 4)
    hyper = awac.Hyper(learning_rate=0.0, inverse_temperature=2.0)
    _, metrics = jax.jit(awac.make_update(policy_fn, critic_fn, TX))(state, hyper, batch)
    _, next_key, own_key = jax.random.split(state.key, 3)

    def values(params, obs, action):
        return np.asarray(critic_fn(params, obs, action))

    own = policy_fn(state.policy.params, batch.obs)
    following = policy_fn(state.policy.params, batch.next_obs).sample(next_key)
    least = values(state.target_critics, batch.next_obs, following).min(0)
    targets = np.asarray(batch.reward) + np.asarray(batch.discount) * least
    now = values(state.critics.params, batch.obs, batch.action)
    np.testing.assert_allclose(metrics["value_loss"], np.mean((now - targets) ** 2) / 2, rtol=1e-5)
    baseline = values(state.critics.params, batch.obs, own.sample(own_key)).min(0)
    weights = np.minimum(np.exp(2.0 * (now.min(0) - baseline)), 100)
    np.testing.assert_allclose(metrics["weight"], weights.mean(), rtol=1e-5)
    logp = np.asarray(own.logp(batch.action))
    np.testing.assert_allclose(metrics["policy_loss"], -np.mean(weights * logp), rtol=1e-5)


def test_at_an_infinite_temperature_the_policy_of_awac_is_cloned():
    state, policy_fn, critic_fn = awac_parts()
    batch = batch_of(np.random.default_rng(1).integers(0, 2, 12), 4)
    hyper = awac.Hyper(inverse_temperature=0.0)
    after, metrics = jax.jit(awac.make_update(policy_fn, critic_fn, TX))(state, hyper, batch)
    cloned, _ = jax.jit(bc.make_update(policy_fn, TX))(state.policy, bc.Hyper(), batch)
    assert float(metrics["weight"]) == 1
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, after.policy.params, cloned.params)


@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_the_loss_of_td3_bc_and_its_gradient_against_numpy(alpha):
    rng = np.random.default_rng(0)
    action, taken, slopes = rng.normal(size=(3, 6, 1))
    batch = batch_of(taken, 3)
    hyper = td3_bc.Hyper(alpha=alpha)

    def loss(action):
        values = jnp.sum(slopes * action, axis=-1) + 0.3
        return td3_bc.make_actor_loss(BOX)(hyper, action, values, batch)

    values = (slopes * action).sum(-1) + 0.3
    weight = alpha / np.abs(values).mean()
    found, gradient = jax.value_and_grad(loss)(jnp.asarray(action, jnp.float32))
    np.testing.assert_allclose(
        found, np.mean(((action - taken) / 2) ** 2) - weight * values.mean(), rtol=1e-4
    )
    expected = 2 * (action - taken) / 4 / action.size - weight * slopes / len(values)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_critics_of_td3_bc_are_those_of_td3():
    """One update with the same noise moves them alike; the actors differ by the term of the log."""
    config = td3_bc.Config(encoder=BODY)
    actor = td3.make_actor(config, PENDULUM)
    init_critics, critic_fn = critic_fns(PENDULUM, BODY, BOX, count=2)
    params = actor.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    state = td3.init(params, init_critics(jax.random.key(1)), TX, jax.random.key(2))
    batch = batch_of(np.random.default_rng(1).uniform(-2, 2, (8, 1)).astype(np.float32), 3)
    losses = (td3.deterministic_actor_loss, td3_bc.make_actor_loss(BOX))
    plain, near = (
        jax.jit(td3.make_update(config, applied(actor), critic_fn, BOX, TX, actor_loss_fn=loss))(
            state, td3_bc.Hyper(), batch
        )[0]
        for loss in losses
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7)  # noqa: E731
    jax.tree.map(close, plain.critics.params, near.critics.params)
    assert not np.array_equal(*(x.actor.params["Dense_0"]["kernel"] for x in (plain, near)))


def test_states_are_normalized_as_the_log_is():
    act = transitions.random_act_fn(PENDULUM)
    log = transitions.collect(act, None, PENDULUM, PENDULUM_PARAMS, jax.random.key(0), episodes=2)
    normalized = np.asarray(td3_bc.normalizer(log)(log.obs))
    deviation = np.asarray(log.obs).std(0)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std(0), deviation / (deviation + 1e-3), rtol=1e-3)
    with pytest.raises(UserError, match=r"TD3\+BC: policy_delay=2 does not divide run.batch_size=7"):
        td3_bc.make_run(td3_bc.Config(run=offline.RunConfig(batch_size=7)), PENDULUM, log)
