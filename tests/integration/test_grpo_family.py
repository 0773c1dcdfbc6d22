"""Every variant of GRPO from the command line, dynamic sampling, and answers one step behind."""

import numpy as np
import pytest

from rlhf_jax.algorithms.grpo_variants import grpo_variants, make_variant
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.training.run_folder import load_policy

CONSTANT = ("--optimizer.schedule", "constant")

REWARD = """
def mixed(prompts, completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]

def equal(prompts, completions, **_):
    return [0.5] * len(completions)

def rare(prompts, completions, **_):
    return [float(text[:1] == "7") for text in completions]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "family_rewards.py").write_text(REWARD)
    return "family_rewards:mixed"


def lines(folder):
    """Of the steps; the first evaluation, before them, has a line of its own."""
    steps = [line for line in read_metrics(folder) if line["step"]]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in steps]


def check_resume(tiny, tmp_path, *words):
    """Three steps and two more are five, to the bit."""
    words = (*words, *CONSTANT, "--eval-every", 100)
    whole = tiny.run("grpo", tmp_path / "whole", *words, "--steps", 5)
    tiny.run("grpo", tmp_path / "broken", *words, "--steps", 3)
    broken = tiny.run("grpo", tmp_path / "broken", *words, "--steps", 5, "--resume")
    for ours, theirs in zip(lines(broken), lines(whole), strict=True):
        assert {k: v for k, v in ours.items() if "eval" not in k} == {
            k: v for k, v in theirs.items() if "eval" not in k
        }
    import jax

    jax.tree.map(np.testing.assert_array_equal, load_policy(broken).params, load_policy(whole).params)
    return lines(whole)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", grpo_variants())
def test_every_member_learns_from_its_own_numbers(algorithm, tiny, tmp_path, rewards):
    words = ("--rewards", rewards, "--steps", 3, "--algorithm", algorithm, "--dynamic-sampling-max-rounds", 2)
    words += ("--group-size", 8) if algorithm == "pass_at_k" else ()
    out = tiny.run("grpo", tmp_path / "run", *words, "--learning-rate", 1e-2, "--num-iterations", 2)
    found = lines(out)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in found)
    assert any(line["gradient_norm"] > 0 for line in found)
    assert all(line["epochs_done"] == 2 for line in found)
    assert ("overlong" in found[0]) == (algorithm == "dapo")


@pytest.mark.slow
def test_dynamic_sampling_draws_again_and_resumes_to_the_bit(tiny, tmp_path, rewards):
    words = ("--rewards", "family_rewards:rare", "--algorithm", "dapo", "--dynamic-sampling-max-rounds", 4)
    found = check_resume(tiny, tmp_path, *words)
    assert max(line["draws"] for line in found) > 1
    for line in found:
        assert line["frac_reward_zero_std"] <= line["drawn_frac_reward_zero_std"]
        assert line["overlong"] <= 0


@pytest.mark.slow
def test_one_step_behind_is_corrected_and_resumes_to_the_bit(tiny, tmp_path, rewards):
    words = (
        "--rewards",
        rewards,
        "--one-step-off-policy",
        "--learning-rate",
        1e-2,
        "--optimizer.epsilon",
        1e-8,
    )
    found = check_resume(tiny, tmp_path, *words)
    assert found[0]["sampling_logp_diff"] < 1e-4  # the first answers are the policy's own
    assert all(line["sampling_logp_diff"] > 1e-3 for line in found[1:])
    assert found[0]["is_ratio"] == pytest.approx(1, abs=1e-4)
    assert all(line["is_ratio"] != pytest.approx(1, abs=1e-4) for line in found[1:])


@pytest.mark.slow
def test_rules_and_masks_act_on_stale_answers_and_say_so(tiny, tmp_path, rewards):
    words = ("--rewards", rewards, "--steps", 9, "--one-step-off-policy", "--learning-rate", 1e-2)
    rules = ("--importance-sampling-correction", "seq_is", "--rejection-rules", "seq_sum_k1", "token_k2")
    bounds = ("--rejection-low", 0.97, 0, "--rejection-high", 1.03, 1e-4)
    masks = ("--off-policy-threshold", 0.0, "--top-entropy-fraction", 0.5)
    words = (*words, *rules, *bounds, *masks, *CONSTANT, "--optimizer.epsilon", 1e-8)
    out = tiny.run("grpo", tmp_path / "run", *words)
    first, *stale = lines(out)
    assert first["rejected"] == 0
    assert any(0 < line["off_policy_masked"] < 1 for line in stale)  # answers of negative advantage alone
    assert first["ess"] == pytest.approx(1, abs=1e-4)
    for line in stale:
        assert 0 < line["rejected"] <= 1
        assert line["ess"] < 1 - 1e-6
        assert line["ratio_q01"] < line["ratio_q50"] < line["ratio_q99"]
        assert np.isfinite([line["chi2_token"], line["chi2_sequence"], line["perplexity_gap"]]).all()


@pytest.mark.slow
def test_one_step_behind_with_an_adapter_keeps_the_adapter_alone(tiny, tmp_path, rewards):
    words = ("--rewards", rewards, "--one-step-off-policy", "--adapter.kind", "lora", "--adapter.rank", 2)
    found = check_resume(tiny, tmp_path, *words, "--learning-rate", 1e-2)
    assert found[-1]["sampling_logp_diff"] > 1e-5


@pytest.mark.slow
def test_a_run_that_goes_wrong_says_so(tiny, tmp_path, rewards, capfd):
    equal = ("--rewards", "family_rewards:equal", "--steps", 6, "--no-quiet", "--report")
    out = tiny.run("grpo", tmp_path / "equal", *equal)
    assert [line["step"] for line in read_metrics(out) if line.get("health/zero_std_groups")] == [5, 6]
    assert capfd.readouterr().err.count("warning: step 5: groups of equal rewards: in 100%") == 1
    assert "groups of equal rewards</b>, steps 5 to 6" in (out / "report.html").read_text()

    wild = ("--learning-rate", 1.0, "--kl-coef", 1e-6, "--num-iterations", 2, "--optimizer.warmup-steps", 0)
    out = tiny.run("grpo", tmp_path / "wild", "--rewards", rewards, *wild, *CONSTANT, "--steps", 8)
    assert any(line.get("health/kl_explosion") for line in read_metrics(out))


def test_published_numbers_hold_unless_they_are_replaced(tmp_path):
    def hyper(name, **changes):
        return make_variant(name, max_completion_length=8, changes=changes, group_size=2).hyper

    assert hyper("dapo").epsilon_high == 0.28
    assert hyper("dapo", epsilon_high=None, kl_coef=0.1).kl_coef == 0.1
    assert hyper("dapo", epsilon_high=0.4).epsilon_high == 0.4
    assert hyper("gspo").epsilon_low == 3e-4
    # Their KL is in the reward, so the loss has none.
    for name in ("reinforce++", "rloo", "remax"):
        assert hyper(name).kl_coef == 0 < hyper(name).reward_kl_coef
        assert hyper(name, kl_coef=0.5).kl_coef == 0
        assert hyper(name, kl_coef=0.5).reward_kl_coef == 0.5
    assert hyper("grpo", reward_kl_coef=0.5).kl_coef > 0


def test_impossible_options_of_the_family(tiny, tmp_path, monkeypatch, capsys):
    def refused(*words):
        start = ["--model", "x", "--out", tmp_path / "out", "--data", "arithmetic:1", "--rewards", "x:y"]
        assert tiny.main("grpo", [*start, *words], monkeypatch) == 2
        return capsys.readouterr().err

    assert "compares the answers to one prompt" in refused("--algorithm", "rloo", "--group-size", 1)
    assert "--dynamic-sampling-max-rounds 0 is out of range: give 1 or more" in refused(
        "--dynamic-sampling-max-rounds", 0
    )
    assert "nowhere" in refused("--algorithm", "remax", "--group-size", 1, "--model", "nowhere")


def test_options_put_other_parts_into_a_variant():
    from rlhf_jax.kernels import k1, k2
    from rlhf_jax.losses.reductions import constant_length, sequence_sum
    from rlhf_jax.stages import grpo, grpo_options, option_groups

    def config(**options):
        prompts = option_groups.PromptOptions(data="arithmetic:1", max_new_tokens=8)
        return grpo_options.variant_of(
            grpo.Options(model="x", prompts=prompts, learning_rate=1.0, **options)
        ).config

    plain = config()
    for options, name, part in (
        ({"kl_estimator": "k2"}, "kl_fn", k2),
        ({"kl_estimator": "k1", "kl_ratio_correction": True}, "kl_fn", k1),
        ({"importance_sampling_level": "sequence"}, "ratio_fn", config(algorithm="gspo").ratio_fn),
        ({"scale_rewards": "none"}, "advantage_fn", config(algorithm="dr_grpo").advantage_fn),
        ({"reduction": "sequence_sum"}, "reduce", sequence_sum),
    ):
        assert getattr(config(**options), name) is part
        assert getattr(plain, name) is not part
    assert config(algorithm="dr_grpo").reduce is constant_length(8)
    for options, message in (
        ({"kl_estimator": "k1"}, "--kl-estimator k1 has no gradient on average"),
        ({"kl_estimator": "exact", "kl_ratio_correction": True}, "leave it out of --kl-estimator exact"),
        ({"kl_top_k": 4}, "--kl-top-k is of --kl-estimator exact"),
        ({"algorithm": "rloo", "scale_rewards": "batch"}, "--scale-rewards is for algorithms whose baseline"),
        ({"algorithm": "gmpo", "importance_sampling_level": "sequence"}, "GMPO and VESPO"),
    ):
        with pytest.raises(UserError, match=message):
            config(**options)


@pytest.mark.slow
def test_moving_coefficients_and_reference_values_resume_to_the_bit(tiny, tmp_path, rewards):
    words = ("--rewards", rewards, "--learning-rate", 1e-2, "--algorithm", "a_star_po", "--group-size", 1)
    words += (
        "--reference-samples",
        2,
        "--advantage-beta",
        0.1,
        "--kl-coef",
        0.1,
        "--kl-target",
        9,
        "--kl-horizon",
        40,
    )
    found = check_resume(tiny, tmp_path, *words, "--target-entropy", 5, "--entropy-coef-step", 0.1)
    np.testing.assert_allclose([line["entropy_coef"] for line in found], [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    coefs = [line["kl_coef"] for line in found]
    np.testing.assert_allclose(coefs, 0.1 * 0.98 ** np.arange(5), rtol=1e-5)  # far below the target
    assert (tmp_path / "whole" / "reference_values.json").exists()


@pytest.mark.slow
def test_replayed_groups_resume_to_the_bit(tiny, tmp_path, rewards):
    words = ("--rewards", rewards, "--learning-rate", 1e-2, "--replay-share", 0.5, "--replay-capacity", 5)
    found = check_resume(tiny, tmp_path, *words, "--num-minibatches", 2)
    assert [line["replayed"] for line in found] == [0, 2, 2, 2, 2]
    assert found[-1]["ratio"] != 1


@pytest.mark.slow
def test_routing_replay_trains_a_mixture_of_experts_and_resumes_to_the_bit(tmp_path):
    import dataclasses

    import jax

    import rlhf_jax as rj
    from rlhf_jax import models
    from rlhf_jax.core.train_state import OptimizerConfig
    from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer

    tokenizer = arithmetic_tokenizer()
    dense = models.dense_config(vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2)
    mixture = models.MixtureOfExperts(4, 2, models.GatedFeedForward(8), models.SoftmaxRouter())
    config = dataclasses.replace(
        dense, pattern=(dataclasses.replace(dense.pattern[0], feed_forward=mixture),)
    )
    policy = models.make_policy(config, models.init_params(config, jax.random.key(0)), tokenizer)
    rows = [{"prompt": f"{a}+{a}=?"} for a in range(8)]

    def train(out, steps, **settings):
        options = {"batch_size": 4, "group_size": 2, "max_new_tokens": 3, "learning_rate": 1e-2}
        options |= {"steps": steps, "quiet": True, "report": False, "num_iterations": 2, **settings}
        options["optimizer"] = OptimizerConfig(schedule="constant", warmup_steps=0)
        rj.grpo(policy, rows, rewards=[lambda prompts, completions, **_: [len(set(c)) for c in completions]],
                out=out, **options)  # fmt: skip
        return [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(out)]

    whole = train(tmp_path / "whole", 3, routing_replay=True)
    train(tmp_path / "broken", 2, routing_replay=True)
    assert train(tmp_path / "broken", 3, routing_replay=True, resume=True) == whole
    assert all(line["sampling_logp_diff"] < 1e-3 for line in whole)
    # Experts are recorded where answers make room for each other, and replayed with groups.
    assert train(tmp_path / "refilled", 3, routing_replay=True, max_num_seqs=4) == whole
    again = train(tmp_path / "again", 3, routing_replay=True, replay_share=0.5)
    assert [line["replayed"] for line in again][1:] == [2, 2]
    with pytest.raises(UserError, match="does not tell which experts a token went through"):
        train(tmp_path / "refused", 1, routing_replay=True, engine="vllm:http://localhost:1")
