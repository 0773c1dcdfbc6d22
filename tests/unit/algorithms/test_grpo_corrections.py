"""Off-policy corrections and masks in updates of the GRPO family: where they act, and their laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax.algorithms import grpo, grpo_variants
from rlhf_jax.core.errors import UserError
from rlhf_jax.losses.corrections import Correction
from rlhf_jax.rollout.step import make_grpo_train_step

LENGTHS = (1, 5, 2, 4, 3, 3, 5, 1)
G = 4
REWARDS = np.array([1.0, 0.0, 0.5, -1.0, 0.2, 0.9, -0.3, 0.4])
TX = optax.identity()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def answers(rows=slice(None)):
    """(rollout of a sampler that is off, score): NaN wherever nothing counts."""
    params = tabular.init(0, jnp.float64)
    sequences = jax.tree.map(lambda leaf: leaf[rows], tabular.rows(1, LENGTHS))
    rollout = tabular.rollout(params, sequences, jnp.ones(len(sequences.tokens), bool))
    noise = np.random.default_rng(3).normal(size=(len(LENGTHS), 6))[rows]
    logp = jnp.where(sequences.mask, rollout.logp + 0.4 * noise, jnp.nan)
    return dataclasses.replace(rollout, logp=logp), tabular.score(params, sequences)


def make_batch(variant, rows=slice(None), **hyper):
    rollout, score = answers(rows)
    numbers = dataclasses.replace(variant.hyper, learning_rate=1.0, **hyper)
    ref_logp = tabular.score(tabular.init(7, jnp.float64), rollout.sequences).logp
    batch, metrics = jax.jit(functools.partial(grpo.make_batch, variant.config))(
        numbers,
        rollout,
        jnp.asarray(REWARDS)[rows],
        score.logp,
        ref_logp,
        entropy=score.entropy,
    )
    return batch, metrics, numbers


def learn(variant, batch, numbers):
    update = jax.jit(grpo.make_update(variant.config, tabular.score, TX))
    state = grpo.init(tabular.init(0, jnp.float64), TX, jax.random.key(0))
    state, metrics = update(state, numbers, batch)
    return state.learner.params["logits"], metrics


def variant_of(name="grpo", correction=None, rules=(), micro_batches=1, **thresholds):
    variant = grpo_variants.make_variant(
        name, group_size=G, max_completion_length=6, micro_batches=micro_batches
    )
    if correction is None:
        return variant
    return grpo_variants.with_correction(variant, correction, rules=rules, **thresholds)


@pytest.mark.parametrize("name", few(["grpo", "dapo", "rloo", "gspo"], "grpo"))
def test_rejected_answers_are_out_of_the_loss_and_of_its_denominator(name):
    variant = variant_of(name, "metrics", ["seq_sum_k1"], rejection_low=0.7, rejection_high=1.4)
    batch, metrics, numbers = make_batch(variant)
    kept = np.asarray(batch.sequences.mask).any(axis=1)
    assert 0 < kept.sum() < len(kept)
    total = np.asarray(LENGTHS)
    np.testing.assert_allclose(metrics["rejected"], 1 - total[kept].sum() / total.sum())
    assert float(metrics["length"]) == total.mean()  # of what was sampled
    np.testing.assert_allclose(batch.advantages, make_batch(variant_of(name))[0].advantages)
    found, _ = learn(variant, batch, numbers)
    alone = jax.tree.map(lambda leaf: leaf[np.flatnonzero(kept)], batch)
    expected, _ = learn(variant, alone, numbers)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.abs(found - tabular.init(0, jnp.float64)["logits"]).max() > 1e-3


def test_in_bypass_the_ratio_is_to_the_sampler():
    batch, _, numbers = make_batch(variant_of("grpo", "bypass"))
    rollout, score = answers()
    mask = np.asarray(rollout.sequences.mask)
    assert batch.weights is None
    _, metrics = learn(variant_of(), batch, numbers)
    rows = np.exp(np.where(mask, score.logp - rollout.logp, -np.inf)).sum(1) / np.asarray(LENGTHS)
    np.testing.assert_allclose(metrics["ratio"], rows.mean(), rtol=1e-12)


MASKS = {
    "off_policy_threshold": 0.05,
    "second_moment_threshold": 0.02,
    "top_entropy_fraction": 0.5,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_take_tokens_out_of_the_surrogate_and_leave_the_denominator(name):
    """Against the sum over tokens of A w grad log pi(y_t), written as loops."""
    variant = variant_of("dr_grpo")
    batch, _, numbers = make_batch(variant, **{name: MASKS[name]})
    found, metrics = learn(variant, batch, numbers)
    rollout, score = answers()
    mask, tokens = np.asarray(rollout.sequences.mask), np.asarray(rollout.sequences.tokens)
    drift = np.where(mask, rollout.logp - score.logp, 0)
    kept = mask.copy()
    advantages = REWARDS - np.repeat(REWARDS.reshape(-1, G).mean(axis=1), G)
    if name == "off_policy_threshold":
        kept &= ((advantages >= 0) | (drift.sum(axis=1) / LENGTHS <= 0.05))[:, None]
    elif name == "top_entropy_fraction":
        kept &= np.asarray(score.entropy) >= np.quantile(np.asarray(score.entropy)[mask], 0.5)
    else:
        bound = mask & (advantages[:, None] * drift < 0)
        ordered = np.sort(np.square(drift[bound]))
        means = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
        kept &= ~bound | (np.square(drift) <= ordered[means <= 0.02][-1])
    assert 0 < kept.sum() < mask.sum()
    if name == "off_policy_threshold":
        np.testing.assert_allclose(metrics["off_policy_masked"], 1 - kept.sum() / mask.sum(), rtol=1e-12)
    table = np.asarray(tabular.init(0, jnp.float64)["logits"])
    probabilities = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    gradient = np.zeros_like(table)
    for b, t in zip(*np.nonzero(kept), strict=True):
        before = tokens[b, t - 1]
        gradient[before] += advantages[b] * (np.eye(tabular.VOCAB)[tokens[b, t]] - probabilities[before])
    np.testing.assert_allclose(found - table, gradient / (6 * len(LENGTHS)), rtol=0, atol=1e-12)


def test_in_a_run_a_step_behind_the_mask_drops_answers_that_have_become_unlikely():
    """Beside a loop over the policies of the run: none in the first step, on the policy's own answers."""
    variant = variant_of("dr_grpo")
    step = jax.jit(make_grpo_train_step(variant.config, tabular.score, TX))
    hyper = dataclasses.replace(variant.hyper, learning_rate=1.0, off_policy_threshold=1e-3)
    params, lengths = tabular.init(0, jnp.float64), np.asarray(LENGTHS)
    sequences = tabular.rows(1, LENGTHS)
    state, shares = grpo.init(params, TX, jax.random.key(0), one_step_off_policy=True), []
    for _ in range(3):
        rollout = tabular.rollout(state.rollout_params, sequences, jnp.ones(len(lengths), bool))
        logp = tabular.score(state.learner.params, sequences).logp
        drift = np.where(sequences.mask, rollout.logp - logp, 0).sum(axis=1) / lengths
        below = np.repeat(REWARDS.reshape(-1, G).mean(axis=1), G) > REWARDS
        shares.append(lengths[below & (drift > 1e-3)].sum() / lengths.sum())
        state, metrics = step(state, hyper, params, rollout, jnp.asarray(REWARDS))
        np.testing.assert_allclose(metrics["off_policy_masked"], shares[-1], atol=1e-12)
    assert shares[0] == 0
    assert all(0 < share < lengths[below].sum() / lengths.sum() for share in shares[1:])


def test_thresholds_with_nothing_between_them_are_refused():
    """Of weights and of rules on ratios; a divergence has no lower bound, and a traced number no value."""
    variant, crossed = variant_of(), {"is_clip_low": 3.0, "is_clip_high": 2.0}
    for name, rules, thresholds in (
        ("tis", [], crossed),
        ("metrics", ["token_k2", "seq_sum_k1"], {"rejection_low": [0, 0.5], "rejection_high": [1.0, 0.3]}),
        ("metrics", ["seq_mean_k1"], {"rejection_high": 0.3}),
    ):
        thresholds = {key: jnp.asarray(value) for key, value in thresholds.items()}
        with pytest.raises(UserError, match="no ratio is between them"):
            grpo_variants.with_correction(variant, name, rules=rules, **thresholds)
    for name, rules, thresholds in (
        ("metrics", ["token_k3"], {"rejection_high": 0.01}),
        ("metrics", [], crossed),
        ("tis", [], {"is_clip_low": 2.0, "is_clip_high": 2.0}),
    ):
        grpo_variants.with_correction(variant, name, rules=rules, **thresholds)
    jax.jit(lambda low: grpo_variants.with_correction(variant, "tis", is_clip_low=low).hyper)(3.0)


@pytest.mark.slow
def test_micro_batches_change_nothing():
    numbers = {**MASKS, "kl_coef": 0.1, "entropy_coef": 0.01}
    results = []
    for parts in (1, 4):
        variant = variant_of(
            "dapo", "tis", ["token_k1", "seq_max_k3"], parts, rejection_low=0.4, rejection_high=2.0
        )
        batch, _, hyper = make_batch(variant, **numbers)
        results.append(learn(variant, batch, hyper))
    (one, metrics), (other, expected) = results
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), metrics, expected)
    assert metrics["off_policy_masked"] > 0


@pytest.mark.slow
def test_order_of_groups_does_not_matter():
    variant = variant_of("dapo", "icepop", ["token_k2"], rejection_high=0.1)
    order = np.array([4, 5, 6, 7, 0, 1, 2, 3])
    straight, permuted = (
        learn(variant, *make_batch(variant, rows, **MASKS)[::2])[0] for rows in (slice(None), order)
    )
    np.testing.assert_allclose(straight, permuted, rtol=0, atol=1e-12)


def test_thresholds_and_fractions_compile_once():
    variant = variant_of("grpo", "seq_is_rs")
    wide = {"off_policy_threshold": 9.0, "second_moment_threshold": 9.0, "top_entropy_fraction": 1.0}
    base = {"is_clip_low": 0.9, "is_clip_high": 1.1, "rejection_low": 0.2, "rejection_high": 5.0, **wide}
    narrow = {"is_clip_low": 1.05, "is_clip_high": 0.95, "rejection_low": 1.0, "rejection_high": 1.0, **MASKS}

    @jax.jit
    def step(numbers):
        batch, _, hyper = make_batch(variant, **numbers)
        state = grpo.init(tabular.init(0, jnp.float64), TX, jax.random.key(0))
        update = jax.jit(grpo.make_update(variant.config, tabular.score, TX))
        return update(state, hyper, batch)[0].learner.params

    expected = step(base)["logits"]
    for name, number in narrow.items():
        changed = step({**base, name: number})["logits"]
        assert np.abs(changed - expected).max() > 1e-6, name
    assert step._cache_size() == 1


def test_what_is_missing_is_said():
    variant = variant_of()
    rollout, score = answers()
    hyper = grpo.Hyper(top_entropy_fraction=0.2)
    with pytest.raises(UserError, match="give make_batch entropy="):
        grpo.make_batch(variant.config, hyper, rollout, jnp.asarray(REWARDS), score.logp, None)
    batch, _, _ = make_batch(variant)
    with pytest.raises(UserError, match="give Batch sampler_logp="):
        grpo.batch_loss(variant.config, grpo.Hyper(off_policy_threshold=0.1), score, batch)
    with pytest.raises(UserError, match="rules token_k1: each has its own scale"):
        grpo_variants.with_correction(variant, "tis", rules=["token_k1"])


def test_a_correction_of_ones_own_is_any_functions():
    def halves(old_logp, sampler_logp, mask, *, low, high):
        del old_logp, sampler_logp, low
        return jnp.where(mask, high / 2, 0)

    variant = grpo_variants.with_correction(variant_of("rloo"), Correction(halves), is_clip_high=1.0)
    batch, metrics, _ = make_batch(variant)
    np.testing.assert_allclose(np.asarray(batch.weights)[np.asarray(batch.sequences.mask)], 0.5)
    assert float(metrics["is_ratio"]) == 0.5
