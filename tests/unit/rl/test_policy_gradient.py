import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import grpo as group, ppo as shared
from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.losses.corrections import Correction
from rlhf_jax.rl.algorithms import a2c, grpo, ppo, reinforce, trpo
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops import episodic, rollout
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.runs import run_updates
from rlhf_jax.rl.networks import networks

KEY = jax.random.key(0)
NETWORK = NetworkConfig(encoder=networks.MLP((8,)))


def random_batch(env, network, rows=24):
    keys = jax.random.split(KEY, 6)
    obs = jax.random.normal(keys[0], (rows, 1, *env.obs_shape))
    is_first = jnp.zeros((rows, 1), bool)
    params = rollout.init_params(network, env, keys[1])
    distribution, values = rollout.call(network, params, obs, is_first, ())
    action = distribution.sample(keys[2])
    inputs = rollout.Inputs(obs, action, is_first, ())
    advantages, returns = jax.random.normal(keys[3], (2, rows, 1))
    mask = jnp.ones((rows, 1), bool)
    return params, shared.Batch(inputs, mask, distribution.logp(action), values, advantages, returns)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_a2c_is_ppo_with_one_step_and_no_clip(name):
    env, _ = environments.make(name)
    network = networks.make_actor_critic(env, networks.MLP((8,)))
    logprob_fn, tx = rollout.make_logprob_fn(network), optax.identity()
    params, batch = random_batch(env, network)
    free = ppo.default_hyper(epsilon_low=jnp.inf, epsilon_high=jnp.inf, cliprange_value=jnp.inf)
    as_ppo = ppo.make_update(shared.Config(num_ppo_epochs=1, num_minibatches=1), logprob_fn, tx)
    expected, _ = as_ppo(ppo.init(params, tx, KEY, free), free, batch)
    hyper = a2c.default_hyper(learning_rate=free.learning_rate, entropy_coef=free.entropy_coef)
    state, _ = a2c.make_update(logprob_fn, tx)(a2c.init(params, tx), hyper, batch)
    moved = jax.tree.map(
        lambda a, b, p: (np.asarray(a - p), np.asarray(b - p)),
        state.learner.params,
        expected.learner.params,
        params,
    )
    for ours, theirs in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-8)


def episodes(env, params, network, weights, states, max_steps=60):
    return episodic.collect_episodes(
        network, env, params, weights, states, jax.random.key(5), max_steps=max_steps
    )


def cartpole(count=4, max_steps=60):
    env, params = environments.make("CartPole-v1")
    network = networks.make_actor_critic(env, networks.MLP((8,)))
    weights = rollout.init_params(network, env, KEY)
    states = jax.vmap(env.reset, (0, None))(jax.random.split(KEY, count), params)
    return env, params, network, weights, episodes(env, params, network, weights, states, max_steps)


def test_episodes_end_once_and_count_to_their_end():
    *_, seen = cartpole()
    mask, done = np.asarray(seen.mask), np.asarray(seen.transition.terminated)
    for row in range(4):
        length = mask[row].sum()
        assert mask[row, :length].all()
        assert not done[row, : length - 1].any()
        assert done[row, length - 1] or length == 60
    np.testing.assert_array_equal(seen.returns, mask.sum(1))


@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_returns_against_a_loop(baseline):
    _, _, network, weights, seen = cartpole(count=8, max_steps=24)
    config = reinforce.Config(baseline=baseline)
    batch = reinforce.make_batch(config, network, weights, reinforce.default_hyper(gamma=0.9), seen)
    mask, transition = np.asarray(seen.mask), seen.transition
    next_values = rollout.call(
        network, weights, transition.obs, transition.next_obs, None, (), method="next_value"
    )
    cut = mask[:, -1] & ~np.asarray(transition.terminated[:, -1])
    assert cut.any()
    assert not cut.all()
    for row in range(8):
        length = mask[row].sum()
        total = float(next_values[row, length - 1]) if baseline and cut[row] else 0.0
        for t in reversed(range(length)):
            total = 1.0 + 0.9 * total
            np.testing.assert_allclose(batch.returns[row, t], total, rtol=1e-5)
    values = rollout.call(network, weights, transition.obs, None, ())[1]
    expected = np.where(mask, batch.returns - (values if baseline else 0), 0)
    np.testing.assert_allclose(np.where(mask, batch.advantages, 0), expected, atol=1e-5)


def test_groups_begin_in_one_state():
    env, params = environments.make("CartPole-v1")
    states = grpo.make_initial_states(env, params, KEY, groups=3, size=4)
    obs = np.asarray(states.obs).reshape(3, 4, 4)
    np.testing.assert_array_equal(obs, np.broadcast_to(obs[:, :1], obs.shape))
    assert len(np.unique(obs[:, 0], axis=0)) == 3


def test_what_episodes_have_no_part_in_is_refused():
    env, params = environments.make("CartPole-v1")
    for changes in ({"num_kept": 1}, {"correction": Correction()}):
        config = grpo.Config(update=group.Config(group_size=2, **changes))
        with pytest.raises(UserError, match="neither pruned nor corrected"):
            grpo.make_run(config, env, params)


def test_a_group_of_one_teaches_nothing():
    env, params = environments.make("CartPole-v1")
    config = grpo.Config(
        updates=2, groups=3, max_steps=20, update=group.Config(group_size=1), network=NETWORK
    )
    run, hyper = grpo.make_run(config, env, params), grpo.default_hyper()
    start = run.init(KEY, hyper)
    after, history = run_updates(run, start, hyper, updates=2)
    np.testing.assert_array_equal(history["frac_reward_zero_std"], 1.0)
    for before, now in zip(
        jax.tree.leaves(start.agent.learner.params), jax.tree.leaves(after.agent.learner.params), strict=True
    ):
        np.testing.assert_array_equal(before, now)


def test_steps_count_only_what_was_lived():
    env, params = environments.make("CartPole-v1")
    run = reinforce.make_run(reinforce.Config(updates=3, network=NETWORK), env, params)
    state, history = run_updates(
        run, run.init(KEY, reinforce.default_hyper()), reinforce.default_hyper(), updates=3
    )
    assert int(state.steps) == int(history["episode_length_sum"].sum()) == int(history["steps"][-1])
    assert int(state.steps) < 3 * 8 * 500


def test_conjugate_gradients_solve():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(6, 6)).astype(np.float32)
    matrix, target = jnp.asarray(factor @ factor.T + 6 * np.eye(6, dtype=np.float32)), jnp.arange(6.0)
    solution = trpo.conjugate_gradients(lambda v: matrix @ v, target, iterations=10)
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, target), rtol=1e-3, atol=1e-4)
    nothing = trpo.conjugate_gradients(lambda v: matrix @ v, jnp.zeros(6), iterations=10)
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.slow
def test_a_trust_region_step_is_the_natural_gradient_within_the_region():
    env, _ = environments.make("Pendulum-v1")
    network = networks.make_actor_critic(env, networks.MLP((2,)))
    params, batch = random_batch(env, network, rows=64)
    actor = trpo.init(params, optax.identity(), KEY).actor

    def policy_fn(actor, inputs):
        return rollout.call(network, actor, inputs.obs, inputs.is_first, (), method="act")[0]

    config, hyper = trpo.Config(cg_iterations=60), trpo.default_hyper(target_kl=1e-4)
    after, metrics = trpo.natural_step(policy_fn, config, hyper, actor, batch)
    assert metrics["step_taken"] == 1
    assert float(metrics["surrogate_gain"]) > 0
    assert 0 < float(metrics["kl"]) <= 1e-4
    # Against the Fisher matrix written out: E[score score^T] over states and actions.
    flat, unravel = jax.flatten_util.ravel_pytree(actor)
    gradient = jax.grad(
        lambda p: jnp.mean(
            jnp.exp(policy_fn(unravel(p), batch.inputs).logp(batch.inputs.action) - batch.old_logp)
            * batch.advantages
        )
    )(flat)
    old = policy_fn(actor, batch.inputs)
    fisher = jax.hessian(lambda p: jnp.mean(old.kl(policy_fn(unravel(p), batch.inputs))))(flat)
    natural = np.linalg.solve(fisher + 0.1 * np.eye(len(flat)), gradient)
    moved = np.asarray(jax.flatten_util.ravel_pytree(after)[0] - flat)
    cosine = moved @ natural / np.linalg.norm(moved) / np.linalg.norm(natural)
    assert cosine > 0.999


def test_trpo_refuses_a_shared_body():
    env, params = environments.make("CartPole-v1")
    config = trpo.Config(network=dataclasses.replace(NETWORK, shared=True))
    with pytest.raises(UserError, match="actor and critic share nothing"):
        trpo.make_run(config, env, params)


def score(module, config, hyper):
    env, params = environments.make("CartPole-v1")
    run = module.make_run(config, env, params)

    def one(key):
        state, _ = run_updates(run, run.init(key, hyper), hyper, updates=run.updates)
        return evaluate(run, state, env, params, key, episodes=8, deterministic=True)[0].mean()

    return float(jax.jit(jax.vmap(one), compiler_options=compiler_options())(jax.random.split(KEY, 2)).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "config", "least"),
    [
        (a2c, a2c.Config(total_steps=200_000), 150),
        (reinforce, reinforce.Config(updates=80), 300),
        (trpo, trpo.Config(total_steps=100_000), 200),
        (grpo, grpo.Config(updates=50), 200),
    ],
)
def test_cartpole_is_learned(module, config, least):
    assert score(module, config, module.default_hyper()) > least  # a random policy gets 22
