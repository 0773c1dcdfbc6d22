"""Families: every GRPO variant learns what its rewards say, every pair loss is what its name says."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax import losses
from rlhf_jax.algorithms import group_advantages, grpo, grpo_variants, preference, selection, unpaired
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import TokenLogprobs
from rlhf_jax.kernels import k1, k2, k3
from rlhf_jax.losses.pair_logps import traits_of
from rlhf_jax.losses.policy_ratios import sequence_log_ratio
from rlhf_jax.losses.reductions import constant_length, token_mean

N, G, WIDTH = 3, 4, 6
REWARDS = jnp.asarray(np.random.default_rng(0).normal(size=N * G), jnp.float32)
VARIANTS = grpo_variants.grpo_variants()


def variant_of(name, **options):
    return grpo_variants.make_variant(name, group_size=G, max_completion_length=WIDTH, **options)


def rollout_of(params, lengths=(1, 5, 2, 4, 3, 3, 5, 1, 2, 2, 4, 5)):
    return tabular.rollout(params, tabular.rows(1, lengths), jnp.ones(len(lengths), bool))


def gradient_of(variant, *, ref=None, rollout=None, rewards=REWARDS):
    """Gradient at the policy that sampled, by the step of an optimizer that hands it through."""
    params, tx = tabular.init(), optax.identity()
    rollout = rollout_of(params) if rollout is None else rollout
    logp = tabular.score(params, rollout.sequences).logp
    greedy = jnp.zeros(N) if variant.needs_greedy else None
    make_batch = jax.jit(functools.partial(grpo.make_batch, variant.config, greedy_rewards=greedy))
    batch, _ = make_batch(variant.hyper, rollout, rewards, logp, ref)
    update = jax.jit(grpo.make_update(variant.config, tabular.score, tx))
    hyper = grpo.Hyper(**{**vars(variant.hyper), "learning_rate": 1.0})
    state, metrics = update(grpo.init(params, tx, jax.random.key(0)), hyper, batch)
    return params["logits"] - state.learner.params["logits"], batch, metrics


def test_advantages_of_variants_are_what_their_names_say():
    rewards = np.asarray(REWARDS, np.float64).reshape(N, G)
    mean = rewards.mean(axis=1, keepdims=True)
    expected = {
        "reinforce": rewards - rewards.mean(),
        "reinforce_without_baseline": rewards,
        "rloo": (rewards - mean) * G / (G - 1),
        "remax": rewards,  # the greedy answers are worth 0 here
        "dr_grpo": rewards - mean,
        "grpo": (rewards - mean) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4),
    }
    for name, advantages in expected.items():
        _, batch, _ = gradient_of(variant_of(name))
        np.testing.assert_allclose(batch.advantages, advantages.reshape(-1), rtol=1e-4, atol=1e-5)


def test_remax_without_greedy_rewards_is_refused():
    params = tabular.init()
    variant = grpo_variants.remax(group_size=G)
    with pytest.raises(ValueError, match="greedy_rewards"):
        grpo.make_batch(
            variant.config,
            variant.hyper,
            rollout_of(params),
            REWARDS,
            tabular.score(params, rollout_of(params).sequences).logp,
            None,
        )


def naive_kl(params, ref):
    """Sum over each answer's tokens of the log-ratio to the reference."""
    sequences = rollout_of(params).sequences
    logp, mask = tabular.score(params, sequences).logp, np.asarray(sequences.mask)
    return np.where(mask, np.asarray(logp) - np.asarray(ref), 0).sum(axis=1)


@pytest.mark.slow
def test_the_kl_in_the_reward_is_charged_before_the_baseline():
    params = tabular.init()
    ref = tabular.score(tabular.init(7), rollout_of(params).sequences).logp
    charged = (np.asarray(REWARDS) - 0.5 * naive_kl(params, ref)).reshape(N, G)
    others = (charged.sum(axis=1, keepdims=True) - charged) / (G - 1)
    expected = {
        "reinforce": charged - charged.mean(),
        "reinforce_without_baseline": charged,
        "rloo": charged - others,
        "remax": charged,
    }
    for name, advantages in expected.items():
        variant = variant_of(name, changes={"kl_coef": 0.5})
        assert (variant.hyper.kl_coef, variant.hyper.reward_kl_coef) == (0, 0.5)
        _, batch, _ = gradient_of(variant, ref=ref)
        np.testing.assert_allclose(batch.advantages, advantages.reshape(-1), rtol=1e-4, atol=1e-5)


def test_reinforce_plus_plus_charges_each_token_with_the_kl_from_there_on():
    params = tabular.init()
    sequences = rollout_of(params).sequences
    ref = tabular.score(tabular.init(7), sequences).logp
    mask = np.asarray(sequences.mask)
    kl = np.where(mask, tabular.score(params, sequences).logp - ref, 0)
    returns = np.asarray(REWARDS)[:, None] - 0.5 * np.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
    expected = (returns - returns[mask].mean()) / returns[mask].std()
    _, batch, _ = gradient_of(variant_of("reinforce++", changes={"kl_coef": 0.5}), ref=ref)
    np.testing.assert_allclose(np.asarray(batch.advantages)[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_the_weight_of_the_kl_in_the_reward_is_a_number_that_a_sweep_varies():
    """Under one jit, traced; and with any variant, GRPO among them."""
    params, variant = tabular.init(), variant_of("grpo", changes={"reward_kl_coef": 0.3})
    rollout = rollout_of(params)
    logp = tabular.score(params, rollout.sequences).logp
    ref = tabular.score(tabular.init(7), rollout.sequences).logp

    def advantages(coef):
        hyper = grpo.Hyper(reward_kl_coef=coef)
        return grpo.make_batch(variant.config, hyper, rollout, REWARDS, logp, ref)[0].advantages

    found = jax.jit(jax.vmap(advantages))(jnp.array([0.0, 0.3]))
    for coef, lane in zip((0.0, 0.3), found, strict=True):
        charged = (np.asarray(REWARDS) - coef * naive_kl(params, ref)).reshape(N, G)
        spread = charged.std(axis=1, ddof=1, keepdims=True) + 1e-4
        expected = (charged - charged.mean(axis=1, keepdims=True)) / spread
        np.testing.assert_allclose(lane, expected.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_metrics_of_tokens_are_means_over_tokens_whatever_the_loss_sums():
    """On policy the ratio is 1 at every token and no token is clipped; entropy is in nats a token."""
    entropy = tabular.score(tabular.init(), rollout_of(tabular.init()).sequences).entropy
    for name in ("rloo", "luspo", "dr_grpo", "dapo"):
        _, _, metrics = gradient_of(variant_of(name))
        np.testing.assert_allclose(metrics["ratio"], 1, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(metrics["entropy"], jnp.nanmean(entropy), rtol=1e-5, err_msg=name)


def test_truncated_importance_sampling_weighs_tokens_by_the_sampler():
    params = tabular.init()
    rollout = rollout_of(params)
    older = rollout.__class__(rollout.sequences, rollout.logp + 0.3, rollout.finished)
    variant = grpo_variants.with_correction(grpo_variants.grpo(group_size=G), "tis")
    gradient, _, _ = gradient_of(variant, rollout=older)
    plain, _, _ = gradient_of(grpo_variants.grpo(group_size=G), rollout=older)
    np.testing.assert_allclose(gradient, np.exp(-0.3) * plain, rtol=1e-4, atol=1e-6)


def test_names_of_variants_are_those_of_their_functions():
    assert list(VARIANTS)[:5] == [
        "reinforce",
        "reinforce_without_baseline",
        "reinforce++",
        "reinforce++-baseline",
        "rloo",
    ]
    assert len(VARIANTS) == 33
    assert {"with_correction", "make_variant", "find_variant"}.isdisjoint(VARIANTS)


def test_a_variant_carries_what_it_is_published_with():
    dapo = variant_of("dapo")
    assert (dapo.dynamic_sampling_max_rounds, dapo.overlong_penalty_coef) == (8, 1.0)
    changes = {"dynamic_sampling_max_rounds": 2, "overlong_penalty_coef": None, "kl_coef": 0.5}
    changed = variant_of("dapo", changes=changes)
    assert changed.dynamic_sampling_max_rounds == 2
    assert changed.overlong_penalty_coef == 1.0
    assert changed.hyper.kl_coef == 0.5
    assert variant_of("grpo", changes={"overlong_penalty_coef": 0.3}).overlong_penalty_coef == 0.3
    assert variant_of("dr_grpo").config.reduce is constant_length(WIDTH)


def test_parts_of_a_variant_are_changed_one_by_one():
    changes = {"kl_fn": k2, "kl_ratio_correction": True, "ratio_fn": sequence_log_ratio, "reduce": token_mean}
    changed = variant_of("grpo", changes={**changes, "advantage_fn": None, "kl_coef": 0.3})
    expected = dataclasses.replace(variant_of("grpo").config, **changes)
    assert changed.config == expected
    assert changed.hyper.kl_coef == 0.3
    for name in ("gmpo", "vespo"):
        with pytest.raises(UserError, match="ratio_fn: GMPO and VESPO"):
            variant_of(name, changes=changes)
    with pytest.raises(UserError, match="k=5 of group_size 4"):
        variant_of("pass_at_k", changes={"k": 5})


def test_scales_of_advantages():
    rewards = np.asarray(REWARDS, np.float64).reshape(N, G)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    own = rewards.mean(axis=1, keepdims=True)
    expected = {
        "group": centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4),
        "batch": centred / (rewards.std(ddof=1) + 1e-4),
        "none": centred,
        "mean": np.where(own > 0, centred / own, 0),
    }
    assert expected.keys() == group_advantages.SCALES.keys()
    assert (own > 0).any()
    assert (own < 0).any()
    for name, advantages in expected.items():
        variant = variant_of("grpo", changes={"advantage_fn": group_advantages.SCALES[name]})
        _, batch, _ = gradient_of(variant)
        np.testing.assert_allclose(batch.advantages, advantages.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kl_fn", few([k1, k3], k3))
def test_a_corrected_kl_in_the_loss_has_the_gradient_of_the_kl(kl_fn):
    """Enumerated over the answers of one token to one prompt, each as often as the older policy says it."""
    table, ref = tabular.init()["logits"][0], tabular.init(7)["logits"][0]
    old = jax.nn.softmax(table + jnp.array([0.3, -0.2, 0.1, 0.0, 0.4]))
    config = dataclasses.replace(variant_of("grpo").config, kl_fn=kl_fn, kl_ratio_correction=True)

    def loss(table, answer):
        logp, old_logp, ref_logp = (
            jax.nn.log_softmax(x)[answer][None, None] for x in (table, jnp.log(old), ref)
        )
        sequences = types.SimpleNamespace(mask=jnp.ones((1, 1), bool))
        rows = grpo.Batch(sequences, old_logp, ref_logp, jnp.zeros(1))
        score = TokenLogprobs(logp, jnp.zeros((1, 1)), None)
        return grpo.batch_loss(config, grpo.Hyper(kl_coef=1.0), score, rows)[0]

    def kl(table):
        logp = jax.nn.log_softmax(table)
        return jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(ref)))

    found = jax.vmap(jax.grad(loss), (None, 0))(table, jnp.arange(tabular.VOCAB))
    np.testing.assert_allclose(old @ found, jax.grad(kl)(table), rtol=1e-4, atol=1e-5)


def test_a_group_of_one_is_refused_where_answers_are_compared():
    for name in VARIANTS:
        lone = name in ("reinforce", "reinforce_without_baseline", "reinforce++", "remax", "a_star_po")
        with contextlib.nullcontext() if lone else pytest.raises(UserError, match="group_size 1"):
            grpo_variants.make_variant(name, group_size=1, max_completion_length=WIDTH)


def test_variants_and_losses_of_ones_own_are_found_by_path_and_as_callables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_methods.py").write_text(
        "from rlhf_jax.algorithms.grpo_variants import grpo\n"
        "from rlhf_jax.losses import dpo_loss\n"
        "def variant(**static):\n    return grpo(**static)\n"
        "def loss(pairs, **options):\n    return dpo_loss(pairs, **options)\n"
    )
    own = grpo_variants.find_variant("own_methods:variant")
    assert grpo_variants.make_variant(own, group_size=G).config == variant_of("grpo").config
    assert grpo_variants.make_variant("own_methods:variant", group_size=G).config.group_size == G
    loss = preference.find_pair_loss("own_methods:loss")
    assert preference.find_pair_loss(loss) is loss
    with pytest.raises(UserError, match="nearest name is grpo"):
        grpo_variants.find_variant("grpoo")
    with pytest.raises(UserError, match="nearest name is simpo"):
        preference.find_pair_loss("sinpo")
    with pytest.raises(UserError, match=r"loss 'own_methods:los': los does not exist .*nearest name is loss"):
        preference.find_pair_loss("own_methods:los")


# Preferences ---------------------------------------------------------------------------------------


def pair_batch(mask=None):
    lengths = (1, 5, 2, 4)
    chosen, rejected = tabular.rows(1, lengths), tabular.rows(2, lengths[::-1])
    return preference.make_batch(tabular.score, tabular.init(7), chosen, rejected, mask)


def test_names_of_losses_are_those_of_their_functions():
    assert list(preference.pair_losses()) == [
        "dpo",
        "robust",
        "hinge",
        "ipo",
        "exo",
        "nca",
        "bco_pair",
        "sppo",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "length_normalized",
        "orpo",
        "cpo",
        "simpo",
        "alpha_po",
    ]


@pytest.mark.parametrize(
    "name", few(preference.pair_losses(), "dpo", "orpo", "simpo", "aot", "exo", "bco_pair")
)
def test_an_update_gives_its_loss_the_pairs_of_the_batch(name):
    loss_fn = preference.find_pair_loss(name)
    batch, params = pair_batch(), tabular.init()
    chosen, rejected = preference.response_logp(tabular.score, params, batch.chosen, batch.rejected)
    pairs = losses.PairLogps(
        policy_chosen=chosen,
        policy_rejected=rejected,
        ref_chosen=batch.ref_chosen_logp,
        ref_rejected=batch.ref_rejected_logp,
        chosen_length=jnp.asarray([1, 5, 2, 4]),
        rejected_length=jnp.asarray([4, 2, 5, 1]),
    )
    expected, _ = loss_fn(pairs, beta=0.3)
    config = preference.Config(loss_fn=loss_fn)
    update = jax.jit(preference.make_update(config, tabular.score, optax.identity()))
    state = preference.init(params, optax.identity(), jax.random.key(0))
    _, metrics = update(state, preference.Hyper(beta=0.3), batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_losses_that_sort_a_batch_refuse_micro_batches():
    sorting = [n for n, fn in preference.pair_losses().items() if traits_of(fn).uses_batch_sort]
    assert sorting == ["aot", "aot_unpaired"]
    for name in sorting:
        loss_fn = functools.partial(preference.find_pair_loss(name), label_smoothing=0.1)
        with pytest.raises(UserError, match="micro_batches 1"):
            preference.Config(micro_batches=2, loss_fn=loss_fn)
    assert preference.Config(micro_batches=2, loss_fn=losses.simpo_loss).micro_batches == 2


def test_masked_pairs_do_not_count():
    update = jax.jit(preference.make_update(preference.Config(), tabular.score, optax.identity()))
    state = preference.init(tabular.init(), optax.identity(), jax.random.key(0))
    some = pair_batch(jnp.asarray([True, False, True, False]))
    few = jax.tree.map(lambda leaf: leaf[::2], pair_batch())
    _, masked = update(state, preference.Hyper(), some)
    _, alone = update(state, preference.Hyper(), few)
    np.testing.assert_allclose(masked["loss"], alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(masked["gradient_norm"], alone["gradient_norm"], rtol=1e-5)


def test_kto_needs_mismatched_pairs_and_bco_moves_its_shift():
    responses, desirable = tabular.rows(1, (1, 5, 2, 4)), jnp.asarray([True, False, True, False])
    batch = unpaired.make_batch(tabular.score, tabular.init(7), responses, desirable)
    state = unpaired.init(tabular.init(), optax.identity(), jax.random.key(0))
    kto = jax.jit(unpaired.make_update(unpaired.Config(), tabular.score, optax.identity()))
    with pytest.raises(ValueError, match="mismatched"):
        kto(state, unpaired.Hyper(), batch)
    bco = jax.jit(unpaired.make_update(unpaired.Config(shift_decay=0.75), tabular.score, optax.identity()))
    after, metrics = bco(state, unpaired.Hyper(), batch)
    np.testing.assert_allclose(after.shift, 0.25 * metrics["reward"], rtol=1e-6)


def test_mismatched_rows_are_prompts_with_the_answer_before():
    sequences = rollout_of(tabular.init()).sequences
    mixed = unpaired.mismatch(1, sequences)
    np.testing.assert_array_equal(mixed.tokens[:, 0], sequences.tokens[:, 0])
    np.testing.assert_array_equal(mixed.tokens[1:, 1:], sequences.tokens[:-1, 1:])
    np.testing.assert_array_equal(mixed.mask[0, 1:], sequences.mask[-1, 1:])
    np.testing.assert_array_equal(mixed.positions[mixed.segment_ids > 0].max(), 5)


# Selection -----------------------------------------------------------------------------------------

GROUPED = jnp.asarray([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [3.0, -1.0, 0.0, 0.0]])


def test_best_and_worst_of_each_prompt():
    sequences = rollout_of(tabular.init()).sequences
    pairs = selection.best_and_worst(sequences, GROUPED)
    np.testing.assert_array_equal(pairs.chosen.tokens, sequences.tokens[jnp.asarray([1, 4, 8])])
    np.testing.assert_array_equal(pairs.rejected.tokens, sequences.tokens[jnp.asarray([0, 4, 9])])
    np.testing.assert_array_equal(pairs.mask, [True, False, True])


def test_the_worst_is_among_those_that_are_not_left_out():
    sequences = rollout_of(tabular.init()).sequences
    out = -jnp.inf
    rewards = jnp.asarray([[out, 2.0, 1.0, out], [out, out, out, 1.0], [out, out, out, out]])
    pairs = selection.best_and_worst(sequences, rewards)
    np.testing.assert_array_equal(pairs.mask, [True, False, False])
    np.testing.assert_array_equal(pairs.chosen.tokens[0], sequences.tokens[1])
    np.testing.assert_array_equal(pairs.rejected.tokens[0], sequences.tokens[2])
    assert not pairs.first_is_chosen[2]


def test_a_judge_s_choice_decides_which_is_chosen():
    first, second = tabular.rows(1, (1, 2)), tabular.rows(2, (3, 4))
    pairs = selection.judged(first, second, jnp.asarray([True, False]))
    np.testing.assert_array_equal(pairs.chosen.tokens, jnp.stack([first.tokens[0], second.tokens[1]]))
    np.testing.assert_array_equal(pairs.rejected.mask, jnp.stack([second.mask[0], first.mask[1]]))


def test_only_answers_that_are_good_enough_are_imitated():
    sequences = rollout_of(tabular.init()).sequences
    best, counts = selection.best_of_group(sequences, GROUPED, reward_threshold=2.0)
    np.testing.assert_array_equal(counts, [True, False, True])
    np.testing.assert_array_equal(best.tokens, sequences.tokens[jnp.asarray([1, 4, 8])])
    assert not best.mask[1].any()
    assert best.mask[0].any()
    every, counts = selection.all_above(sequences, GROUPED, reward_threshold=2.0)
    np.testing.assert_array_equal(counts, GROUPED.reshape(-1) >= 2)
    np.testing.assert_array_equal(every.mask.any(axis=1), counts)


@pytest.mark.slow
def test_answers_of_small_advantage_are_pruned():
    """CPPO: the two of each group that are furthest from 0, in their order, with all that belongs to them."""
    _, whole, _ = gradient_of(variant_of("grpo"))
    _, pruned, _ = gradient_of(variant_of("cppo", changes={"num_kept": 2}))
    size = np.abs(np.asarray(whole.advantages)).reshape(N, G)
    rows = np.concatenate([G * n + np.sort(np.argsort(-size[n])[:2]) for n in range(N)])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[rows]), pruned, whole)
    assert selection.largest_advantages(jnp.array([[1.0, -1.0, 0.0, 1.0]]), keep=2).tolist() == [0, 1]
    with pytest.raises(UserError, match="num_kept 5: give 0 for all, or up to group_size"):
        variant_of("cppo", changes={"num_kept": 5})


def test_gfpo_compares_the_answers_that_its_metric_prefers():
    lengths = np.array([1, 5, 2, 4, 3, 3, 5, 1, 2, 2, 4, 5]).reshape(N, G)
    rewards = np.asarray(REWARDS, np.float64).reshape(N, G)
    metrics = {"shortest": -lengths, "most_efficient": rewards / lengths}
    for name, metric in metrics.items():
        changes = {"num_kept": 3, "metric_fn": getattr(group_advantages, name)}
        expected = np.zeros((N, G))
        for n in range(N):
            kept = np.argsort(-metric[n], kind="stable")[:3]
            expected[n, kept] = rewards[n, kept] - rewards[n, kept].mean()
            expected[n] /= rewards[n, kept].std(ddof=1) + 1e-4
        _, batch, _ = gradient_of(variant_of("gfpo", changes=changes))
        np.testing.assert_allclose(batch.advantages, expected.reshape(-1), rtol=1e-4, atol=1e-5)


def test_gpg_makes_up_for_groups_that_teach_nothing():
    """B / (B - M), M of B groups being all right or all wrong; a group without a reward is none of the B."""
    rewards = jnp.asarray([1.0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0])
    grouped = np.asarray(rewards).reshape(N, G)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    config, mask = variant_of("gpg").config, jnp.ones((N * G, WIDTH), bool)
    found, _ = grpo.compute_advantages(config, rewards, mask)
    np.testing.assert_allclose(found, (3 / 2 * centred).reshape(-1), rtol=1e-6)
    scored = jnp.arange(N * G) // G != 1
    found, _ = grpo.compute_advantages(config, rewards, mask, scored=scored)
    np.testing.assert_allclose(found, (np.asarray([[1], [0], [1]]) * centred).reshape(-1), rtol=1e-6)


def test_gdpo_needs_its_rewards_apart():
    with pytest.raises(UserError, match="give make_batch reward_terms= and Hyper reward_weights="):
        gradient_of(variant_of("gdpo"))


def test_a_variant_keeps_to_the_sampler_under_a_correction():
    """DPPO's ratio is to the sampler, whatever weight or rule is added."""
    plain, corrected = variant_of("dppo_tv"), grpo_variants.with_correction(variant_of("dppo_tv"), "k3_rs")
    assert plain.config.correction.bypass
    assert corrected.config.correction.bypass
    assert len(corrected.config.correction.rules) == 1


def test_prompts_whose_answers_differ_come_first():
    chosen, differ = selection.groups_that_differ(GROUPED, keep=2)
    np.testing.assert_array_equal(chosen, [0, 2])
    np.testing.assert_array_equal(differ, [True, True])
    chosen, differ = selection.groups_that_differ(GROUPED, keep=3)
    np.testing.assert_array_equal(chosen, [0, 2, 1])
    np.testing.assert_array_equal(differ, [True, True, False])
