"""PPO: the batch made of sampled answers against loops, learning on a bandit, early stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from rlhf_jax.algorithms import ppo
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import TokenLogprobs

TX = make_optimizer(OptimizerConfig())
LENGTHS = (5, 2, 3, 1)
REWARDS = np.array([1.0, -2.0, 0.5, 3.0])
FINISHED = np.array([True, False, True, False])


def experience():
    """A rollout with a tool's token inside one answer, its score and the reference's log-probs."""
    params = tabular.init()
    sequences = tabular.rows(0, LENGTHS)
    sequences = dataclasses.replace(sequences, mask=sequences.mask.at[0, 2].set(False))
    score = tabular.score(params, sequences)
    ref_logp = tabular.score(tabular.init(1), sequences).logp
    return tabular.rollout(params, sequences, jnp.asarray(FINISHED)), score, ref_logp


def language_batch(config=ppo.Config(), hyper=ppo.Hyper(), state=None, rewards=REWARDS):
    rollout, score, ref_logp = experience()
    state = ppo.init(tabular.init(), TX, jax.random.key(0), hyper) if state is None else state
    return ppo.language_batch(
        config, state, hyper, rollout, score, ref_logp, jnp.asarray(rewards, jnp.float32)
    )


def loops(hyper, rewards=REWARDS):
    """Per-token rewards, advantages and returns from the definition, one token after the other."""
    rollout, score, ref_logp = experience()
    mask = np.asarray(rollout.sequences.mask)
    logp, values, ref_logp = (np.asarray(x, np.float64) for x in (score.logp, score.value, ref_logp))
    token_rewards, advantages, returns = (np.zeros(mask.shape) for _ in range(3))
    for b in range(len(mask)):
        times = np.flatnonzero(mask[b])
        following, next_value = 0.0, 0.0
        for t in times[::-1]:
            token_rewards[b, t] = -hyper.kl_coef * (logp[b, t] - ref_logp[b, t])
            if t == times[-1]:
                token_rewards[b, t] += rewards[b] - hyper.missing_eos_penalty * (not FINISHED[b])
            delta = token_rewards[b, t] + hyper.gamma * next_value - values[b, t]
            advantages[b, t] = following = delta + hyper.gamma * hyper.gae_lambda * following
            next_value, returns[b, t] = values[b, t], advantages[b, t] + values[b, t]
    return token_rewards, advantages, returns, mask


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.8])
def test_rewards_and_advantages_equal_a_loop(gamma, gae_lambda):
    hyper = ppo.Hyper(gamma=gamma, gae_lambda=gae_lambda, kl_coef=0.3, missing_eos_penalty=0.7)
    _, batch, metrics = language_batch(ppo.Config(whiten_advantages=False), hyper)
    token_rewards, advantages, returns, mask = loops(hyper)
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["penalised_reward"], token_rewards.sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["advantage_std"], advantages[mask].std(), rtol=1e-4)
    np.testing.assert_array_equal(batch.mask, mask)


def test_whitened_advantages_have_mean_zero_and_variance_one():
    hyper = ppo.Hyper()
    _, batch, metrics = language_batch(hyper=hyper)
    _, advantages, returns, mask = loops(hyper)
    expected = (advantages - advantages[mask].mean()) / advantages[mask].std()
    np.testing.assert_allclose(batch.advantages, np.where(mask, expected, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["advantage_std"], advantages[mask].std(), rtol=1e-4)


def test_metrics_of_a_batch():
    _, _, metrics = language_batch(hyper=ppo.Hyper(kl_coef=0.2))
    rollout, score, ref_logp = experience()
    mask = np.asarray(rollout.sequences.mask)
    log_ratio = np.where(mask, np.asarray(score.logp - ref_logp), 0)
    expected = {
        "kl": log_ratio.sum(axis=1).mean(),
        "kl_coef": 0.2,
        "reward": REWARDS.mean(),
        "reward_std": REWARDS.std(),
        "length": 2.5,
        "finished": 0.5,
        "sampling_logp_diff": 0.0,
        "tokens": 10,
    }
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, atol=1e-6, err_msg=name)


def test_mismatch_is_the_mean_difference_from_the_sampler():
    rollout, score, ref_logp = experience()
    rollout = dataclasses.replace(rollout, logp=rollout.logp.at[0, 1].add(0.5))
    state = ppo.init(tabular.init(), TX, jax.random.key(0), ppo.Hyper())
    _, _, metrics = ppo.language_batch(
        ppo.Config(), state, ppo.Hyper(), rollout, score, ref_logp, jnp.asarray(REWARDS)
    )
    np.testing.assert_allclose(metrics["sampling_logp_diff"], 0.05, rtol=1e-5)


@pytest.mark.parametrize(("target", "direction"), [(1e-3, 1), (1e3, -1)])
def test_the_kl_controller_moves_the_right_way_from_one_batch_to_the_next(target, direction):
    hyper = ppo.Hyper(kl_coef=0.1, kl_target=target, kl_horizon=40.0)
    _, _, metrics = language_batch(hyper=hyper)
    assert float(metrics["kl"]) > 1e-3
    state, _, metrics = language_batch(ppo.Config(adaptive_kl=True), hyper)
    np.testing.assert_allclose(metrics["kl_coef"], 0.1)  # this batch was made with the coefficient before
    np.testing.assert_allclose(state.kl_coef, 0.1 * (1 + direction * 0.2 * 4 / 40), rtol=1e-5)
    _, _, metrics = language_batch(ppo.Config(adaptive_kl=True), hyper, state)
    np.testing.assert_allclose(metrics["kl_coef"], state.kl_coef)
    fixed, _, _ = language_batch(hyper=hyper)
    np.testing.assert_allclose(fixed.kl_coef, 0.1)


def test_scaled_rewards_are_divided_by_the_deviation_of_all_seen():
    config, hyper = ppo.Config(scale_rewards=True, whiten_advantages=False), ppo.Hyper()
    state, batch, metrics = language_batch(config, hyper)
    _, advantages, _, _ = loops(hyper, REWARDS / REWARDS.std())
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["reward"], REWARDS.mean(), rtol=1e-5)  # as it was given
    later = np.array([10.0, 11.0, 12.0, 13.0])
    _, batch, _ = language_batch(config, hyper, state, later)
    _, advantages, _, _ = loops(hyper, later / np.concatenate([REWARDS, later]).std())
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1])
def test_rewards_that_are_all_equal_are_not_blown_up(constant):
    config, hyper = ppo.Config(scale_rewards=True, whiten_advantages=False), ppo.Hyper()
    _, batch, _ = language_batch(config, hyper, rewards=np.full(4, constant))
    _, advantages, _, _ = loops(hyper, np.full(4, constant))
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spoilt", [1e25, 1e14, np.inf, np.nan])
def test_one_absurd_reward_does_not_make_later_ones_nothing(spoilt):
    """The scale is soon again that of the rewards, and the state stays one that a run can go on from."""
    config, hyper = ppo.Config(scale_rewards=True, whiten_advantages=False), ppo.Hyper()
    step = jax.jit(lambda state, rewards: language_batch(config, hyper, state, rewards))
    state, _, _ = step(ppo.init(tabular.init(), TX, jax.random.key(0), hyper), REWARDS)
    state, _, metrics = step(state, np.array([*REWARDS[:3], spoilt]))
    assert np.isfinite([state.reward_moments.mean, state.reward_moments.squares]).all()
    assert metrics["reward_outliers"] == 0.25
    for _ in range(500):
        state, _, metrics = step(state, REWARDS)
    deviation = float(np.sqrt(state.reward_moments.squares / state.reward_moments.count))
    assert REWARDS.std() * 0.9 < deviation < REWARDS.std() * 100
    assert metrics["reward_outliers"] == 0


# Learning -----------------------------------------------------------------------------------------------

PAYS = jnp.array([0.0, 0.2, 0.4, 1.0, 0.1])


def bandit_score(params, actions):
    logp = jax.nn.log_softmax(params["logits"])
    shape = actions.shape
    entropy = jnp.broadcast_to(-jnp.sum(jnp.exp(logp) * logp), shape)
    return TokenLogprobs(logp[actions], entropy, jnp.broadcast_to(params["value"], shape))


def make_bandit_step(config, hyper):
    update = jax.jit(ppo.make_update(config, bandit_score, TX))

    def step(state, key):
        params = state.learner.params
        actions = jax.random.categorical(key, params["logits"], shape=(32, 1))
        score, rewards = bandit_score(params, actions), PAYS[actions]
        batch = ppo.Batch(
            actions, jnp.ones((32, 1), bool), score.logp, score.value, rewards - score.value, rewards
        )
        state, metrics = update(state, hyper, batch)
        return state, {**metrics, "reward": jnp.mean(rewards)}

    return step


def bandit_state(hyper):
    return ppo.init({"logits": jnp.zeros(5), "value": jnp.zeros(())}, TX, jax.random.key(0), hyper)


def test_ppo_finds_the_arm_that_pays_and_its_value():
    hyper = ppo.Hyper(learning_rate=0.05)
    step, keys = (
        make_bandit_step(ppo.Config(num_ppo_epochs=2, num_minibatches=2), hyper),
        jax.random.split(jax.random.key(1), 100),
    )
    state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, keys))(bandit_state(hyper))
    assert metrics["reward"][:5].mean() < 0.5
    assert metrics["reward"][-10:].mean() > 0.9
    np.testing.assert_allclose(state.learner.params["value"], 1.0, atol=0.1)
    assert int(state.learner.steps) == 400
    assert metrics["entropy"][-1] < 0.5 < metrics["entropy"][0]


@pytest.mark.slow
def test_a_penalty_holds_back_and_none_is_no_clip():
    start, key = bandit_state(ppo.Hyper()), jax.random.key(2)

    def run(policy_loss_fn, **numbers):
        config = ppo.Config(num_ppo_epochs=8, num_minibatches=2, policy_loss_fn=policy_loss_fn)
        hyper = jax.tree.map(jnp.float32, ppo.Hyper(learning_rate=0.2, **numbers))
        state, _ = jax.jit(make_bandit_step(config, hyper))(start, key)
        return state.learner.params["logits"]

    free = run(ppo.penalized, penalty_coef=0.0)
    np.testing.assert_allclose(free, run(ppo.clipped, epsilon_low=1.0, epsilon_high=jnp.inf), rtol=1e-5)
    assert jnp.abs(run(ppo.penalized, penalty_coef=10.0)).max() < 0.3 * jnp.abs(free).max()


@pytest.mark.slow
def test_max_kl_ends_the_update_before_it_goes_too_far():
    free, bound = ppo.Hyper(learning_rate=0.2), ppo.Hyper(learning_rate=0.2, target_kl=0.02)
    config = ppo.Config(num_ppo_epochs=8, num_minibatches=2)
    key, start = jax.random.key(2), bandit_state(free)

    @jax.jit
    def run(hyper):
        return make_bandit_step(config, hyper)(start, key)

    def drift(state):
        logp = jax.nn.log_softmax(state.learner.params["logits"])
        return float(jnp.sum(0.2 * (jnp.log(0.2) - logp)))

    (far, far_metrics), (near, near_metrics) = run(free), run(bound)
    assert int(far.learner.steps) == 16
    assert float(far_metrics["epochs_done"]) == 8.0
    steps = int(near.learner.steps)
    assert 0 < steps < 16
    # Steps were taken in order until one asked to stop, which was undone.
    np.testing.assert_allclose(near_metrics["epochs_done"], 8 * steps / 16)
    assert drift(near) < drift(far)
    again, metrics = run(ppo.Hyper(learning_rate=0.2, target_kl=-1.0))
    jax.tree.map(np.testing.assert_array_equal, again.learner, start.learner)
    assert float(metrics["epochs_done"]) == 0.0
