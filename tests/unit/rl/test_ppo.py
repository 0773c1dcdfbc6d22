import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import ppo as shared
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import ppo, ppo_penalty
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import RolloutConfig
from rlhf_jax.rl.loops.runs import run_updates
from rlhf_jax.rl.networks import networks

SMALL = ppo.Config(
    total_steps=4 * 64,
    rollout=RolloutConfig(num_envs=2, num_steps=32, normalize_obs=True, normalize_rewards=True),
    network=NetworkConfig(encoder=networks.MLP((8,))),
    update=shared.Config(num_ppo_epochs=2, num_minibatches=2),
)
KEYS = jax.random.split(jax.random.key(0), 3)


def leaves(tree):
    raw = jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(raw)]


@pytest.mark.slow
def test_each_seed_of_many_is_the_run_alone():
    env, params = environments.make("CartPole-v1")
    train, hyper = ppo.make_train(SMALL, env, params), ppo.default_hyper()
    _, many = jax.jit(jax.vmap(train, (0, None)), compiler_options=compiler_options())(KEYS, hyper)
    _, alone = jax.jit(train, compiler_options=compiler_options())(KEYS[1], hyper)
    for name, values in alone.items():
        np.testing.assert_allclose(many[name][1], values, rtol=2e-3, atol=2e-4, err_msg=name)
    assert many["loss"].shape == (3, 4)


@pytest.mark.slow
def test_every_number_can_be_swept():
    env, params = environments.make("CartPole-v1")
    train = ppo.make_train(SMALL, env, params)
    hypers = jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), ppo.default_hyper(target_kl=1.0))
    _, history = jax.eval_shape(jax.vmap(train, (None, 0)), KEYS[0], hypers)
    assert history["loss"].shape == (2, 4)


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    env, params = environments.make("CartPole-v1")
    network = NetworkConfig(networks.MLP((8,)), memory_width=8)
    run = ppo.make_run(dataclasses.replace(SMALL, network=network), env, params)
    hyper = ppo.default_hyper()
    two = jax.jit(lambda state: run_updates(run, state, hyper, updates=2)[0])
    start = jax.jit(run.init)(KEYS[0], hyper)
    half = two(start)
    straight = two(half)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, half, wait=True)
        restored = manager.restore(jax.eval_shape(run.init, KEYS[0], hyper))[1]
    for resumed, expected in zip(leaves(two(restored)), leaves(straight), strict=True):
        np.testing.assert_array_equal(resumed, expected)


def test_too_few_steps_are_one_sentence():
    env, params = environments.make("CartPole-v1")
    with pytest.raises(UserError, match="total_steps=63 is less than one rollout"):
        ppo.make_run(dataclasses.replace(SMALL, total_steps=63), env, params)


def test_penalty_coefficient_follows_the_rule():
    for kl, factor in [(0.016, 2.0), (0.0149, 1.0), (0.0067, 1.0), (0.0066, 0.5), (np.nan, 1.0)]:
        assert float(ppo_penalty.next_penalty(3.0, jnp.float32(kl), target=0.01)) == 3.0 * factor


def test_penalty_coefficient_can_find_back():
    least = ppo_penalty.next_penalty(1e-4, jnp.float32(0.0), target=0.01)
    assert float(least) == pytest.approx(1e-4)
    assert float(ppo_penalty.next_penalty(least, jnp.float32(1.0), target=0.01)) == pytest.approx(2e-4)


@pytest.mark.slow
def test_penalty_holds_the_policy_back():
    env, params = environments.make("CartPole-v1")
    hypers = jax.vmap(lambda coef: ppo_penalty.default_hyper(kl_coef=coef, learning_rate=1e-2))
    config = dataclasses.replace(SMALL, total_steps=64)
    train = jax.vmap(ppo_penalty.make_train(config, env, params), (None, 0))
    _, history = jax.jit(train, compiler_options=compiler_options())(
        KEYS[0], hypers(jnp.array([1e-4, 1000.0]))
    )
    free, held = history["kl"][:, 0]
    assert float(held) < 0.3 * float(free)


@pytest.mark.slow
def test_cartpole_is_learned():
    env, params = environments.make("CartPole-v1")
    run = ppo.make_run(ppo.Config(total_steps=100_000), env, params)

    def score(key):
        hyper = ppo.default_hyper()
        state, _ = run_updates(run, run.init(key, hyper), hyper, updates=run.updates)
        return evaluate(run, state, env, params, key, episodes=16, deterministic=True)[0].mean()

    scores = jax.jit(jax.vmap(score), compiler_options=compiler_options())(
        jax.random.split(jax.random.key(0), 4)
    )
    assert float(scores.mean()) > 350  # a random policy gets 22


@pytest.mark.slow
def test_pendulum_is_learned_with_the_bootstrap_alone():
    env, params = environments.make("Pendulum-v1")
    config = ppo.Config(
        total_steps=300_000,
        rollout=RolloutConfig(num_envs=16, num_steps=128),
        update=shared.Config(num_ppo_epochs=10, num_minibatches=16),
    )
    hyper = ppo.default_hyper(learning_rate=1e-3, entropy_coef=0.0, cliprange_value=jnp.inf)

    def score(bootstrap):
        rollout = dataclasses.replace(config.rollout, bootstrap_truncation=bootstrap)
        run = ppo.make_run(dataclasses.replace(config, rollout=rollout), env, params)

        def one(key):
            state = run_updates(run, run.init(key, hyper), hyper, updates=run.updates)[0]
            return evaluate(run, state, env, params, key, episodes=32, deterministic=True)[0].mean()

        keys = jax.random.split(jax.random.key(1), 2)
        return float(jax.jit(jax.vmap(one), compiler_options=compiler_options())(keys).mean())

    # A random policy gets about -1200. Taking the cut at 200 steps for an end hides most of what is to come.
    assert score(False) < -500 < -300 < score(True)
