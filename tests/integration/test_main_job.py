"""The main job end to end on little data: what it writes, and that it goes on where it stopped."""

import dataclasses
import functools
import json

import pytest
import rlhf

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.stages import dpo, grpo, option_groups, ppo, reward_model, sft

STEPS = {"sft_steps": 3, "reward_steps": 2, "ppo_steps": 1, "dpo_steps": 2, "grpo_steps": 1}


@pytest.fixture
def small(monkeypatch):
    """The same stages, on less."""
    arch = option_groups.ArchOptions(width=16, layers=1, heads=2, kv_heads=1)
    pairs = option_groups.PairOptions("", pair_count=32, eval_count=8)
    prompts = functools.partial(option_groups.PromptOptions, prompt_count=32, eval_count=8)
    monkeypatch.setattr(option_groups, "PairOptions", lambda data: dataclasses.replace(pairs, data=data))
    monkeypatch.setattr(option_groups, "PromptOptions", prompts)
    for stage, more in (
        (sft, {"arch": arch, "demonstrations": 64}),
        (reward_model, {}),
        (ppo, {}),
        (dpo, {}),
        (grpo, {"group_size": 2}),
    ):
        monkeypatch.setattr(stage, "Options", functools.partial(stage.Options, batch_size=8, **more))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_main_job_writes_everything_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    options = rlhf.Options(out, eval_prompts=8, quiet=True, **STEPS)
    rlhf.run(options)

    summary = json.loads((out / "summary.json").read_text())
    for method in ("sft", "ppo", "dpo", "grpo"):
        assert summary[method].keys() >= {"exact_match", "kl", "length", "seconds"}
        assert len(summary[method]["exact_match"]) == 1
    assert summary["sft"]["kl"] == [0.0]
    assert 0 <= summary["reward_model"]["pair_accuracy"][0] <= 1
    page = (out / "report.html").read_text()
    assert "GRPO" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    samples = json.loads((out / "samples.json").read_text())
    assert set(samples[0]["completions"]) == {"sft", "ppo", "dpo", "grpo"}
    assert "KL to reference" in capsys.readouterr().out

    with pytest.raises(UserError, match="--resume"):
        rlhf.run(options)
    # A stage that was not measured is run again from its checkpoint; the others are not.
    results = out / "seed_0" / "results.json"
    kept = json.loads(results.read_text())
    write_json(results, {name: kept[name] for name in kept if name != "grpo"})
    rlhf.run(rlhf.Options(out, eval_prompts=8, quiet=True, resume=True, **STEPS))
    again = json.loads(results.read_text())
    assert again["sft"] == kept["sft"]
    assert {k: v for k, v in again["grpo"].items() if k != "seconds"} == {
        k: v for k, v in kept["grpo"].items() if k != "seconds"
    }


def test_impossible_numbers_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--ppo-steps 0 is not positive"):
        rlhf.run(rlhf.Options(tmp_path, ppo_steps=0))
