"""R1 and R1-Zero: the picture, mistakes, and, slowly, a whole tiny job that goes on where it stopped."""

import dataclasses
import json

import pipeline_stages
import pytest
import r1
import r1_page

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.metrics import TableRow, write_report
from rlhf_jax.stages import option_groups

TINY = option_groups.ArchOptions(width=16, layers=1, heads=2, kv_heads=1)
STEPS = {
    "documents": 80,
    "base_steps": 40,
    "small_base_steps": 3,
    "zero_steps": 2,
    "cold_traces": 8,
    "cold_steps": 30,
    "reasoning_steps": 2,
    "chosen_prompts": 8,
    "chosen_steps": 2,
    "reward_steps": 2,
    "final_steps": 2,
    "student_steps": 2,
    "batch_size": 8,
    "eval_prompts": 8,
}


def test_rules_are_paths_with_weights_that_add_up_exactly():
    weights = [float(spec.partition("=")[2] or 1) for spec in r1.rules()]
    assert sum(weights) == r1.BEST
    assert [spec.partition("=")[0] for spec in r1.rules(language=0)] == [r1.ACCURACY, r1.FORMAT, r1.LANGUAGE]
    assert all("@sum" in spec for spec in r1.rules(kind="@sum"))


def test_the_picture_stands_in_the_report(tmp_path):
    for run in r1_page.RUNS:
        folder = tmp_path / "seed_0" / run
        folder.mkdir(parents=True)
        lines = [
            {"step": step, "stage": "grpo", **dict.fromkeys(r1_page.PANELS, 0.5)} for step in range(1, 4)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "curves.svg"
    r1_page.draw(picture, tmp_path, [0])
    row = TableRow("zero", (0.5, 0.4, 0.6), 1.0, 20.0, 3.0, shares={"Format": 0.875})
    page = write_report(tmp_path, [row], pictures={r1_page.CAPTION: picture}).read_text()
    assert "data:image/svg+xml;base64," in page
    assert "87.5%" in page
    for run in r1_page.RUNS:  # stages that run the same script are told apart
        assert f"{run.replace('_', ' ')} <" in page
    assert "step language reward" in page.replace("reward/", "")


def test_impossible_numbers_are_named(tmp_path):
    with pytest.raises(UserError, match="--cold-traces 0 is not positive"):
        r1.run(r1.Options(tmp_path, cold_traces=0))
    with pytest.raises(UserError, match=r"--chosen-prompts 9 is not divisible by --batch-size 8"):
        r1.run(r1.Options(tmp_path, batch_size=8, chosen_prompts=9))


@pytest.mark.slow
def test_the_whole_job_writes_everything_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(r1, "BEST", 0.0)  # so little training makes no good answers
    out = tmp_path / "run"
    options = r1.Options(out, arch=TINY, small_arch=TINY, quiet=True, **STEPS)
    r1.run(options)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {*r1.POLICIES, "reward_model"}
    for policy in r1.POLICIES:
        for share in ("exact_match", "sampled_exact_match", *r1.SHARES):
            assert 0 <= summary[policy][share][0] <= 1
    assert "data:image/svg+xml" in (out / "report.html").read_text()
    learnt = (out / "seed_0" / "chosen_sft" / "rows_1.jsonl").read_text().splitlines()
    kinds = {"?" in json.loads(line)["prompt"] and "=" in json.loads(line)["prompt"] for line in learnt}
    assert kinds == {True, False}  # sums and general prompts
    terms = json.loads((out / "seed_0" / "r1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/symbolic_reward@reasoning", "reward/reward_model@general"} <= terms.keys()

    with pytest.raises(UserError, match="--resume"):
        r1.run(options)
    file = out / "seed_0" / "results.json"
    kept = json.loads(file.read_text())
    write_json(file, {name: kept[name] for name in kept if name not in ("student", "r1")})
    r1.run(dataclasses.replace(options, resume=True))
    again = json.loads(file.read_text())
    for name in ("base", "r1", "student"):
        assert {k: v for k, v in again[name].items() if k != "seconds"} == {
            k: v for k, v in kept[name].items() if k != "seconds"
        }


def test_one_seed_has_an_interval_over_its_prompts():
    one, three = (
        pipeline_stages.share_interval([0.5], 100),
        pipeline_stages.share_interval([0.9, 1.0, 1.0], 100),
    )
    assert 0.4 < one.low < 0.5 < one.high < 0.6
    assert three.high == 1.0
    assert three.low < 0.9
