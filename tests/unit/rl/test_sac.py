"""SAC: targets against NumPy, the temperature's controller, a bandit's soft optimum, resume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiers import few

from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.rl.algorithms import sac
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.continuous import Box, critic_fns
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import SquashedGaussianActor, applied

PENDULUM = environments.make("Pendulum-v1")
BODY = MLP((16,), nn.relu)
BOX = Box((-2.0,), (2.0,))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))


def parts():
    actor = SquashedGaussianActor(ObsEncoder(BODY, (3,)), BOX.low, BOX.high)
    init_critics, critic_fn = critic_fns(PENDULUM[0], BODY, BOX, count=2)
    params = actor.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    return params, init_critics(jax.random.key(1)), applied(actor), critic_fn


def batch_of(count: int = 8) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        action=jnp.asarray(rng.uniform(-2, 2, (count, 1)), jnp.float32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        weight=jnp.ones(count),
    )


@pytest.mark.parametrize("temperature", few([1e-8, 0.7], 0.7))
def test_targets_against_numpy(temperature):
    actor, critics, actor_fn, critic_fn = parts()
    hyper, batch = sac.Hyper(temperature=temperature), batch_of()
    state = sac.init(actor, critics, TX, jax.random.key(2), hyper)
    update = jax.jit(sac.make_update(sac.Config(), actor_fn, critic_fn, BOX, TX))
    _, metrics, errors = update(state, hyper, batch)
    key = jax.random.split(state.key, 3)[1]
    action, logp = actor_fn(actor, batch.next_obs).sample_and_logp(key)
    least = np.minimum(*np.asarray(critic_fn(critics, batch.next_obs, action)))
    targets = np.asarray(batch.reward) + batch.discount * (least - temperature * np.asarray(logp))
    values = np.asarray(critic_fn(critics, batch.obs, batch.action))
    np.testing.assert_allclose(errors, values.mean(0) - targets, atol=1e-5)
    np.testing.assert_allclose(metrics["value_loss"], np.mean((values - targets) ** 2) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-5)


@pytest.mark.parametrize(("target", "rises"), [(2.0, True), (-5.0, False)])
def test_temperature_rises_while_entropy_is_too_low(target, rises):
    actor, critics, actor_fn, critic_fn = parts()
    hyper = sac.Hyper(target_entropy=target)
    state = sac.init(actor, critics, TX, jax.random.key(2), hyper)
    update = jax.jit(sac.make_update(sac.Config(), actor_fn, critic_fn, BOX, TX))
    after, _, _ = update(state, hyper, batch_of())
    assert (after.temperature.params > state.temperature.params) == rises


def test_a_fixed_temperature_stays():
    actor, critics, actor_fn, critic_fn = parts()
    state = sac.init(actor, critics, TX, jax.random.key(2), sac.Hyper(temperature=0.3))
    config = sac.Config(learn_temperature=False)
    after, _, _ = jax.jit(sac.make_update(config, actor_fn, critic_fn, BOX, TX))(
        state, sac.Hyper(), batch_of()
    )
    np.testing.assert_allclose(jnp.exp(after.temperature.params), 0.3, rtol=1e-6)


@pytest.mark.slow
def test_soft_optimum_of_a_bandit():
    """Reward -4 (a - 0.5)^2 at temperature 0.5: the best policy is nearly N(0.5, 0.5 / (2 * 4))."""
    actor, critics, actor_fn, critic_fn = parts()
    count = 256
    action = jnp.linspace(-2, 2, count)[:, None]
    blank = jnp.zeros((count, 3))
    reward = -4 * jnp.square(action[:, 0] - 0.5)
    batch = Batch(blank, action, reward, jnp.zeros(count), blank, jnp.ones(count))
    hyper = sac.Hyper(learning_rate=5e-3, actor_learning_rate=2e-3, temperature=0.5)
    update = sac.make_update(sac.Config(learn_temperature=False), actor_fn, critic_fn, BOX, TX)

    def step(state, _):
        return update(state, hyper, batch)[0], None

    state = sac.init(actor, critics, TX, jax.random.key(2), hyper)
    state = jax.jit(lambda s: jax.lax.scan(step, s, length=2500)[0])(state)
    samples = actor_fn(state.actor.params, jnp.zeros((4000, 3))).sample(jax.random.key(3))
    np.testing.assert_allclose(jnp.mean(samples), 0.5, atol=0.12)
    np.testing.assert_allclose(jnp.std(samples), 0.25, atol=0.08)


@pytest.mark.slow
def test_resume_is_bit_identical_and_acting_is_in_the_box():
    config = sac.Config(
        run=RunConfig(
            total_steps=120, learning_starts=20, capacity=60, batch_size=8, num_logs=2, train_every=1
        ),
        encoder=BODY,
    )
    run = sac.make_run(config, *PENDULUM)
    hyper = sac.Hyper()
    step = jax.jit(run.step)
    middle, _ = step(jax.jit(run.init)(jax.random.key(0), hyper), hyper)

    def plain(tree):
        return [np.asarray(x) for x in jax.tree.leaves(jax.tree.map(as_array, tree))]

    def as_array(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    def through_memory(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(np.asarray(jax.random.key_data(x)))
        return jnp.asarray(np.asarray(x))

    copied = jax.tree.map(through_memory, middle)
    for a, b in zip(plain(step(middle, hyper)[0]), plain(step(copied, hyper)[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    obs = jnp.zeros((5, 3))
    is_first = jnp.zeros(5, bool)
    mode, _ = run.act(middle, obs, is_first, (), jax.random.key(1), deterministic=True)
    drawn, _ = run.act(middle, obs, is_first, (), jax.random.key(1), deterministic=False)
    assert mode.shape == drawn.shape == (5, 1)
    assert jnp.all(mode == mode[0])
    assert jnp.any(drawn != drawn[0])
    assert jnp.all(jnp.abs(drawn) <= 2)
