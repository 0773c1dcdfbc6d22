import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.networks import networks
from rlhf_jax.rl.networks.distributions import Categorical, DiagonalGaussian, TanhGaussian

KEY = jax.random.key(0)


def test_categorical_against_numpy():
    logits = jax.random.normal(KEY, (5, 4))
    other = jax.random.normal(jax.random.key(1), (5, 4))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.asarray, (logits, other)))
    action = jnp.array([0, 3, 1, 2, 0])
    distribution = Categorical(logits)
    np.testing.assert_allclose(distribution.logp(action), np.log(p[np.arange(5), action]), rtol=1e-5)
    np.testing.assert_allclose(distribution.entropy(), -(p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(distribution.kl(Categorical(other)), (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(distribution.mode(), p.argmax(-1))
    draws = jax.vmap(distribution.sample)(jax.random.split(KEY, 4000))
    np.testing.assert_allclose((np.asarray(draws) == 2).mean(0), p[:, 2], atol=0.03)


def test_gaussian_against_samples():
    first = DiagonalGaussian(jnp.array([0.3, -1.0]), jnp.array([-0.5, 0.2]))
    second = DiagonalGaussian(jnp.array([0.0, -0.5]), jnp.array([0.1, 0.0]))
    draws = jax.vmap(first.sample)(jax.random.split(KEY, 20_000))
    logp = first.logp(draws)
    np.testing.assert_allclose(first.entropy(), -logp.mean(), atol=0.02)
    np.testing.assert_allclose(first.kl(second), (logp - second.logp(draws)).mean(), atol=0.03)
    assert float(first.kl(first)) == 0


def test_tanh_gaussian_is_a_density_inside_its_box():
    distribution = TanhGaussian(jnp.array([0.4]), jnp.array([-0.3]), jnp.array([-2.0]), jnp.array([1.0]))
    grid = jnp.linspace(-2, 1, 20_001)[1:-1, None]
    np.testing.assert_allclose(jnp.exp(distribution.logp(grid)).sum() * 3 / 20_000, 1, atol=1e-3)
    action, logp = distribution.sample_and_logp(KEY)
    np.testing.assert_allclose(distribution.logp(action), logp, rtol=1e-4)
    far = TanhGaussian(jnp.array([40.0]), jnp.array([0.0]), jnp.array([-2.0]), jnp.array([1.0]))
    assert jnp.isfinite(far.sample_and_logp(KEY)[1])
    assert jnp.isfinite(far.logp(jnp.array([1.0])))


@pytest.mark.parametrize(
    "name",
    few(
        ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar", "FrozenLake-misc"],
        "Pendulum-v1",
        "Breakout-MinAtar",
    ),
)
@pytest.mark.parametrize("shared", few([False, True], True))
def test_actor_critic_of_every_kind_of_environment(name, shared):
    env, params = environments.make(name)
    states = jax.vmap(env.reset, (0, None))(jax.random.split(KEY, 3), params)
    encoder = networks.default_encoder(env)
    network = networks.make_actor_critic(env, encoder, shared=shared)
    is_first = jnp.zeros(3, bool)
    variables = network.init(KEY, states.obs[:, None], is_first[:, None], network.initial_carry(3))
    distribution, values = network.apply(variables, states.obs[:, None], is_first[:, None], ())
    acting, _ = network.apply(variables, states.obs, is_first, (), method="act")
    assert values.shape == (3, 1)
    assert distribution.sample(KEY).shape == (3, 1, *env.action_shape)
    np.testing.assert_allclose(distribution.mode()[:, 0], acting.mode(), rtol=1e-5)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    torso = count(variables["params"]["actor_torso"])
    assert ("critic_torso" in variables["params"]) == (not shared)
    if not shared:
        assert count(variables["params"]["critic_torso"]) == torso


@pytest.mark.slow
def test_recurrent_network_acts_as_it_is_scored_and_forgets_at_starts():
    env, _ = environments.make("CartPole-v1")
    network = networks.make_recurrent_actor_critic(env, networks.MLP((8,)), width=8)
    obs = jax.random.normal(KEY, (2, 6, 4))
    is_first = jnp.zeros((2, 6), bool).at[0, 3].set(True)
    carry = jax.random.normal(jax.random.key(1), (2, 8))
    variables = network.init(KEY, obs, is_first, carry)
    distribution, values = network.apply(variables, obs, is_first, carry)
    carried = carry
    for t in range(6):
        acting, carried = network.apply(variables, obs[:, t], is_first[:, t], carried, method="act")
        np.testing.assert_allclose(acting.logits, distribution.logits[:, t], rtol=1e-5, atol=1e-7)
    # What follows each observation, as the next observation of the same trajectory, has the next value.
    next_values = network.apply(
        variables, obs[:, :-1], obs[:, 1:], is_first[:, :-1], carry, method="next_value"
    )
    np.testing.assert_allclose(next_values[1], values[1, 1:], rtol=1e-5)
    assert not np.allclose(next_values[0, 2], values[0, 3])
    # Nothing before a start matters after it.
    changed = network.apply(variables, obs.at[0, :3].set(7.0), is_first, carry)[1]
    np.testing.assert_allclose(changed[0, 3:], values[0, 3:], rtol=1e-6)
    assert not np.allclose(changed[0, :3], values[0, :3])


def test_a_pixel_of_every_plane_reaches_the_output():
    encoder = networks.MinAtarConv(channels=4, width=8, activation=jnp.tanh)
    image = jnp.zeros((1, 10, 10, 3))
    variables = encoder.init(KEY, image)
    base = encoder.apply(variables, image)
    for corner in itertools.product((0, 9), (0, 9), range(3)):
        assert not np.allclose(encoder.apply(variables, image.at[(0, *corner)].set(1.0)), base)


def test_a_dense_layer_on_patches_is_a_convolution():
    images, kernel = jax.random.normal(KEY, (2, 6, 5, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    expected = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = networks.patches(images, 3) @ kernel.reshape(-1, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
