"""Learned rewards in whole runs, by shapes alone where values need no model; the study's test runs them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import ppo, preference, reward
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.jitted import reward_models
from rlhf_jax.jitted.algorithms import ppo_algorithm
from rlhf_jax.jitted.train import SeedState, TaskSetup, make_train_with_eval
from rlhf_jax.tasks import style

OPTIMIZER = OptimizerConfig(epsilon=1e-4)


@functools.cache
def task_setup():
    task = style.style_task(demonstrations=8)
    config = models.dense_config(
        vocab_size=task.tokenizer.vocab_size, width=8, num_layers=1, num_heads=2, num_kv_heads=1
    )
    return TaskSetup(
        task, models.make_policy(config, None, task.tokenizer), num_prompts=2, num_samples=2, heldout=4
    )


def start():
    return SeedState(
        jax.random.key(0), models.init_params(task_setup().policy.architecture, jax.random.key(0))
    )


def draw(count=8, noise=0.5):
    return reward_models.draw_pairs(task_setup(), start().params, jax.random.key(1), count, noise=noise)


@pytest.mark.slow
def test_a_run_against_an_ensemble_is_traceable_from_end_to_end():
    """Pairs, reward models of three amounts of data, PPO against all of them at once: by shapes alone."""

    def whole(start):
        pairs = draw()
        train = reward_models.make_reward_train(
            task_setup().policy, OPTIMIZER, steps=4, batch_size=4, every=2
        )

        def member(key, count):
            begin = reward_models.RewardSeedState(key, start.params, pairs, pairs)
            return train(begin, reward_models.RewardHyper(count, reward.Hyper()))

        members, seen = jax.vmap(member)(jax.random.split(start.key, 3), jnp.array([2, 4, 8]))
        reward_fn = reward_models.ensemble_reward_fn(
            task_setup().policy, members, lambda scores: scores.min(axis=0)
        )
        learned = dataclasses.replace(task_setup(), reward_fn=reward_fn)
        run = make_train_with_eval(
            learned, ppo_algorithm(learned, ppo.Config(), OPTIMIZER), steps=4, eval_every=2
        )
        return seen, run(start, ppo.Hyper())[1]

    seen, history = jax.eval_shape(whole, start())
    assert {name: leaf.shape for name, leaf in seen.items()} == dict.fromkeys(
        ("loss", "accuracy", "gold_accuracy", "best_step"), (3,)
    )
    assert {name: leaf.shape for name, leaf in history.items()} == dict.fromkeys(
        ("gold", "proxy", "kl", "length"), (3,)
    )


def test_looks_divide_the_steps():
    with pytest.raises(ValueError, match="4 steps cannot be looked at every 3"):
        make_train_with_eval(
            task_setup(), ppo_algorithm(task_setup(), ppo.Config(), OPTIMIZER), steps=4, eval_every=3
        )


@pytest.mark.slow
def test_judges_without_noise_prefer_by_gold_and_with_noise_less_often():
    sure, torn = jax.jit(lambda: (draw(256, 1e-6), draw(256, 1.0)), compiler_options=compiler_options())()
    assert bool(jnp.all(sure.gold_is_chosen))
    assert 0.6 < float(jnp.mean(torn.gold_is_chosen)) < 0.95
    assert not np.array_equal(sure.chosen.tokens, sure.rejected.tokens)


@pytest.mark.slow
def test_reward_models_learn_from_the_first_pairs_alone_and_scores_are_standardised():
    pairs = jax.jit(draw, compiler_options=compiler_options())()
    train = reward_models.make_reward_train(task_setup().policy, OPTIMIZER, steps=8, batch_size=4, every=2)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def fit(pairs, held_out, count):
        begin = reward_models.RewardSeedState(jax.random.key(3), start().params, pairs, held_out)
        hyper = reward_models.RewardHyper(count, reward.Hyper(learning_rate=jnp.float32(3e-2)))
        model, seen = train(begin, hyper)
        both = [
            reward_models.score_sequences(task_setup().policy, model, side)
            for side in (held_out.chosen, held_out.rejected)
        ]
        return model, seen, jnp.concatenate(both)

    model, seen, scores = fit(pairs, pairs, jnp.int32(4))
    assert float(jnp.mean(scores)) == pytest.approx(0, abs=1e-4)
    assert float(jnp.std(scores)) == pytest.approx(1, abs=1e-4)
    assert int(seen["best_step"]) > 0
    assert float(seen["loss"]) < np.log(2)
    other = jax.tree.map(lambda leaf: leaf.at[4:].set(leaf[0]), pairs)  # pairs that do not count
    same, _, _ = fit(other, pairs, jnp.int32(4))
    jax.tree.map(np.testing.assert_array_equal, model, same)


@pytest.mark.slow
def test_dpo_on_stored_pairs_raises_their_margin():
    pairs = jax.jit(draw, compiler_options=compiler_options())()
    method = reward_models.stored_pairs_algorithm(
        task_setup(), preference.Config(), OPTIMIZER, pairs, count=jnp.int32(8)
    )
    run = make_train_with_eval(task_setup(), method, steps=8, eval_every=4)
    hyper = preference.Hyper(learning_rate=jnp.float32(1e-2), beta=jnp.float32(0.5))
    agent, history = jax.jit(run, compiler_options=compiler_options())(start(), hyper)

    def margin(params):
        logps = preference.response_logp(task_setup().logprob_fn, params, pairs.chosen, pairs.rejected)
        return float(jnp.mean(logps[0] - logps[1]))

    assert margin(method.policy(agent)) > margin(start().params) + 0.5
    assert history["kl"].shape == (3,)
    assert abs(float(history["kl"][0])) < 1e-4 < float(history["kl"][-1])
    np.testing.assert_array_equal(history["gold"], history["proxy"])  # a world without a learned reward
