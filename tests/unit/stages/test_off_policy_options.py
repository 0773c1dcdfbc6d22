"""Options of the GRPO family: corrections, rejection, masks, and parameters of single variants."""

import numpy as np
import pytest

from rlhf_jax.algorithms import group_advantages
from rlhf_jax.core.errors import UserError
from rlhf_jax.losses.corrections import PRESETS, RULES, WEIGHTS
from rlhf_jax.stages import grpo, grpo_options, option_groups
from rlhf_jax.stages.off_policy_options import OffPolicyOptions
from rlhf_jax.stages.variant_options import ReplayOptions, VariantOptions


def variant(off_policy=None, own=None, **options):
    prompts = option_groups.PromptOptions(data="rows.jsonl", max_new_tokens=8)
    given = {"off_policy": OffPolicyOptions(**off_policy)} if off_policy else {}
    given |= {"variant": VariantOptions(**own)} if own else {}
    return grpo_options.variant_of(
        grpo.Options(model="x", prompts=prompts, learning_rate=1.0, **given, **options)
    )


def test_without_options_nothing_is_corrected_and_stale_answers_are_by_tis():
    assert variant().config.correction is None
    stale = variant(one_step_off_policy=True)
    assert stale.config.correction.weight_fn is WEIGHTS["token_truncate"]
    assert stale.hyper.is_clip_high == 2
    assert (
        variant({"importance_sampling_correction": "none"}, one_step_off_policy=True).config.correction
        is None
    )
    # DPPO and M2PO look to the sampler already.
    for name in ("dppo_tv", "m2po"):
        own = variant(algorithm=name, one_step_off_policy=True).config.correction
        assert own.bypass
        assert own.weight_fn is None


def test_a_preset_brings_its_numbers_and_options_replace_them():
    name = {"importance_sampling_correction": "seq_is_rs"}
    plain, changed = variant(name), variant({**name, "is_clip_high": 3.0, "rejection_high": (4.0,)})
    assert plain.config.correction == PRESETS["seq_is_rs"].correction
    assert (plain.hyper.is_clip_high, plain.hyper.rejection_low, plain.hyper.rejection_high) == (2, 0.5, 2)
    assert (changed.hyper.is_clip_high, changed.hyper.rejection_high) == (3, 4)


def test_rules_stand_alone_or_beside_a_weight_with_a_threshold_each():
    rules = ("token_k1", "seq_max_k2")
    thresholds = {"rejection_low": (0.5, 0.0), "rejection_high": (2.0, 0.3)}
    alone = variant({"rejection_rules": rules, **thresholds})
    assert alone.config.correction.rules == (RULES["token_k1"], RULES["seq_max_k2"])
    assert alone.config.correction.weight_fn is None
    np.testing.assert_allclose(alone.hyper.rejection_high, [2.0, 0.3])
    np.testing.assert_allclose(alone.hyper.rejection_low, [0.5, 0.0])
    beside = variant({"importance_sampling_correction": "tis", "rejection_rules": rules, **thresholds})
    assert beside.config.correction.weight_fn is WEIGHTS["token_truncate"]


def test_masks_are_leaves_and_variants_keep_their_own():
    masks = {"off_policy_threshold": 0.5, "top_entropy_fraction": 0.2}
    hyper = variant(masks).hyper
    assert (hyper.off_policy_threshold, hyper.top_entropy_fraction) == (0.5, 0.2)
    assert variant().hyper.second_moment_threshold is None
    assert variant(algorithm="m2po").hyper.second_moment_threshold == 0.04
    assert variant({"second_moment_threshold": 0.1}, algorithm="m2po").hyper.second_moment_threshold == 0.1


def test_parameters_of_single_variants():
    assert variant(algorithm="cppo", num_kept=3).config.num_kept == 3
    assert variant(num_kept=2).config.num_kept == 2  # pruning goes with any of them
    gfpo = variant(algorithm="gfpo", num_kept=5, gfpo_metric="most_efficient").config
    assert gfpo.num_kept == 0
    assert gfpo.advantage_fn.keywords == {"keep": 5, "metric_fn": group_advantages.most_efficient}
    assert variant(algorithm="dro", dro_tau=0.3).hyper.surrogate_params == {"tau": 0.3}
    assert variant(algorithm="pass_at_k", pass_at=4).config.advantage_fn.args == (4,)
    pruned = grpo.Options(
        model="x",
        prompts=option_groups.PromptOptions(data="x"),
        num_kept=3,
        num_minibatches=5,
        learning_rate=1.0,
    )
    with pytest.raises(UserError, match=r"--batch-size x --num-kept 96 .* --num-minibatches 5"):
        grpo_options.check(pruned, "grpo")


@pytest.mark.parametrize(
    ("off_policy", "options", "message"),
    [
        ({"importance_sampling_correction": "tiss"}, {}, "nearest name is tis"),
        ({"rejection_rules": ("token_k1",)}, {}, "give rejection_high as well"),
        ({"is_clip_high": 2.0}, {}, "--is-clip-high: there is no correction"),
        (
            {"rejection_rules": ("token_k1", "token_k2", "token_k3"), "rejection_high": (2.0, 0.3)},
            {},
            "--rejection-high: 2 thresholds for 3 rules",
        ),
        ({"top_entropy_fraction": 1.5}, {}, "--top-entropy-fraction 1.5: give a share"),
        (None, {"dro_tau": 1.0}, "--dro-tau is no parameter of --algorithm grpo"),
        (None, {"algorithm": "gfpo", "pass_at": 2}, "--pass-at is no parameter of --algorithm gfpo"),
        (None, {"num_kept": 9}, "num_kept 9: give 0 for all, or up to group_size"),
    ],
)
def test_what_does_not_fit_is_refused(off_policy, options, message):
    with pytest.raises(UserError, match=message):
        variant(off_policy, **options)


def test_parts_of_single_variants_are_leaves_that_go_with_any():
    numbers = {"clip_cov_fraction": 0.1, "clip_cov_low": 0.5, "clip_cov_high": 9.0, "kl_cov_fraction": 0.2}
    numbers |= {"kl_cov_coef": 0.3, "target_entropy": 0.4, "entropy_coef_step": 0.01}
    numbers |= {"kl_target": 3.0, "kl_horizon": 99.0}
    hyper = variant(own=numbers).hyper
    assert {name: getattr(hyper, name) for name in numbers} == numbers
    assert variant(algorithm="clip_cov").hyper.clip_cov_fraction == 2e-4
    assert variant(algorithm="kl_cov").hyper.kl_cov_fraction == 2e-3
    own = {"advantage_beta": 0.02, "value_beta": 0.7, "reference_samples": 3}
    regressed = variant(own=own, algorithm="a_star_po", group_size=1)
    assert (regressed.hyper.surrogate_params, regressed.reference_samples) == ({"beta": 0.02}, 3)
    assert regressed.hyper.value_beta == 0.7
    assert regressed.config.ratio_to_reference


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ({"clip_cov_low": 0.5}, {}, "--clip-cov-low acts on nothing here: give --clip-cov-fraction"),
        ({"kl_cov_coef": 0.5}, {}, "--kl-cov-coef acts on nothing here: give --kl-cov-fraction"),
        ({"value_beta": 0.5}, {}, "--value-beta acts on nothing here: give --algorithm a_star_po"),
        ({"entropy_coef_step": 0.1}, {}, "--entropy-coef-step acts on nothing here: give --target-entropy"),
        ({"kl_target": 6.0}, {"kl_coef": 0.0}, "--kl-target acts on nothing here: give --kl-coef"),
        ({"reference_samples": 4}, {}, "--reference-samples is no parameter of --algorithm grpo"),
    ],
)
def test_a_number_that_acts_on_nothing_is_refused(own, options, message):
    with pytest.raises(UserError, match=message):
        variant(own=own, **options)


def test_replayed_groups_are_rows_of_a_step(tmp_path):
    shared = {"model": "x", "prompts": option_groups.PromptOptions(data="x"), "learning_rate": 1.0}
    run = option_groups.RunOptions(tmp_path / "run")

    def options(batch_size=8, num_minibatches=1, **replay):
        given = {"batch_size": batch_size, "group_size": 4, "num_minibatches": num_minibatches, "run": run}
        return grpo.Options(**shared, **given, replay=ReplayOptions(**replay))

    half = options(replay_share=0.5, num_minibatches=3)
    made = grpo_options.variant_of(half)
    assert made.config.num_replayed == 4
    assert grpo_options.rows_of(half, made)[0] == 48
    grpo_options.check(half, "grpo")
    buffer = grpo.empty_replay(half, made, 10)
    assert buffer.batch.old_logp.shape == (4 * 8 * 4, 10)
    assert grpo.empty_replay(options(), grpo_options.variant_of(options()), 10) is None
    for replay, message in (
        ({"replay_share": 0.01}, "--replay-share 0.01: that is no group of --batch-size 8"),
        ({"replay_capacity": 9}, "--replay-share 0: that is no group"),
        ({"replay_share": 0.5, "replay_capacity": 5}, "--replay-capacity 5: give --batch-size 8 or more"),
        (
            {"replay_share": 0.5, "num_minibatches": 5},
            r"--replay-share\) x --batch-size x --group-size 48",
        ),
    ):
        with pytest.raises(UserError, match=message):
            grpo_options.check(options(**replay), "grpo")


def test_rewards_taken_apart_have_no_penalty_beside_them():
    options = grpo.Options(
        model="x",
        prompts=option_groups.PromptOptions(data="x"),
        algorithm="gdpo",
        overlong_penalty_coef=0.5,
        learning_rate=1.0,
    )
    with pytest.raises(UserError, match="--algorithm gdpo takes each reward apart"):
        grpo_options.check(options, "grpo")
