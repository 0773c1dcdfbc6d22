"""TD3: it contains DDPG; the least of two critics, smoothing and delay do what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.rl.algorithms import ddpg, td3
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.continuous import Box, critic_fns
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import DeterministicActor, applied

PENDULUM = environments.make("Pendulum-v1")
BODY = MLP((16,), nn.relu)
BOX = Box((-2.0,), (2.0,))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))


def batch_of(count: int = 8) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        action=jnp.asarray(rng.uniform(-2, 2, (count, 1)), jnp.float32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.full(count, 0.9),
        next_obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        weight=jnp.ones(count),
    )


def parts(critics: int, seed: int = 0):
    actor = DeterministicActor(ObsEncoder(BODY, (3,)), BOX.low, BOX.high)
    init_critics, critic_fn = critic_fns(PENDULUM[0], BODY, BOX, count=critics)
    params = actor.init(jax.random.key(seed), jnp.zeros((1, 3)))["params"]
    return params, init_critics(jax.random.key(seed + 1)), applied(actor), critic_fn


@pytest.mark.slow
def test_one_critic_no_delay_and_no_noise_is_ddpg():
    actor, critic, actor_fn, critic_fn = parts(1)
    config = td3.Config(num_critics=1, policy_delay=1)
    update = jax.jit(td3.make_update(config, actor_fn, critic_fn, BOX, TX))
    ddpg_update = jax.jit(ddpg.make_update(ddpg.Config(), actor_fn, critic_fn, TX))
    state, other = td3.init(actor, critic, TX, jax.random.key(0)), ddpg.init(actor, critic, TX)
    for _ in range(3):
        state, metrics, _ = update(state, td3.Hyper(target_policy_noise=0.0), batch_of())
        other, same, _ = ddpg_update(other, ddpg.Hyper(), batch_of())
    np.testing.assert_allclose(metrics["value_loss"], same["value_loss"], rtol=1e-5)
    pairs = [
        (state.actor.params, other.actor.params),
        (state.critics.params, other.critic.params),
        (state.target_actor, other.target_actor),
        (state.target_critics, other.target_critic),
    ]
    for a, b in pairs:
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_target_is_the_least_of_the_critics():
    actor, critics, actor_fn, critic_fn = parts(2)
    update = jax.jit(td3.make_update(td3.Config(policy_delay=1), actor_fn, critic_fn, BOX, TX))
    batch = batch_of()
    state = td3.init(actor, critics, TX, jax.random.key(0))
    _, _, errors = update(state, td3.Hyper(target_policy_noise=0.0), batch)
    next_values = critic_fn(critics, batch.next_obs, actor_fn(actor, batch.next_obs))
    targets = np.asarray(batch.reward) + 0.9 * np.minimum(*np.asarray(next_values))
    values = np.asarray(critic_fn(critics, batch.obs, batch.action))
    np.testing.assert_allclose(errors, values.mean(0) - targets, atol=1e-5)


def test_smoothing_stays_within_its_clip():
    """With noise clipped to 0 the target is that of the policy itself, whatever its spread."""
    actor, critics, actor_fn, critic_fn = parts(2)
    update = jax.jit(td3.make_update(td3.Config(policy_delay=1), actor_fn, critic_fn, BOX, TX))
    state = td3.init(actor, critics, TX, jax.random.key(0))
    errors = [
        np.asarray(update(state, td3.Hyper(target_policy_noise=s, target_noise_clip=c), batch_of())[2])
        for s, c in ((0.0, 0.5), (9.0, 0.0), (9.0, 0.5))
    ]
    np.testing.assert_allclose(errors[0], errors[1], atol=1e-6)
    assert np.abs(errors[0] - errors[2]).max() > 1e-4


def test_the_actor_waits():
    """One update: three steps of the critics, each on its part of the batch, and one of the actor."""
    actor, critics, actor_fn, critic_fn = parts(2)
    update = jax.jit(td3.make_update(td3.Config(policy_delay=3), actor_fn, critic_fn, BOX, TX))
    state, metrics, errors = update(
        td3.init(actor, critics, TX, jax.random.key(0)), td3.Hyper(), batch_of(12)
    )
    assert (state.critics.steps, state.actor.steps) == (3, 1)
    assert errors.shape == (12,)
    np.testing.assert_allclose(metrics["value_error"], jnp.mean(errors), rtol=1e-4)


def test_batches_must_part():
    config = td3.Config(run=RunConfig(batch_size=9), policy_delay=2)
    with pytest.raises(UserError, match="divide"):
        td3.make_run(config, *PENDULUM)


def test_defaults_are_the_papers():
    hyper = td3.Hyper()
    assert (hyper.tau, hyper.target_policy_noise, hyper.target_noise_clip) == (0.005, 0.2, 0.5)
    assert dataclasses.asdict(td3.Config())["policy_delay"] == 2
