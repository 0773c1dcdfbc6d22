"""The script of GRPO with a calculator, from its command line."""

import json

import pytest
import tyro

from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import common, tool_use

_SMALL = (
    "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --sft-steps 4 --demonstrations 64 "
    "--prompt-count 16 --eval-count 4 --samples 2 --batch-size 2 --group-size 4 --max-new-tokens 12 "
    "--response-length 40 --optimizer.warmup-steps 1 --quiet --no-report"
)


@pytest.mark.slow
def test_a_run_from_nothing(tmp_path):
    words = f"--out {tmp_path} --steps 2 {_SMALL}".split()
    tool_use.run(tyro.cli(tool_use.Options, args=words))
    last = read_metrics(tmp_path)[-1]
    assert last["sampling_logp_diff"] < 1e-4
    assert 0 <= last["eval/tool_use"] <= 1
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 2
    assert json.loads((tmp_path / "sft" / "model.json").read_text())["kind"] == "policy"


def test_help_shows_every_option(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main("tool_use", ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for flag in common.flags(common.to_json(tool_use.Options())):
        assert flag in shown, flag


@pytest.mark.slow
def test_the_policy_learns_to_call_the_calculator(tmp_path):
    words = f"--out {tmp_path} --quiet --no-report".split()
    tool_use.run(tyro.cli(tool_use.Options, args=words))
    metrics = read_metrics(tmp_path)
    assert metrics[1]["tool_use"] < 0.6
    assert metrics[-1]["tool_use"] > 0.8
    assert metrics[-1]["eval/score"] > 0.75
