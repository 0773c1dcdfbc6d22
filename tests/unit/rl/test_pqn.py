"""PQN: returns against a loop, a step against NumPy, exploration, layer normalization, whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import pqn
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP

CARTPOLE = environments.make("CartPole-v1")
LINEAR = pqn.make_network(pqn.Config(encoder=MLP(())), CARTPOLE[0])
HYPER = pqn.Hyper(learning_rate=0.1, gamma=0.9, lambda_=0.6, epsilon_steps=80.0)


def params_of():
    rng = np.random.default_rng(3)
    layer = {"kernel": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "bias": jnp.array([0.3, -0.2])}
    return {"epsilon": jnp.zeros(()), "values": {"actions": layer}}


def values_of(params, obs):
    layer = params["values"]["actions"]
    return np.asarray(obs) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def experience_of(batch=2, steps=6):
    rng = np.random.default_rng(0)
    terminated = np.zeros((batch, steps), bool)
    truncated = np.zeros((batch, steps), bool)
    terminated[0, 2] = truncated[1, 3] = True
    obs, next_obs = (jnp.asarray(rng.normal(size=(batch, steps, 4)), jnp.float32) for _ in range(2))
    done = terminated | truncated
    # Within an episode what follows a step is where the next one begins.
    next_obs = next_obs.at[:, :-1].set(jnp.where(done[:, :-1, None], next_obs[:, :-1], obs[:, 1:]))
    seen = Transition(
        obs=obs,
        action=jnp.asarray(rng.integers(0, 2, (batch, steps)), jnp.int32),
        reward=jnp.asarray(rng.normal(size=(batch, steps)), jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        next_obs=next_obs,
    )
    return Experience(seen, jnp.zeros((batch, steps), bool), (), jnp.zeros((batch, steps)))


def test_returns_against_a_loop_over_ends_and_cuts():
    experience, params = experience_of(), params_of()
    found = pqn.make_batch(LINEAR, params, HYPER, experience)
    seen = jax.tree.map(np.asarray, experience.transition)
    expected = np.zeros((2, 6))
    for row in range(2):
        for t in reversed(range(6)):
            best = values_of(params, seen.next_obs[row, t]).max()
            if seen.terminated[row, t]:
                future = 0.0
            elif seen.truncated[row, t] or t == 5:
                future = best
            else:
                future = 0.4 * best + 0.6 * expected[row, t + 1]
            expected[row, t] = seen.reward[row, t] + 0.9 * future
    # Returns are float32 sums of numbers about 1, of which some cancel.
    np.testing.assert_allclose(found.returns, expected.reshape(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.action, seen.action.reshape(-1))


def test_a_step_against_numpy_and_epsilon_by_steps():
    batch, params, tx = (
        pqn.make_batch(LINEAR, params_of(), HYPER, experience_of()),
        params_of(),
        optax.identity(),
    )
    update = pqn.make_update(pqn.Config(num_epochs=1, num_minibatches=1), LINEAR, tx)
    state = pqn.init(params, tx, jax.random.key(0), HYPER)
    after, metrics = jax.jit(update)(state, HYPER, batch)
    slope, loss = np.zeros((4, 2)), []
    for obs, action, target in zip(*map(np.asarray, (batch.obs, batch.action, batch.returns)), strict=True):
        error = values_of(params, obs)[action] - target
        slope[:, action] += error * obs / 12
        loss.append(error**2 / 2)
    np.testing.assert_allclose(metrics["value_loss"], np.mean(loss), rtol=1e-5)
    moved = after.learner.params["values"]["actions"]["kernel"] - params["values"]["actions"]["kernel"]
    np.testing.assert_allclose(moved, -0.1 * slope, atol=1e-5)
    assert after.learner.params["epsilon"] == 0
    assert float(state.epsilon) == 1
    np.testing.assert_allclose(after.epsilon, 1 + (0.05 - 1) * 12 / 80, rtol=1e-5)
    assert pqn.acting_params(after)["epsilon"] == after.epsilon


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_exploration_is_the_best_action_or_any(epsilon):
    params = {**params_of(), "epsilon": jnp.float32(epsilon)}
    obs = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    distribution, _ = LINEAR.apply({"params": params}, obs, None, (), method="act")
    expected = np.full((5, 2), epsilon / 2)
    expected[np.arange(5), values_of(params, obs).argmax(-1)] += 1 - epsilon
    np.testing.assert_allclose(np.exp(distribution.logits), expected, atol=1e-6)


def test_layer_normalization_before_each_activation():
    network = MLP((5,), nn.relu, layer_norm=True)
    inputs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params = network.init(jax.random.key(0), inputs)["params"]
    hidden = inputs @ np.asarray(params["Dense_0"]["kernel"])
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(network.apply({"params": params}, inputs), np.maximum(normed, 0), atol=1e-4)


@pytest.mark.slow
def test_runs_side_by_side_have_their_own_epsilon():
    config = pqn.Config(
        64, RolloutConfig(num_envs=2, num_steps=16), MLP((4,)), num_epochs=1, num_minibatches=2
    )
    train = pqn.make_train(config, *CARTPOLE)
    sweep = dataclasses.replace(jax.tree.map(lambda _: None, HYPER), epsilon_end=0)
    hyper = dataclasses.replace(HYPER, epsilon_end=jnp.array([0.0, 0.5]))
    _, history = jax.jit(jax.vmap(train, (None, sweep)))(jax.random.key(0), hyper)
    np.testing.assert_allclose(history["epsilon"], [[1 - 0.4, 1 - 0.8], [1 - 0.2, 1 - 0.4]], rtol=1e-5)


def test_continuous_actions_are_refused():
    with pytest.raises(UserError, match="PQN needs discrete actions"):
        pqn.make_run(pqn.Config(), *environments.make("Pendulum-v1"))


@pytest.mark.slow
def test_cartpole():
    """100,000 steps: at least 300 (a random policy gets 22, the most is 500)."""
    run = pqn.make_run(pqn.Config(total_steps=100_000), *CARTPOLE)
    keys = jax.random.split(jax.random.key(0), 1)
    hyper, options = pqn.Hyper(epsilon_steps=50_000.0), compiler_options()
    states, _ = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=options)(keys, hyper)

    def score(state, key):
        return evaluate(run, state, *CARTPOLE, key, episodes=16, deterministic=True)[0]

    assert jnp.mean(jax.jit(jax.vmap(score), compiler_options=options)(states, keys)) > 300
