"""GRPO: advantages of groups, what teaches nothing, and REINFORCE as its on-policy case."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular

from rlhf_jax.algorithms import grpo
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.kernels.advantages import leave_one_out_advantages
from rlhf_jax.losses.policy import reinforce_loss
from rlhf_jax.losses.reductions import constant_length, sequence_mean, token_mean

LENGTHS = (1, 5, 2, 4, 3, 3)
REWARDS = jnp.array([1.0, 0.0, 0.0, 2.0, 2.0, 2.0])
PLAIN = grpo.Hyper(learning_rate=1.0, kl_coef=0.0)


def make_batch(config=grpo.Config(group_size=3), rewards=REWARDS, ref=True):
    params, sequences = tabular.init(), tabular.rows(0, LENGTHS)
    rollout = tabular.rollout(params, sequences, jnp.array([True, True, False, True, True, True]))
    logp = tabular.score(params, sequences).logp
    ref_logp = tabular.score(tabular.init(1), sequences).logp if ref else None
    return grpo.make_batch(config, PLAIN, rollout, rewards, logp, ref_logp)


def one_step(config, hyper, batch, tx):
    update = jax.jit(grpo.make_update(config, tabular.score, tx))
    state, metrics = update(grpo.init(tabular.init(), tx, jax.random.key(0)), hyper, batch)
    return state.learner.params, metrics


def test_advantages_compare_the_answers_of_one_group():
    batch, metrics = make_batch()
    first = np.array([1.0, 0, 0])
    expected = (first - first.mean()) / (first.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(batch.advantages, [*expected, 0, 0, 0], rtol=1e-5, atol=1e-6)
    logp, ref_logp, mask = (np.asarray(x) for x in (batch.old_logp, batch.ref_logp, batch.sequences.mask))
    numbers = {
        "reward": 7 / 6,
        "reward_std": np.std([1, 0, 0, 2, 2, 2]),
        "frac_reward_zero_std": 0.5,
        "length": 3.0,
        "finished": 5 / 6,
        "sampling_logp_diff": 0.0,
        "tokens": 18,
        "kl": np.where(mask, logp - ref_logp, 0).sum() / 6,
    }
    for name, number in numbers.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, atol=1e-6, err_msg=name)


def test_another_advantage_function_is_a_field():
    config = grpo.Config(group_size=3, advantage_fn=lambda g: leave_one_out_advantages(g.rewards))
    batch, _ = make_batch(config)
    np.testing.assert_allclose(batch.advantages, [1, -0.5, -0.5, 0, 0, 0], atol=1e-6)


def test_groups_whose_rewards_are_equal_teach_nothing():
    batch, metrics = make_batch(rewards=jnp.full(6, 0.7))
    assert float(metrics["frac_reward_zero_std"]) == 1.0
    params, metrics = one_step(grpo.Config(group_size=3), PLAIN, batch, optax.identity())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, tabular.init())
    assert float(metrics["gradient_norm"]) < 1e-4


@pytest.mark.parametrize(
    "reduce", [sequence_mean, token_mean, constant_length(5)], ids=["seq", "token", "len"]
)
def test_on_policy_it_is_reinforce_with_the_same_advantages(reduce):
    with jax.enable_x64(True):
        params, sequences = tabular.init(0, jnp.float64), tabular.rows(0, LENGTHS)
        old_logp = tabular.score(params, sequences).logp
        advantages = jnp.asarray([1.0, -0.5, -0.5, 0.3, 0.3, -0.6])
        batch = grpo.Batch(sequences, old_logp, None, advantages)

        def reinforce(params):
            logp = tabular.score(params, sequences).logp
            return reinforce_loss(logp, old_logp, advantages, sequences.mask, reduce=reduce)[0]

        tx = optax.identity()
        update = jax.jit(grpo.make_update(grpo.Config(reduce=reduce), tabular.score, tx))
        state, metrics = update(grpo.init(params, tx, jax.random.key(0)), PLAIN, batch)
        expected = jax.tree.map(lambda p, g: p - g, params, jax.grad(reinforce)(params))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), state.learner.params, expected
        )
        assert float(metrics["gradient_norm"]) > 0.01
        assert float(metrics["kl_loss"]) == 0.0


def test_the_kl_term_alone_pulls_towards_the_reference():
    sequences = tabular.rows(0, LENGTHS)
    batch, _ = make_batch(rewards=jnp.zeros(6))
    tx = make_optimizer(OptimizerConfig())
    update = jax.jit(grpo.make_update(grpo.Config(group_size=3), tabular.score, tx))
    state, distances = grpo.init(tabular.init(), tx, jax.random.key(0)), []
    for _ in range(30):
        state, metrics = update(state, grpo.Hyper(learning_rate=0.05, kl_coef=1.0), batch)
        distances.append(float(metrics["kl_loss"]))
    assert distances[-1] < 0.2 * distances[0]
    logp = tabular.score(state.learner.params, sequences).logp
    gap, old_gap = (jnp.nanmean(jnp.abs(x - batch.ref_logp)) for x in (logp, batch.old_logp))
    assert gap < 0.5 * old_gap


def test_without_a_reference_there_is_no_kl():
    batch, metrics = make_batch(ref=False)
    assert "kl" not in metrics
    _, metrics = one_step(grpo.Config(group_size=3), PLAIN, batch, optax.identity())
    assert float(metrics["kl_loss"]) == 0.0


def test_answers_that_are_rewarded_become_likely():
    """Single-token answers, 8 to each prompt token; a reward for repeating the prompt."""
    tx, config = (
        make_optimizer(OptimizerConfig()),
        grpo.Config(group_size=8, num_iterations=2, num_minibatches=2),
    )
    update = jax.jit(grpo.make_update(config, tabular.score, tx))
    hyper = grpo.Hyper(learning_rate=0.05)
    reference = tabular.init()
    prompts = jnp.repeat(jnp.arange(tabular.VOCAB), 8)

    def step(state, key):
        params = state.learner.params
        answers = jax.random.categorical(key, params["logits"][prompts])
        frame = tabular.rows(0, [1] * 40, width=2)
        sequences = type(frame)(
            jnp.stack([prompts, answers], axis=1), frame.positions, frame.segment_ids, frame.mask
        )
        rewards = (answers == prompts).astype(jnp.float32)
        score = tabular.score(params, sequences)
        rollout = tabular.rollout(params, sequences, jnp.ones(40, bool))
        batch, described = grpo.make_batch(
            config, hyper, rollout, rewards, score.logp, tabular.score(reference, sequences).logp
        )
        state, metrics = update(state, hyper, batch)
        return state, {**described, **metrics}

    keys = jax.random.split(jax.random.key(3), 80)
    state = grpo.init(tabular.init(), tx, jax.random.key(0))
    state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
    assert metrics["reward"][:3].mean() < 0.5
    assert metrics["reward"][-10:].mean() > 0.9
    np.testing.assert_allclose(metrics["kl"][0], 0, atol=1e-6)
    assert metrics["kl"][-1] > 0.1
