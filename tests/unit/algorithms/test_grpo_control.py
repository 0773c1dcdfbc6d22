"""Coefficients that move with entropy and KL, and what else the training step of the GRPO family hands on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular

from rlhf_jax.algorithms import grpo, grpo_variants
from rlhf_jax.algorithms.grpo_control import control
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.rollout.step import make_grpo_train_step

LENGTHS = (1, 5, 2, 4, 3, 3, 5, 1)
G = 4
REF = tabular.init(7)["logits"]
REWARDS = jnp.asarray([1.0, 0.0, 0.5, -1.0, 0.2, 0.9, -0.3, 0.4])
TX = make_optimizer(OptimizerConfig())
TARGET = 1.402  # just above where the policy begins
CONTROLLED = grpo.Hyper(
    learning_rate=0.03,
    kl_coef=0.2,
    target_entropy=TARGET,
    entropy_coef_step=0.01,
    kl_target=0.5,
    kl_horizon=40.0,
)


def train_step(variant, tx=TX):
    step = make_grpo_train_step(variant.config, tabular.score, tx)

    @jax.jit
    def run(state, hyper, **data):
        rollout = tabular.rollout(state.learner.params, tabular.rows(1, LENGTHS), jnp.ones(8, bool))
        return step(state, hyper, tabular.init(7), rollout, REWARDS, **data)

    return run


def start(hyper, tx=TX):
    return grpo.init(tabular.init(), tx, jax.random.key(0), hyper=hyper)


def test_coefficients_follow_what_is_measured():
    """By loops of the two rules, step after step; and they are what the loss uses."""
    step, hyper = train_step(grpo_variants.grpo(group_size=G)), jax.tree.map(jnp.float32, CONTROLLED)
    state, coef, scale = start(CONTROLLED), 0.0, 1.0
    sequences, mask = tabular.rows(1, LENGTHS), np.asarray(tabular.rows(1, LENGTHS).mask)
    ref = tabular.score(tabular.init(7), sequences).logp
    in_use = []
    for _ in range(12):
        scored = tabular.score(state.learner.params, sequences)
        entropy = float(np.asarray(scored.entropy)[mask].mean())
        kl = np.where(mask, np.asarray(scored.logp) - np.asarray(ref), 0).sum() / len(LENGTHS)
        state, metrics = step(state, hyper)
        np.testing.assert_allclose(metrics["entropy_coef"], coef if entropy <= TARGET else 0, atol=1e-6)
        np.testing.assert_allclose(metrics["kl_coef"], 0.2 * scale, rtol=1e-4)
        in_use.append(float(metrics["entropy_coef"]))
        coef = max(coef + (0.01 if entropy < TARGET else -0.01), 0)
        scale *= 1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * len(LENGTHS) / 40
        np.testing.assert_allclose(state.control.entropy_coef, coef, atol=1e-6)
        np.testing.assert_allclose(state.control.kl_scale, scale, rtol=1e-4)
    assert max(in_use) > 0
    assert step._cache_size() == 1


def test_the_update_has_the_coefficients_in_use():
    """One step with a coefficient that has moved is one step with that number fixed."""
    variant, tx = grpo_variants.grpo(group_size=G), optax.identity()
    step = train_step(variant, tx)
    state = start(CONTROLLED, tx)
    moved = dataclasses.replace(state.control, entropy_coef=jnp.float32(0.3), kl_scale=jnp.float32(2.0))
    high = dataclasses.replace(CONTROLLED, target_entropy=9.0)
    found, _ = step(dataclasses.replace(state, control=moved), high)
    fixed = grpo.Hyper(learning_rate=0.03, kl_coef=0.4, entropy_coef=0.3)
    expected, _ = step(start(fixed, tx), fixed)
    np.testing.assert_allclose(
        found.learner.params["logits"], expected.learner.params["logits"], rtol=1e-5, atol=1e-7
    )
    plain, _ = step(start(fixed, tx), dataclasses.replace(fixed, entropy_coef=0.0, kl_coef=0.2))
    assert np.abs(plain.learner.params["logits"] - expected.learner.params["logits"]).max() > 1e-4


def test_the_kl_in_the_reward_moves_with_that_in_the_loss():
    state = start(CONTROLLED)
    state = dataclasses.replace(state, control=dataclasses.replace(state.control, kl_scale=jnp.float32(3.0)))
    hyper = dataclasses.replace(CONTROLLED, kl_coef=0.0, reward_kl_coef=0.05)
    numbers = {"entropy": jnp.float32(1.0), "kl": jnp.float32(0.5), "num_answers": 8}
    _, used, metrics = control(state, hyper, **numbers)
    np.testing.assert_allclose((used.kl_coef, used.reward_kl_coef), (0, 0.15), rtol=1e-6)
    np.testing.assert_allclose(metrics["kl_coef"], 0.15, rtol=1e-6)


def test_without_targets_nothing_moves_and_with_them_a_state_is_needed():
    plain = grpo.Hyper()
    state = start(plain)
    assert state.control is None
    numbers = {"entropy": jnp.float32(1.0), "kl": jnp.float32(0.5), "num_answers": 8}
    assert control(state, plain, **numbers) == (state, plain, {})
    with pytest.raises(UserError, match="give init hyper="):
        control(state, CONTROLLED, **numbers)


def test_targets_may_be_swept():
    state = start(CONTROLLED)

    def run(target):
        hyper = dataclasses.replace(CONTROLLED, target_entropy=target)
        moved, _, _ = control(state, hyper, entropy=jnp.float32(1.0), kl=jnp.float32(0.5), num_answers=8)
        return moved.control.entropy_coef

    found = jax.jit(jax.vmap(run))(jnp.asarray([0.1, 5.0]))
    np.testing.assert_allclose(found, [0.0, 0.01], atol=1e-7)


def test_clip_cov_draws_other_tokens_in_every_step():
    variant = grpo_variants.make_variant(
        "clip_cov", changes={"clip_cov_fraction": 0.1, "clip_cov_low": 0.0}, group_size=G
    )
    step = train_step(variant, optax.identity())
    still = dataclasses.replace(variant.hyper, learning_rate=0.0)
    moving = dataclasses.replace(variant.hyper, learning_rate=1.0)
    state = start(still, optax.identity())
    results = []
    for _ in range(6):
        results.append(np.asarray(step(state, moving)[0].learner.params["logits"]))
        state, _ = step(state, still)
    assert len({result.tobytes() for result in results}) > 1


def test_optimal_token_baselines_and_values_of_prompts_reach_the_advantages():
    otb = grpo_variants.otb(group_size=G)
    state, metrics = train_step(otb)(start(otb.hyper), otb.hyper)
    assert np.isfinite(metrics["loss"])
    regression = grpo_variants.a_star_po(group_size=G, beta=0.3)
    tx, values = optax.identity(), np.array([0.25, -0.5])
    hyper = dataclasses.replace(regression.hyper, learning_rate=1.0)
    state, _ = train_step(regression, tx)(start(hyper, tx), hyper, values=jnp.asarray(values))
    table = tabular.init()["logits"]
    sequences, mask = tabular.rows(1, LENGTHS), tabular.rows(1, LENGTHS).mask

    def loss(table):
        """The mean over answers of (beta log pi / ref + V* - r)^2."""
        logps = [tabular.score({**tabular.init(7), "logits": x}, sequences).logp for x in (table, REF)]
        ratio = jnp.sum(jnp.where(mask, logps[0] - logps[1], 0), axis=1)
        return jnp.mean(jnp.square(0.3 * ratio + jnp.repeat(jnp.asarray(values), G) - REWARDS))

    expected = table - jax.grad(loss)(table)
    np.testing.assert_allclose(state.learner.params["logits"], expected, rtol=1e-4, atol=1e-6)


def test_what_a_variant_needs_is_said():
    arrays = (
        tabular.rollout(tabular.init(), tabular.rows(1, LENGTHS), jnp.ones(8, bool)),
        REWARDS,
        tabular.score(tabular.init(), tabular.rows(1, LENGTHS)).logp,
    )
    for variant, message in (
        (grpo_variants.otb(group_size=G), "give make_batch collision="),
        (grpo_variants.clip_cov(group_size=G), "give make_batch key="),
        (grpo_variants.a_star_po(group_size=G), "give make_batch values="),
    ):
        with pytest.raises(UserError, match=message):
            grpo.make_batch(variant.config, variant.hyper, *arrays, None)
    regression = grpo_variants.a_star_po(group_size=G)
    values = jnp.zeros(2)
    with pytest.raises(UserError, match="give make_batch ref_logp"):
        grpo.make_batch(regression.config, regression.hyper, *arrays, None, values=values)
