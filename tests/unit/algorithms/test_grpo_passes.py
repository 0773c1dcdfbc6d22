"""A step of GRPO scores the answers no more often than it must, and comes out as if it did."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax.algorithms import grpo, grpo_variants
from rlhf_jax.core.errors import UserError
from rlhf_jax.rollout.step import make_grpo_train_step, whole_reference

LENGTHS = (1, 5, 2, 4, 3, 3, 5, 1)
REWARDS = np.array([1.0, 0.0, 0.5, -1.0, 0.2, 0.9, -0.3, 0.4])
NAMES = sorted(grpo_variants.grpo_variants())
TX = optax.sgd(1.0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def step_of(config, hyper, *, reference_fn=whole_reference, score=tabular.score, rows=slice(None), steps=1):
    """(parameters, metrics) after steps on the same answers, whose sampler is a little off."""
    start = tabular.init(0, jnp.float64)
    sequences = jax.tree.map(lambda leaf: leaf[rows], tabular.rows(1, LENGTHS))
    rollout = tabular.rollout(start, sequences, jnp.ones(len(sequences.tokens), bool))
    off = jnp.sin(jnp.arange(rollout.logp.size, dtype=jnp.float64)).reshape(rollout.logp.shape)
    rollout = dataclasses.replace(rollout, logp=rollout.logp + 0.1 * off)
    step = jax.jit(make_grpo_train_step(config, score, TX, reference_fn))
    state = grpo.init(start, TX, jax.random.key(0), hyper=hyper)
    values = jnp.zeros(len(sequences.tokens) // config.group_size)
    for _ in range(steps):
        state, metrics = step(
            state,
            hyper,
            tabular.init(7, jnp.float64),
            rollout,
            jnp.asarray(REWARDS)[rows],
            greedy_rewards=values,
            reward_terms=jnp.asarray(REWARDS)[rows, None],
            values=values,
        )
    return state, metrics


@pytest.mark.parametrize("name", few(NAMES, "grpo", "kl_cov", "clip_cov"))
def test_old_log_probs_of_the_update_itself_are_those_of_a_pass_before(monkeypatch, name):
    variant = grpo_variants.make_variant(name, group_size=4, max_completion_length=6)
    config = variant.config
    if not config.one_pass:
        pytest.skip("prunes or replays answers")
    hyper = dataclasses.replace(variant.hyper, learning_rate=jnp.asarray(0.5), entropy_coef=0.01)
    if variant.needs_terms:
        hyper = dataclasses.replace(hyper, reward_weights=jnp.ones(1))
    found, metrics = step_of(config, hyper, steps=2)
    monkeypatch.setattr(grpo.Config, "one_pass", False)
    expected, expected_metrics = step_of(config, hyper, steps=2)
    assert found.learner.params["logits"].dtype == jnp.float64
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        found.learner.params,
        expected.learner.params,
    )
    assert jnp.array_equal(jax.random.key_data(found.key), jax.random.key_data(expected.key))
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("changes", "reference_fn", "passes"),
    [
        ({}, None, 1),
        ({}, whole_reference, 2),
        ({"num_iterations": 2}, None, 2),
        ({"micro_batches": 2}, None, 2),
    ],
)
def test_as_many_passes_as_must_be(changes, reference_fn, passes):
    traced = []

    def score(params, sequences):
        traced.append(len(sequences.tokens))
        return tabular.score(params, sequences)

    config = grpo.Config(group_size=4, **changes)
    _, metrics = step_of(config, grpo.Hyper(kl_coef=0.0), reference_fn=reference_fn, score=score)
    assert len(set(traced)) == 1 + (config.micro_batches > 1)
    # A loop's body may be traced twice.
    assert len(traced) == passes or (not config.one_pass and len(traced) > passes)
    assert ("kl" in metrics) == (reference_fn is not None)


def test_without_a_reference_the_answers_are_learned_from_as_with_weight_zero():
    config, hyper = grpo.Config(group_size=4), grpo.Hyper(kl_coef=0.0, learning_rate=0.5)
    alone, beside = (step_of(config, hyper, reference_fn=fn)[0] for fn in (None, whole_reference))
    np.testing.assert_allclose(
        alone.learner.params["logits"], beside.learner.params["logits"], rtol=0, atol=1e-12
    )


def test_a_target_for_the_kl_needs_a_reference():
    with pytest.raises(UserError, match="give the train step a reference_fn"):
        step_of(grpo.Config(group_size=4), grpo.Hyper(kl_target=1.0), reference_fn=None)
