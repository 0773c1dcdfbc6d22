"""MuZero: targets and loss against loops, the search on a known model, what is stored, a whole run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, init_train_state, make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.losses.value import rescale_values, unrescale_values
from rlhf_jax.rl.algorithms import muzero
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.off_policy import RecurrentObs, RunConfig
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP

pytest.importorskip("mctx")

CARTPOLE = environments.make("CartPole-v1")
SMALL = muzero.Config(encoder=MLP((5,), nn.relu), width=4, unroll=2, num_simulations=4)


def steps_of():
    """Windows for 2 steps unrolled and 3 rewards: one goes on, one ends at its step 1, one is cut there."""
    rng = np.random.default_rng(0)
    shape = (3, 2 + 3 + 2)
    terminated, truncated = np.zeros((2, *shape), bool)
    terminated[1, 1] = truncated[2, 1] = True
    terminated[2, 4] = truncated[1, 3] = True  # of episodes that came after
    policy = rng.dirichlet([1, 1], shape)
    searches = muzero.Search(
        jnp.asarray(policy, jnp.float32), jnp.asarray(rng.normal(size=shape), jnp.float32)
    )
    obs = jnp.asarray(rng.normal(size=(*shape, 4)), jnp.float32)
    return Transition(
        obs=RecurrentObs(obs, jnp.zeros(shape, bool), searches),
        action=jnp.asarray(rng.integers(0, 2, shape), jnp.int32),
        reward=jnp.asarray(rng.normal(size=shape), jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        next_obs=obs,
    )


def test_targets_against_a_loop():
    data = steps_of()
    batch = muzero.make_batch(data, gamma=0.9, unroll=2, n_step=3)
    found = jax.tree.map(np.asarray, data)
    for row in range(3):
        over = cut = False
        for k in range(3):
            assert bool(batch.is_open[row, k]) == (not over and not cut)
            assert bool(batch.known[row, k]) == (not cut)
            total, factor = 0.0, 1.0
            if not over and not cut:
                for t in range(k, k + 3):
                    total, factor = total + factor * found.reward[row, t], 0.9 * factor
                    # The search of a step lies beside the step after it.
                    if found.terminated[row, t]:
                        factor = 0.0
                    elif found.truncated[row, t]:
                        total += factor * found.obs.carry.value[row, t + 1]
                        factor = 0.0
                    if factor == 0:
                        break
                else:
                    total += factor * found.obs.carry.value[row, k + 3 + 1]
                np.testing.assert_array_equal(batch.policy[row, k], found.obs.carry.policy[row, k + 1])
            if not cut:
                np.testing.assert_allclose(batch.returns[row, k], total, atol=1e-5)
            if k < 2:
                assert batch.reward[row, k] == (found.reward[row, k] if not over and not cut else 0)
            over |= bool(found.terminated[row, k]) and not cut
            cut |= bool(found.truncated[row, k]) and not over
    np.testing.assert_array_equal(batch.obs, data.obs.obs[:, 0])
    assert batch.action.shape == (3, 2)


def test_the_loss_against_a_loop():
    batch = muzero.make_batch(steps_of(), gamma=0.9, unroll=2, n_step=3)
    batch = dataclasses.replace(batch, weight=jnp.array([0.3, 1.0, 0.7]))
    rng = np.random.default_rng(1)
    rewards, logits, values = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 2), (3, 3, 2), (3, 3))
    )
    loss, (metrics, errors) = muzero.muzero_loss(rewards, logits, values, batch, value_coef=0.25)
    policy_loss = value_loss = reward_loss = 0.0
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row in range(3):
        for k in range(3):
            weight = float(batch.weight[row]) / 3 * (1 if k == 0 else 1 / 2)
            if batch.is_open[row, k]:
                policy_loss -= weight * float(batch.policy[row, k] @ logp[row, k])
            if batch.known[row, k]:
                value_loss += weight * float(values[row, k] - rescale_values(batch.returns[row, k])) ** 2 / 2
            if k and batch.known[row, k - 1]:
                gap = float(rewards[row, k - 1] - rescale_values(batch.reward[row, k - 1]))
                reward_loss += weight * gap**2 / 2
    np.testing.assert_allclose(metrics["policy_loss"], policy_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_loss"], reward_loss, rtol=1e-5)
    np.testing.assert_allclose(loss, policy_loss + 0.25 * value_loss + reward_loss, rtol=1e-5)
    np.testing.assert_allclose(errors, values[:, 0] - rescale_values(batch.returns[:, 0]), rtol=1e-5)


def test_a_half_of_the_gradient_at_each_step_of_the_model():
    value, slope = jax.value_and_grad(lambda x: muzero.scale_gradient(x, 0.5) ** 2)(3.0)
    assert (float(value), float(slope)) == (9.0, 3.0)


class Chain:
    """A model that is known: left pays 1 at once, right nothing and then 10; two steps, then nothing."""

    num_actions = 2

    def apply(self, variables, *inputs, method):
        del variables
        return getattr(self, method)(*inputs)

    def represent(self, obs):
        return jnp.zeros((obs.shape[0], 2)) + jnp.array([1.0, 0.0])

    def step(self, latent, action):
        start, right = latent[:, 0], latent[:, 1]
        reward = start * jnp.where(action == 0, 1.0, 0.0) + 10.0 * right
        return jnp.stack([jnp.zeros_like(start), start * (action == 1)], axis=1), rescale_values(reward)

    def predict(self, latent):
        return jnp.zeros((latent.shape[0], 2)), jnp.zeros(latent.shape[0])


def test_the_search_looks_beyond_the_first_reward():
    options = {"gamma": 0.9, "num_simulations": 24, "gumbel_scale": 0.0}
    run = jax.jit(lambda key: muzero.search(Chain(), {}, jnp.zeros((2, 4)), key, **options))
    action, found = run(jax.random.key(0))
    np.testing.assert_array_equal(action, [1, 1])
    assert np.all(found.policy[:, 1] > 0.9)
    np.testing.assert_allclose(found.policy.sum(1), 1, rtol=1e-5)
    assert np.all(found.value > 2)  # at most .9 x 10, at worst with the value 0 of what was not tried
    assert np.all(found.value < 9)


@pytest.mark.slow
def test_a_step_lowers_the_loss_and_the_model_is_unrolled_along_the_actions():
    network = muzero.make_network(SMALL, CARTPOLE[0])
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes["params"])
    batch = muzero.make_batch(steps_of(), gamma=0.9, unroll=2, n_step=3)
    rewards, logits, values = jax.jit(lambda p, b: muzero.unrolled(network, p, b))(params, batch)
    assert (rewards.shape, logits.shape, values.shape) == ((3, 2), (3, 3, 2), (3, 3))
    other = dataclasses.replace(batch, action=batch.action.at[:, 1].set(1 - batch.action[:, 1]))
    changed = jax.jit(lambda p, b: muzero.unrolled(network, p, b))(params, other)
    np.testing.assert_array_equal(changed[0][:, 0], rewards[:, 0])
    assert np.all(changed[0][:, 1] != rewards[:, 1])
    np.testing.assert_array_equal(changed[2][:, :2], values[:, :2])
    tx = make_optimizer(OptimizerConfig(clip_norm=5.0, b2=0.999))
    state = muzero.State(init_train_state(params, tx), jnp.float32(0.9))
    update = muzero.make_update(network, tx)
    hyper = muzero.Hyper(learning_rate=3e-3)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: update(s, hyper, batch)[:2], s, length=30))
    _, history = run(state)
    total = history["policy_loss"] + 0.25 * history["value_loss"] + history["reward_loss"]
    assert total[-1] < 0.9 * total[0]


def test_users_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="num_simulations=0: use at least 1"):
        muzero.make_run(muzero.Config(num_simulations=0), *CARTPOLE)
    with pytest.raises(UserError, match="MuZero needs discrete"):
        muzero.make_run(muzero.Config(), *environments.make("Pendulum-v1"))


@pytest.mark.slow
def test_searches_are_stored_beside_the_step_after_theirs():
    course = RunConfig(
        total_steps=200,
        learning_starts=40,
        num_envs=2,
        train_every=10,
        batch_size=4,
        capacity=200,
        num_logs=1,
        n_step=2,
    )
    run = muzero.make_run(dataclasses.replace(SMALL, run=course), *CARTPOLE)
    state = jax.jit(run.init)(jax.random.key(0), muzero.Hyper())  # nothing is learned yet
    carry, size = state.replay.data.obs.carry, int(state.replay.size)
    np.testing.assert_array_equal(carry.policy[0], 0)  # before the first search
    np.testing.assert_allclose(carry.policy[1:size].sum(-1), 1, rtol=1e-5)
    network = muzero.make_network(SMALL, CARTPOLE[0])
    variables = {"params": state.agent.learner.params}
    latent = network.apply(variables, state.replay.data.obs.obs[0], method="represent")
    _, value = network.apply(variables, latent, method="predict")
    assert np.all(np.abs(carry.value[1] - unrescale_values(value)) < 1)  # a mean of it and of what follows
    _, metrics = jax.jit(run.step)(state, muzero.Hyper())
    assert np.isfinite(metrics["value_loss"])


@pytest.mark.slow
def test_cartpole():
    """16,000 steps: at least 150 (a random policy gets 22)."""
    course = dataclasses.replace(muzero.Config().run, total_steps=16_000, learning_starts=500)
    run = muzero.make_run(muzero.Config(course), *CARTPOLE)
    options = compiler_options()
    train = jax.jit(make_train_fn(run), compiler_options=options)
    state, _ = train(jax.random.split(jax.random.key(0), 1)[0], muzero.Hyper())
    score = jax.jit(lambda s, k: evaluate(run, s, *CARTPOLE, k, episodes=16, deterministic=True)[0].mean())
    assert score(state, jax.random.key(1)) > 150
