import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rl.envs import environments, evaluation, normalization
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.loops import rollout
from rlhf_jax.rl.networks import networks

KEY = jax.random.key(0)


class Stub:
    """A network that says what it was told."""

    def __init__(self, values, next_values):
        self.values, self.next_values = values, next_values

    def apply(self, variables, *inputs, method):
        return (None, self.values) if method == "__call__" else self.next_values


def random_experience(rng, batch=3, time=9):
    terminated, truncated = rng.random((2, batch, time)) < 0.2
    truncated &= ~terminated
    values, next_values = rng.normal(size=(2, batch, time)).astype(np.float32)
    # Within an episode, what follows is what the next step sees.
    going_on = ~(terminated | truncated)[:, :-1]
    next_values[:, :-1] = np.where(going_on, values[:, 1:], next_values[:, :-1])
    rewards = rng.normal(size=(batch, time)).astype(np.float32)
    seen = Transition(*map(jnp.asarray, (values, values, rewards, terminated, truncated, next_values)))
    experience = rollout.Experience(seen, jnp.zeros((batch, time), bool), (), jnp.zeros((batch, time)))
    return Stub(jnp.asarray(values), jnp.asarray(next_values)), experience


def loop(network, seen, gamma, gae_lambda, bootstrap):
    values, next_values = np.asarray(network.values), np.asarray(network.next_values)
    advantages = np.zeros_like(values)
    for b in range(values.shape[0]):
        later = 0.0
        for t in reversed(range(values.shape[1])):
            ended = seen.terminated[b, t] or (seen.truncated[b, t] and not bootstrap)
            next_value = 0.0 if ended else next_values[b, t]
            delta = seen.reward[b, t] + gamma * next_value - values[b, t]
            later = delta + gamma * gae_lambda * later * (not seen.done[b, t])
            advantages[b, t] = later
    return advantages


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bootstrap", [True, False])
def test_advantages_against_a_loop_over_steps(seed, bootstrap):
    network, experience = random_experience(np.random.default_rng(seed))
    values, advantages, returns = rollout.compute_gae(
        network, None, experience, gamma=0.9, gae_lambda=0.8, bootstrap_truncation=bootstrap
    )
    expected = loop(network, experience.transition, 0.9, 0.8, bootstrap)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values, atol=1e-5)


def test_bootstrap_matters_where_an_episode_was_cut():
    network, experience = random_experience(np.random.default_rng(0))
    with_, without = (
        rollout.compute_gae(network, None, experience, gamma=0.9, gae_lambda=0.0, bootstrap_truncation=flag)[
            1
        ]
        for flag in (True, False)
    )
    np.testing.assert_array_equal(np.asarray(with_ != without), experience.transition.truncated)


def setup(name="CartPole-v1", **options):
    env, params = environments.make(name)
    config = rollout.RolloutConfig(**{"num_envs": 3, "num_steps": 40, **options})
    network = networks.make_actor_critic(env, networks.MLP((8,)))
    weights = rollout.init_params(network, env, KEY)
    envs = rollout.init_vector_env(network, env, params, config, jax.random.key(1))
    collect = jax.jit(
        lambda envs, key: rollout.collect(network, env, params, config, weights, envs, key, gamma=0.99)
    )
    return network, weights, envs, collect


def test_rollouts_go_on_where_they_stopped_and_are_scored_as_they_were_acted():
    network, weights, envs, collect = setup()
    after, first, statistics = collect(envs, jax.random.key(2))
    _, second, _ = collect(after, jax.random.key(3))
    np.testing.assert_array_equal(second.transition.obs[:, 0], after.states.obs)
    seen = first.transition
    going_on = ~seen.done[:, :-1]
    np.testing.assert_array_equal(seen.next_obs[:, :-1][going_on], seen.obs[:, 1:][going_on])
    np.testing.assert_array_equal(first.is_first[:, 1:], seen.done[:, :-1])
    assert first.is_first[:, 0].all()
    score = rollout.make_logprob_fn(network)(weights, rollout.as_rows(network, first.inputs))
    np.testing.assert_allclose(score.logp.reshape(first.logp.shape), first.logp, atol=1e-6)
    assert int(statistics["episodes"]) == int(seen.done.sum()) > 0
    # CartPole pays 1 a step: return and length of an episode are the same.
    assert float(statistics["episode_return_sum"]) == int(statistics["episode_length_sum"])
    assert int(after.states.finished.episodes.sum()) == 0
    # Fresh beginnings differ from each other: resets are not one state repeated.
    beginnings = np.asarray(seen.obs[np.asarray(first.is_first)])
    assert len(np.unique(beginnings, axis=0)) == len(beginnings)


@pytest.mark.slow
def test_observation_statistics_are_those_of_all_environments():
    _, _, envs, collect = setup(normalize_obs=True)
    raw = setup()[3](setup()[2], jax.random.key(2))[1].transition.obs
    after, experience, _ = collect(envs, jax.random.key(2))
    # Nothing is known before the first rollout, so it passes unchanged, and counts afterwards.
    np.testing.assert_allclose(experience.transition.obs, raw, rtol=1e-6)
    flat = np.asarray(raw).reshape(-1, 4)
    np.testing.assert_allclose(after.obs_moments.mean, flat.mean(0), atol=1e-6)
    assert float(after.obs_moments.count[0]) == len(flat)
    seen = normalization.normalize_observations(raw, after.obs_moments)
    np.testing.assert_allclose(np.asarray(seen).reshape(-1, 4).std(0), 1, atol=1e-3)


def test_reward_scale_against_a_loop():
    rng = np.random.default_rng(0)
    rewards, done = rng.normal(size=(2, 30)).astype(np.float32) + 1, rng.random((2, 30)) < 0.2
    scale = normalization.init_reward_scale(2)
    for part in (slice(0, 11), slice(11, 30)):
        scale, scaled = normalization.scale_rewards(
            scale, jnp.asarray(rewards[:, part]), jnp.asarray(done[:, part]), gamma=0.9
        )
    sums, running = [], np.zeros(2)
    for t in range(30):
        running = 0.9 * running + rewards[:, t]
        sums.append(running.copy())
        running[done[:, t]] = 0
    np.testing.assert_allclose(scaled, rewards[:, 11:] / np.std(sums), rtol=1e-4)
    np.testing.assert_allclose(scale.running, running, rtol=1e-5)


def test_evaluation_counts_whole_episodes_and_each_once():
    env, params = environments.make("CartPole-v1")

    def act(state, obs, is_first, carry, key, *, deterministic):
        # Push against the lean, or at random: the first lives longer.
        lean = (obs[:, 2] + obs[:, 3] > 0).astype(jnp.int32)
        return (lean if deterministic else jax.random.bernoulli(key, shape=lean.shape).astype(jnp.int32)), ()

    @dataclasses.dataclass
    class Run:
        act: object
        initial_carry = staticmethod(lambda count: ())
        observe_reward = staticmethod(lambda carry, reward: carry)

    def mean(deterministic):
        returns, lengths = evaluation.evaluate(
            Run(act), None, env, params, KEY, episodes=8, deterministic=deterministic
        )
        np.testing.assert_array_equal(returns, lengths)
        return float(returns.mean())

    assert mean(False) < 60 < 100 < mean(True) <= 500
