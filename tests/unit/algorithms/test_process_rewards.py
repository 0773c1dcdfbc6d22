"""Process rewards in PPO and GRPO against loops over tokens, beside rewards of whole answers and alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular

from rlhf_jax import kernels
from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.core.types import StepRewards

PLAIN = optax.identity()
LENGTHS = (5, 2, 3, 1, 4, 4)
REWARDS = np.array([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
SCORED = np.array([True, True, False, True, True, True])
ENDS = np.zeros((6, 6), bool)
for _row, _columns in enumerate([(2, 5), (1, 2), (2, 3), (), (1, 3, 4), (4,)]):
    ENDS[_row, list(_columns)] = True
STEP_REWARDS = np.where(ENDS, np.random.default_rng(0).random(ENDS.shape), np.nan)
STEPS = StepRewards(jnp.asarray(STEP_REWARDS, jnp.float32), jnp.asarray(ENDS))


def experience():
    params, sequences = tabular.init(), tabular.rows(0, LENGTHS)
    sequences = dataclasses.replace(sequences, mask=sequences.mask.at[0, 3].set(False))  # a tool's token
    score, ref_logp = tabular.score(params, sequences), tabular.score(tabular.init(1), sequences).logp
    return tabular.rollout(params, sequences, jnp.ones(len(LENGTHS), bool)), score, ref_logp


def ppo_batch(steps=STEPS, rewards=REWARDS, config=ppo.Config(whiten_advantages=False), **hyper):
    rollout, score, ref_logp = experience()
    hyper = ppo.Hyper(kl_coef=0.3, **hyper)
    state = ppo.init(tabular.init(), PLAIN, jax.random.key(0), hyper)
    given = jnp.asarray(rewards, jnp.float32)
    return ppo.language_batch(
        config, state, hyper, rollout, score, ref_logp, given, scored=jnp.asarray(SCORED), steps=steps
    )


def ppo_loop(policy_lambda, value_lambda, rewards=REWARDS):
    """Advantages and returns of the scored rows; lambdas are functions of the length."""
    rollout, score, ref_logp = experience()
    mask = np.asarray(rollout.sequences.mask) & SCORED[:, None]
    logp, values, ref_logp = (np.asarray(x, np.float64) for x in (score.logp, score.value, ref_logp))
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        times = np.flatnonzero(mask[b])
        ahead = {"policy": 0.0, "value": 0.0}
        next_value = 0.0
        for t in times[::-1]:
            earned = -0.3 * (logp[b, t] - ref_logp[b, t])
            earned += rewards[b] if t == times[-1] else 0
            earned += STEP_REWARDS[b, t] if ENDS[b, t] else 0
            delta = earned + 0.9 * next_value - values[b, t]
            ahead["policy"] = delta + 0.9 * policy_lambda(len(times)) * ahead["policy"]
            ahead["value"] = delta + 0.9 * value_lambda(len(times)) * ahead["value"]
            advantages[b, t], returns[b, t] = ahead["policy"], ahead["value"] + values[b, t]
            next_value = values[b, t]
    return advantages, returns


@pytest.mark.slow
def test_ppo_earns_the_reward_of_a_step_where_it_ends():
    _, batch, metrics = ppo_batch(gamma=0.9, gae_lambda=0.8)
    advantages, returns = ppo_loop(lambda _: 0.8, lambda _: 0.8)
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)
    counted = ENDS & np.asarray(batch.mask)
    assert counted.sum() == 8
    np.testing.assert_allclose(metrics["step_reward"], STEP_REWARDS[counted].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["steps"], 8 / 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward"], REWARDS[SCORED].mean(), rtol=1e-5)


def test_critic_and_actor_have_lambdas_of_their_own():
    _, batch, _ = ppo_batch(gamma=0.9, gae_lambda=0.5, critic_gae_lambda=1.0)
    advantages, returns = ppo_loop(lambda _: 0.5, lambda _: 1.0)
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)


def test_lambda_follows_the_length_of_an_answer():
    _, batch, _ = ppo_batch(gamma=0.9, gae_lambda=0.7, gae_alpha=0.5)
    advantages, returns = ppo_loop(lambda length: max(1 - 1 / (0.5 * length), 0), lambda _: 0.7)
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)


def test_rewards_are_scaled_by_the_deviation_of_all_that_an_answer_earns():
    config = ppo.Config(whiten_advantages=False, scale_rewards=True)
    state, batch, _ = ppo_batch(config=config, gae_lambda=1.0)
    counted = ENDS & np.asarray(batch.mask)
    earned = REWARDS + np.where(counted, STEP_REWARDS, 0).sum(axis=1)
    scale = earned[SCORED].std()
    np.testing.assert_allclose(state.reward_moments.mean, earned[SCORED].mean(), rtol=1e-5)
    halved = StepRewards(STEPS.rewards / scale, STEPS.ends)
    _, expected, _ = ppo_batch(halved, REWARDS / scale, gae_lambda=1.0)
    np.testing.assert_allclose(batch.returns, expected.returns, rtol=1e-4, atol=1e-5)


def group_batch(steps, rewards=REWARDS):
    rollout, score, ref_logp = experience()
    config, hyper = grpo.Config(group_size=3), grpo.Hyper()
    arrays = (rollout, jnp.asarray(rewards, jnp.float32), score.logp, ref_logp)
    return grpo.make_batch(config, hyper, *arrays, scored=jnp.asarray(SCORED), steps=steps)


def test_grpo_adds_the_advantages_of_steps_to_those_of_answers():
    batch, metrics = group_batch(STEPS)
    alone, _ = group_batch(None)
    mask = np.asarray(batch.sequences.mask)
    of_steps = np.zeros(mask.shape)
    for group in (range(3), range(3, 6)):
        every = [STEP_REWARDS[b, t] for b in group for t in range(6) if ENDS[b, t] and mask[b, t]]
        for b in group:
            for t in np.flatnonzero(mask[b]):
                later = [STEP_REWARDS[b, s] for s in range(t, 6) if ENDS[b, s] and mask[b, s]]
                of_steps[b, t] = (np.sum(later) - len(later) * np.mean(every)) / (
                    np.std(every, ddof=1) + 1e-4
                )
    expected = of_steps + np.asarray(alone.advantages)[:, None] * mask
    np.testing.assert_allclose(np.where(mask, batch.advantages, 0), expected, rtol=1e-4, atol=1e-5)
    assert not np.asarray(batch.advantages)[~SCORED].any()
    np.testing.assert_allclose(metrics["steps"], 8 / 5, rtol=1e-5)


def test_a_group_whose_answers_differ_in_their_steps_alone_is_not_idle():
    equal = np.ones(6)
    assert float(group_batch(None, equal)[1]["frac_reward_zero_std"]) == 1
    batch, metrics = group_batch(STEPS, equal)
    assert float(metrics["frac_reward_zero_std"]) == 0
    assert np.abs(np.asarray(batch.advantages)).max() > 0.5


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_stands_where_no_step_ends_does_not_matter(algorithm):
    make = {"ppo": lambda steps: ppo_batch(steps)[1], "grpo": lambda steps: group_batch(steps)[0]}[algorithm]
    clean = StepRewards(jnp.where(STEPS.ends, STEPS.rewards, 0.0), STEPS.ends)
    found, expected = make(STEPS), make(clean)
    np.testing.assert_array_equal(found.advantages, expected.advantages)
    assert np.isfinite(np.asarray(found.advantages)).all()


def test_numbers_of_the_estimates_are_traced_and_have_an_effect():
    rollout, score, ref_logp = experience()

    @jax.jit
    def make(hyper, order):
        state = ppo.init(tabular.init(), PLAIN, jax.random.key(0), hyper)
        given = (rollout, score, ref_logp, jnp.asarray(REWARDS, jnp.float32), jnp.asarray(SCORED), STEPS)
        *arrays, scored, steps = jax.tree.map(lambda x: x[order], given)
        batch = ppo.language_batch(ppo.Config(), state, hyper, *arrays, scored=scored, steps=steps)[1]
        return batch.advantages, batch.returns, batch.positive

    order = jnp.arange(len(LENGTHS))
    numbers = {"critic_gae_lambda": 0.9, "gae_alpha": 0.5, "positive_lm_coef": 0.1, "positive_threshold": 0.0}
    hyper = jax.tree.map(jnp.float32, ppo.Hyper(**numbers))
    expected = make(hyper, order)
    changes = {"critic_gae_lambda": 0.5, "gae_alpha": 2.0, "positive_threshold": 2.0}
    for (name, value), place in zip(changes.items(), (1, 0, 2), strict=True):
        found = make(dataclasses.replace(hyper, **{name: jnp.float32(value)}), order)
        same = [np.array_equal(a, b) for a, b in zip(found, expected, strict=True)]
        assert same == [number != place for number in range(3)], name
    turned = make(hyper, order[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, rtol=1e-4, atol=1e-5), turned, expected)
    assert make._cache_size() == 1


# Learning ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_reward_tells_which_step_was_wrong():
    """Two tokens are two steps; with process rewards only the one that was wrong becomes less likely."""
    logits = jnp.zeros((tabular.VOCAB, tabular.VOCAB))
    rows = tabular.rows(0, (2,) * 8)
    tokens = jnp.zeros((8, 6), jnp.int32).at[:, 1].set(1).at[:, 2].set(jnp.array([2, 3] * 4))
    sequences = dataclasses.replace(rows, tokens=tokens)
    params = {"logits": logits, "value": jnp.zeros(tabular.VOCAB)}
    rollout = tabular.rollout(params, sequences, jnp.ones(8, bool))
    right = jnp.where(sequences.tokens == 3, 0.0, 1.0)  # the step 3 is wrong
    logp = rollout.logp
    config = grpo.Config(group_size=8)
    batch, _ = grpo.make_batch(
        config, grpo.Hyper(), rollout, jnp.zeros(8), logp, logp, steps=StepRewards(right, sequences.mask)
    )
    state = grpo.init(params, PLAIN, jax.random.key(0))
    update = jax.jit(grpo.make_update(config, tabular.score, PLAIN))
    state, _ = update(state, grpo.Hyper(learning_rate=1.0), batch)
    moved = state.learner.params["logits"]
    assert moved[1, 2] > 0 > moved[1, 3]
    assert update._cache_size() == 1
    np.testing.assert_allclose(moved[0, 1], 0, atol=0.05)  # the first step was right in every answer


# Right answers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_right_answers_are_imitated_with_their_weight():
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1, micro_batches=3)

    def update(**numbers):
        _, batch, _ = ppo_batch(config=config, **numbers)
        hyper = ppo.Hyper(learning_rate=0.1, **numbers)
        state = ppo.init(tabular.init(), PLAIN, jax.random.key(0), hyper)
        state, metrics = jax.jit(ppo.make_update(config, tabular.score, PLAIN))(state, hyper, batch)
        return state.learner.params["logits"], metrics, batch

    plain, _, without = update()
    both, metrics, batch = update(positive_lm_coef=2.0, positive_threshold=0.5)
    assert without.positive is None
    right = SCORED & (REWARDS > 0.5)
    np.testing.assert_array_equal(batch.positive, right)
    mask = np.asarray(batch.mask) & right[:, None]
    logits, tokens = np.asarray(tabular.init()["logits"], np.float64), np.asarray(batch.inputs.tokens)
    gradient, loss = np.zeros(logits.shape), 0.0
    for row, column in zip(*np.nonzero(mask), strict=True):
        before, token = tokens[row, column - 1], tokens[row, column]
        chances = np.exp(logits[before]) / np.exp(logits[before]).sum()
        gradient[before] += (chances - np.eye(tabular.VOCAB)[token]) / mask.sum()
        loss -= np.log(chances[token]) / mask.sum()
    np.testing.assert_allclose(both, plain - 0.1 * 2.0 * gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["positive_lm_loss"], loss, rtol=1e-4)


def test_weights_of_temporal_differences_sum_to_a_share_of_the_length():
    lengths = np.array([40, 100, 1000, 3])
    mask = jnp.asarray(np.arange(1000) < lengths[:, None])
    found = np.asarray(kernels.length_adaptive_lambda(mask, alpha=0.05), np.float64)[:, 0]
    np.testing.assert_allclose(1 / (1 - found), [2, 5, 50, 1], rtol=1e-3)
