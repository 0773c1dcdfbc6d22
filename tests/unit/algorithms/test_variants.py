"""The families: every member learns what its rewards say, and is the loss that it names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular

from rlhf_jax.algorithms import grpo, grpo_variants, preference, preference_members, selection, unpaired
from rlhf_jax.losses import preference as losses

N, G, WIDTH = 3, 4, 6
REWARDS = jnp.asarray(np.random.default_rng(0).normal(size=N * G), jnp.float32)
MEMBERS = {
    "reinforce": grpo_variants.reinforce,
    "bare": grpo_variants.reinforce_without_baseline,
    "reinforce++": grpo_variants.reinforce_plus_plus,
    "reinforce++-baseline": grpo_variants.reinforce_plus_plus_baseline,
    "rloo": grpo_variants.rloo,
    "remax": grpo_variants.remax,
    "opo": grpo_variants.opo,
    "grpo": grpo_variants.grpo,
    "bnpo": grpo_variants.bnpo,
    "dr_grpo": functools.partial(grpo_variants.dr_grpo, max_length=WIDTH),
    "dapo": grpo_variants.dapo,
    "gspo": grpo_variants.gspo,
    "luspo": grpo_variants.luspo,
    "gmpo": grpo_variants.gmpo,
    "cispo": grpo_variants.cispo,
    "sapo": grpo_variants.sapo,
    "vespo": grpo_variants.vespo,
}


def rollout_of(params, lengths=(1, 5, 2, 4, 3, 3, 5, 1, 2, 2, 4, 5)):
    return tabular.rollout(params, tabular.rows(1, lengths), jnp.ones(len(lengths), bool))


def gradient_of(member, *, ref=None, rollout=None, rewards=REWARDS):
    """Gradient at the policy that sampled, by the step of an optimizer that hands it through."""
    params, tx = tabular.init(), optax.identity()
    rollout = rollout_of(params) if rollout is None else rollout
    logp = tabular.score(params, rollout.sequences).logp
    greedy = jnp.zeros(N) if member.needs_greedy else None
    batch, _ = grpo.make_batch(member.config, rollout, rewards, logp, ref, greedy)
    update = grpo.make_update(member.config, tabular.score, tx)
    hyper = grpo.Hyper(**{**vars(member.hyper), "learning_rate": 1.0})
    state, metrics = update(grpo.init(params, tx, jax.random.key(0)), hyper, batch)
    return params["logits"] - state.learner.params["logits"], batch, metrics


@pytest.mark.parametrize("name", MEMBERS)
def test_on_policy_the_gradient_is_that_of_the_weighted_log_probs(name):
    """At ratio 1 no bound acts: what is left is -sum of weights x advantages x d log p, with the member's own
    weights and advantages.
    """
    member = MEMBERS[name](group_size=G)
    gradient, batch, _ = gradient_of(member)
    params, mask = tabular.init(), batch.sequences.mask
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None] * mask

    def objective(logits):
        logp = tabular.score({**params, "logits": logits}, batch.sequences).logp
        # One ratio for an answer has a token's mean log-prob in its gradient, the same for all its tokens.
        return member.config.reduce(-advantages * jnp.where(mask, logp, 0), mask)

    np.testing.assert_allclose(gradient, jax.grad(objective)(params["logits"]), rtol=1e-4, atol=1e-5)


def test_advantages_of_members_are_what_their_names_say():
    rewards = np.asarray(REWARDS, np.float64).reshape(N, G)
    mean = rewards.mean(axis=1, keepdims=True)
    expected = {
        "reinforce": rewards - rewards.mean(),
        "bare": rewards,
        "rloo": (rewards - mean) * G / (G - 1),
        "remax": rewards,  # the greedy answers are worth 0 here
        "dr_grpo": rewards - mean,
        "grpo": (rewards - mean) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4),
    }
    for name, advantages in expected.items():
        _, batch, _ = gradient_of(MEMBERS[name](group_size=G))
        np.testing.assert_allclose(batch.advantages, advantages.reshape(-1), rtol=1e-4, atol=1e-5)


def test_remax_without_greedy_rewards_is_refused():
    params = tabular.init()
    config = grpo_variants.remax(group_size=G).config
    with pytest.raises(ValueError, match="greedy_rewards"):
        grpo.make_batch(
            config,
            rollout_of(params),
            REWARDS,
            tabular.score(params, rollout_of(params).sequences).logp,
            None,
        )


def test_reinforce_plus_plus_charges_the_kl_in_the_reward():
    params = tabular.init()
    ref = tabular.score(tabular.init(7), rollout_of(params).sequences).logp
    without, _, _ = gradient_of(grpo_variants.reinforce_plus_plus(kl_coef=0.0, group_size=G), ref=ref)
    charged, _, _ = gradient_of(grpo_variants.reinforce_plus_plus(kl_coef=0.5, group_size=G), ref=ref)
    assert np.abs(without - charged).max() > 1e-2


def test_corrected_members_weigh_tokens_by_the_sampler():
    params = tabular.init()
    rollout = rollout_of(params)
    older = rollout.__class__(rollout.sequences, rollout.logp + 0.3, rollout.finished)
    member = grpo_variants.corrected(grpo_variants.grpo(group_size=G))
    gradient, _, _ = gradient_of(member, rollout=older)
    plain, _, _ = gradient_of(grpo_variants.grpo(group_size=G), rollout=older)
    np.testing.assert_allclose(gradient, np.exp(-0.3) * plain, rtol=1e-4, atol=1e-6)


# Preferences ---------------------------------------------------------------------------------------

PAIRED = [
    (preference_members.dpo, losses.dpo_loss),
    (preference_members.robust, losses.robust_dpo_loss),
    (preference_members.hinge, losses.hinge_loss),
    (preference_members.exo, losses.exo_loss),
    (preference_members.nca, losses.nca_loss),
    (preference_members.bco_pair, losses.bco_pair_loss),
    (preference_members.sppo, losses.sppo_loss),
    (preference_members.aot, losses.aot_loss),
    (preference_members.aot_unpaired, losses.aot_unpaired_loss),
    (preference_members.apo_zero, losses.apo_zero_loss),
    (preference_members.apo_down, losses.apo_down_loss),
    (preference_members.discopop, losses.discopop_loss),
    (preference_members.ipo, losses.ipo_loss),
    (preference_members.length_normalised, losses.length_normalised_dpo_loss),
    (preference_members.orpo, losses.orpo_loss),
    (preference_members.simpo, losses.simpo_loss),
    (preference_members.alpha_po, losses.alpha_po_loss),
    (preference_members.cpo, losses.cpo_loss),
]


def pair_batch(mask=None):
    lengths = (1, 5, 2, 4)
    chosen, rejected = tabular.rows(1, lengths), tabular.rows(2, lengths[::-1])
    return preference.make_batch(tabular.score, tabular.init(7), chosen, rejected, mask)


@pytest.mark.parametrize(("member", "loss_fn"), PAIRED, ids=[fn.__name__ for _, fn in PAIRED])
def test_a_member_is_its_loss_with_arguments_by_their_names(member, loss_fn):
    batch, params = pair_batch(), tabular.init()
    chosen, rejected = preference.response_logp(tabular.score, params, batch.chosen, batch.rejected)
    known = {
        "policy_chosen_logp": chosen,
        "policy_rejected_logp": rejected,
        "ref_chosen_logp": batch.ref_chosen_logp,
        "ref_rejected_logp": batch.ref_rejected_logp,
        "chosen_length": jnp.asarray([1, 5, 2, 4]),
        "rejected_length": jnp.asarray([4, 2, 5, 1]),
    }
    names = loss_fn.__code__.co_varnames[: loss_fn.__code__.co_argcount]
    expected, _ = loss_fn(**{name: known[name] for name in names}, beta=0.3)
    update = preference.make_update(preference.Config(loss_fn=member), tabular.score, optax.identity())
    state = preference.init(params, optax.identity(), jax.random.key(0))
    _, metrics = update(state, preference.Hyper(beta=0.3), batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_masked_pairs_do_not_count():
    update = preference.make_update(preference.Config(), tabular.score, optax.identity())
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
    kto = unpaired.make_update(unpaired.Config(), tabular.score, optax.identity())
    with pytest.raises(ValueError, match="mismatched"):
        kto(state, unpaired.Hyper(), batch)
    bco = unpaired.make_update(unpaired.Config(shift_decay=0.75), tabular.score, optax.identity())
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


def test_a_judge_s_choice_decides_which_is_chosen():
    first, second = tabular.rows(1, (1, 2)), tabular.rows(2, (3, 4))
    pairs = selection.judged(first, second, jnp.asarray([True, False]))
    np.testing.assert_array_equal(pairs.chosen.tokens, jnp.stack([first.tokens[0], second.tokens[1]]))
    np.testing.assert_array_equal(pairs.rejected.mask, jnp.stack([second.mask[0], first.mask[1]]))


def test_only_answers_that_are_good_enough_are_imitated():
    sequences = rollout_of(tabular.init()).sequences
    best, counts = selection.best_of_group(sequences, GROUPED, at_least=2.0)
    np.testing.assert_array_equal(counts, [True, False, True])
    np.testing.assert_array_equal(best.tokens, sequences.tokens[jnp.asarray([1, 4, 8])])
    assert not best.mask[1].any()
    assert best.mask[0].any()
    every, counts = selection.all_above(sequences, GROUPED, at_least=2.0)
    np.testing.assert_array_equal(counts, GROUPED.reshape(-1) >= 2)
    np.testing.assert_array_equal(every.mask.any(axis=1), counts)


def test_prompts_whose_answers_differ_come_first():
    chosen, differ = selection.groups_that_differ(GROUPED, 2)
    np.testing.assert_array_equal(chosen, [0, 2])
    np.testing.assert_array_equal(differ, [True, True])
    chosen, differ = selection.groups_that_differ(GROUPED, 3)
    np.testing.assert_array_equal(chosen, [0, 2, 1])
    np.testing.assert_array_equal(differ, [True, True, False])
