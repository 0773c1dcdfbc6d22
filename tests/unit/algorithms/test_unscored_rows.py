"""Answers without a reward: the update is that of the batch without them, whatever stands in their rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax.algorithms import grpo, grpo_variants, nash_md, ppo, selection

WIDTH, N, G = 6, 3, 4
VARIANTS = grpo_variants.grpo_variants()
OF_EACH_KIND = ("grpo", "gdpo", "cppo")
LENGTHS = (1, 5, 2, 4, 3, 3, 5, 1, 2, 2, 4, 5, 2, 3, 1, 4)
# The last answer but one to each of three prompts, and all answers to a fourth, could not be scored.
SCORED = np.array([[True, True, False, True]] * N + [[False] * G]).reshape(-1)
REWARDS = np.where(SCORED, np.random.default_rng(0).normal(size=(N + 1) * G), np.nan)
TERMS = np.stack([REWARDS > 0, REWARDS], axis=1) * np.where(SCORED, 1, np.nan)[:, None]
TX = optax.identity()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def answers(rows):
    """(rollout, log-probs and values, the reference's log-probs) of some of the rows."""
    params = tabular.init(0, jnp.float64)
    sequences = jax.tree.map(lambda leaf: leaf[rows], tabular.rows(1, LENGTHS))
    finished = jnp.asarray(np.arange(len(LENGTHS)) % 3 > 0)[rows]
    rollout = tabular.rollout(params, sequences, finished)
    rollout = dataclasses.replace(rollout, logp=rollout.logp - 0.1)  # the sampler is a little off
    ref_logp = tabular.score(tabular.init(7, jnp.float64), sequences).logp
    return rollout, tabular.score(params, sequences), ref_logp


def assert_same(found, expected):
    def compare(path, a, b):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, found, expected)


def group_update(name, rows, group_size, scored, micro_batches=1):
    """(parameters after a step, metrics, batch), with the KL in both places and with weights of tokens."""
    variant = grpo_variants.make_variant(
        name, group_size=group_size, max_completion_length=WIDTH, micro_batches=micro_batches
    )
    variant = grpo_variants.with_correction(variant, "tis")
    numbers = {"learning_rate": 1.0, "kl_coef": 0.1, "reward_kl_coef": 0.2, "entropy_coef": 0.01}
    numbers["reward_weights"] = jnp.array([1.0, 0.5])
    if variant.hyper.clip_cov_fraction is not None:
        numbers |= {"clip_cov_fraction": 1.0, "clip_cov_low": 0.5}  # all of the band, whatever the draw
    hyper = dataclasses.replace(variant.hyper, **numbers)
    rollout, score, ref_logp = answers(rows)
    greedy = jnp.arange(len(rows) // group_size, dtype=jnp.float64) if variant.needs_greedy else None
    batch, described = jax.jit(functools.partial(grpo.make_batch, variant.config))(
        hyper,
        rollout,
        jnp.asarray(REWARDS)[rows],
        score.logp,
        ref_logp,
        scored=scored,
        greedy_rewards=greedy,
        reward_terms=jnp.asarray(TERMS)[rows],
        collision=score.collision,
        values=jnp.arange(len(rows) // group_size, dtype=jnp.float64) / 3,
        key=jax.random.key(0),
    )
    update = jax.jit(grpo.make_update(variant.config, tabular.score, TX))
    state, metrics = update(grpo.init(tabular.init(0, jnp.float64), TX, jax.random.key(0)), hyper, batch)
    return state.learner.params, {**described, **metrics}, batch


@pytest.mark.parametrize("name", few(VARIANTS, *OF_EACH_KIND))
def test_a_group_without_some_answers_is_the_group_of_the_others(name):
    whole, metrics, batch = group_update(name, np.arange(len(SCORED)), G, jnp.asarray(SCORED))
    alone, expected, _ = group_update(name, np.flatnonzero(SCORED), G - 1, None)
    assert_same(whole, alone)
    assert np.abs(whole["logits"] - tabular.init(0, jnp.float64)["logits"]).max() > 1e-3
    # Beyond the answers there is a fourth prompt, of which nothing is known.
    own = {"frac_reward_zero_std", "unscorable", "unscorable_share", "tokens"}
    assert_same(*({k: v for k, v in x.items() if k not in own} for x in (metrics, expected)))
    assert int(metrics["unscorable"]) == N + G
    assert int(metrics["tokens"]) == sum(LENGTHS)
    assert float(metrics["frac_reward_zero_std"]) == 1 / (N + 1)
    # Pruned batches (CPPO) hold fewer rows.
    unscored = ~SCORED if len(batch.advantages) == len(SCORED) else slice(2 * N, None)
    assert not np.asarray(batch.sequences.mask)[unscored].any()
    assert not np.asarray(batch.advantages)[unscored].any()


def test_micro_batches_of_nothing_but_unscored_answers_change_nothing():
    rows = np.arange(len(SCORED))
    whole, _, _ = group_update("rloo", rows, G, jnp.asarray(SCORED))
    parts, metrics, _ = group_update("rloo", rows, G, jnp.asarray(SCORED), micro_batches=4)
    assert_same(parts, whole)
    assert np.isfinite(metrics["loss"])


def test_where_nothing_is_scored_nothing_is_learned():
    params, metrics, _ = group_update("grpo", np.arange(8), G, jnp.zeros(8, bool))
    assert_same(params, tabular.init(0, jnp.float64))
    assert float(metrics["reward"]) == float(metrics["loss"]) == 0


def ppo_update(rows, scored, config=ppo.Config(scale_rewards=True, adaptive_kl=True)):
    config = dataclasses.replace(config, num_ppo_epochs=1, num_minibatches=1)
    hyper = ppo.Hyper(learning_rate=1.0, kl_horizon=100.0, kl_target=0.01, entropy_coef=0.01)
    rollout, score, ref_logp = answers(rows)
    state = ppo.init(tabular.init(0, jnp.float64), TX, jax.random.key(0), hyper)
    rewards = jnp.asarray(REWARDS)[rows]
    state, batch, described = jax.jit(functools.partial(ppo.language_batch, config))(
        state, hyper, rollout, score, ref_logp, rewards, scored=scored
    )
    state, metrics = jax.jit(ppo.make_update(config, tabular.score, TX))(state, hyper, batch)
    return state, {**described, **metrics}


def test_ppo_whitens_scales_and_learns_without_unscored_answers():
    state, metrics = ppo_update(np.arange(len(SCORED)), jnp.asarray(SCORED))
    expected_state, expected = ppo_update(np.flatnonzero(SCORED), None)
    assert_same(state, expected_state)
    assert float(state.reward_moments.count) == SCORED.sum()
    assert float(state.kl_coef) != 0.05  # the controller moved, as far as without them
    own = {"unscorable", "unscorable_share", "tokens"}
    assert_same(*({k: v for k, v in x.items() if k not in own} for x in (metrics, expected)))
    assert int(metrics["unscorable"]) == N + G


def test_ppo_learns_nothing_where_nothing_is_scored():
    state, metrics = ppo_update(np.arange(4), jnp.zeros(4, bool))
    assert_same(state.learner.params, tabular.init(0, jnp.float64))
    assert float(state.reward_moments.count) == float(metrics["loss"]) == 0


def test_nash_md_leaves_out_what_could_not_be_judged():
    counts = np.array([True, False, True, True])

    def step(rows, mask):
        sequences = jax.tree.map(lambda leaf: leaf[rows], tabular.rows(1, LENGTHS))
        preference = jnp.where(jnp.asarray(counts[rows]), jnp.array([0.9, 0.5, 0.2, 0.6])[rows], jnp.nan)
        batch = nash_md.Batch(sequences, jnp.zeros(len(rows)), preference, mask)
        update = jax.jit(nash_md.make_update(nash_md.Config(), tabular.score, TX))
        state = nash_md.init(tabular.init(0, jnp.float64), TX, jax.random.key(0))
        return update(state, nash_md.Hyper(learning_rate=1.0), batch)[0].learner.params

    assert_same(step(np.arange(4), jnp.asarray(counts)), step(np.flatnonzero(counts), None))


def test_a_group_differs_by_its_scored_answers_alone():
    rewards = jnp.array([[1.0, 1.0, jnp.nan], [0.0, 1.0, 1.0], [0.5, jnp.inf, 0.25]])
    scored = jnp.array([[True, True, False], [True, True, True], [True, False, True]])
    chosen, differ = selection.groups_that_differ(rewards, scored, keep=3)
    assert chosen.tolist() == [1, 2, 0]
    assert differ.tolist() == [True, True, False]
