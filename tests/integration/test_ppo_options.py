"""PPO and GRPO with what stands beside rewards of answers: text, steps, a filter, a moving reference."""

import jax
import numpy as np
import pytest
import tyro

import rlhf_jax as rj
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import process_reward
from rlhf_jax.training.run_folder import load_reward_model

# Whether rewards of steps are right, no test here asks.
EVERYTHING = """
    --ptx-coef 0.5 --ptx-batch-size 3 --ptx-max-length 24 --process-reward-coef 0.5 --group-size 2
    --policy-filter best_worst --critic-gae-lambda 1 --gae-alpha 0.2 --positive-lm-coef 0.1
    --ref-model-sync-steps 3 --ref-model-mixup-alpha 0.5 --max-new-tokens 32
""".split()  # noqa: SIM905 (a list of literals would fill the screen)


@pytest.fixture
def words(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("12+34=46\n" * 100, encoding="utf-8")
    judge = tmp_path / "judge"
    learned = (
        f"--out {judge} --model {tiny.finished('sft')} --data arithmetic:1 --row-count 64 --batch-size 8"
    )
    options = [*learned.split(), "--steps", "2", "--quiet", "--no-report"]
    process_reward.run(tyro.cli(process_reward.Options, args=options))
    return (*EVERYTHING, "--ptx-data", text, "--process-reward", judge)


def objects(tiny):
    """(policy, process reward model, prompts, settings of a short quiet run)."""
    rows = [{"prompt": f"{number}+1=?"} for number in range(8)]
    settings = {"max_new_tokens": 32, "steps": 2, "learning_rate": 1e-2, "ref_model_sync_steps": 1}
    settings |= {"ref_model_mixup_alpha": 1.0, "quiet": True, "report": False, "log": ()}
    model = load_reward_model(tiny.finished("reward_model"))
    return rj.load(tiny.finished("sft")), model, rows, settings


@pytest.mark.slow
def test_ppo_with_everything_as_objects(tiny):
    policy, model, rows, settings = objects(tiny)
    trained = rj.ppo(
        policy,
        rows,
        process_reward=model,
        ptx_rows=[{"text": "12+34=46\n"}] * 40,
        ptx_coef=0.5,
        ptx_max_length=16,
        batch_size=4,
        group_size=2,
        policy_filter="best_worst",
        gae_alpha=0.2,
        critic_gae_lambda=1.0,
        **settings,
    )
    for line in trained.metrics[-2:]:
        assert line["reward"] == line["sampled_reward"] == 0
        assert line["step_reward"] > 0
        assert 0 < line["ptx_loss"] < 10
        assert line["skipped"] == 0
        assert line["kl"] == pytest.approx(0, abs=1e-4)  # the reference is where the policy is
    assert trained.metrics[-1]["ptx_loss"] < trained.metrics[-2]["ptx_loss"]


@pytest.mark.slow
def test_a_run_with_everything_goes_on_as_if_it_had_not_stopped(tiny, words, tmp_path):
    whole = tiny.run("ppo", tmp_path / "whole", "--steps", 6, "--optimizer.total-steps", 12, *words)
    halves, going_on = tmp_path / "halves", (*words, "--optimizer.total-steps", 12, "--resume")
    tiny.run("ppo", halves, "--steps", 3, "--optimizer.total-steps", 12, *words)
    with pytest.raises(UserError, match="--ptx-coef"):
        tiny.run("ppo", halves, *going_on, "--steps", 6, "--ptx-coef", 0.25)
    tiny.run("ppo", halves, *going_on, "--steps", 6)
    last = [read_metrics(folder)[-1] for folder in (whole, halves)]
    for name in ("loss", "ptx_loss", "kl", "step_reward", "sampled_reward"):
        assert last[0][name] == last[1][name], name
    (tmp_path / "text.txt").write_text("12+34=47\n" * 100, encoding="utf-8")
    with pytest.raises(UserError, match="resume with the same data"):
        tiny.run("ppo", halves, *going_on, "--steps", 9)


@pytest.mark.slow
def test_grpo_by_rewards_of_steps_alone(tiny):
    policy, model, rows, settings = objects(tiny)
    trained = rj.grpo(policy, rows, process_reward=model, batch_size=2, group_size=4, **settings)
    first, second = trained.metrics[-2:]
    assert first["reward"] == 0
    assert first["step_reward"] > 0
    assert first["loss"] != 0
    assert second["kl"] == pytest.approx(0, abs=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained.policy.params, policy.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--policy-filter", "best"), "raise --group-size"),
        (("--ref-model-sync-steps", 4, "--kl-coef", 0), "a reference that no KL is taken to"),
        (("--ref-model-mixup-alpha", 2), "is out of range: give a number above 0 to 1"),
        (("--ptx-data", "text.txt", "--ptx-batch-size", 3, "--micro-batches", 2), "--ptx-batch-size"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(tiny, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        tiny.run("ppo", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()
