"""GRPO with tools from its command line and from Python, and the pipeline with a calculator."""

import json

import calculator
import pytest
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import option_checks, option_groups, tool_use
from rlhf_jax.stages.entry import Given

EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"
SMALL = (
    "--sft-steps 4 --demonstrations 64 --prompt-count 16 --eval-prompts 4 --batch-size 2 --group-size 4 "
    "--max-new-tokens 12 --response-length 40 --steps 2 --quiet "
    "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1"
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"prompt": f"{a}+{a}=?", "answer": str(2 * a)} for a in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options_for(talker, problems, out, *more):
    usual = f"--out {out} --model {talker} --data {problems} --rewards {EXACT} --samples 0 "
    usual += "--tools rlhf_jax.tool_use:calculator --batch-size 2 --group-size 2 --max-new-tokens 6 "
    usual += "--response-length 16 --steps 2 --save-every 1 --quiet --no-report "
    usual += "--optimizer.warmup-steps 0 --learning-rate 3e-4 --optimizer.total-steps 2"
    return tyro.cli(tool_use.Options, args=[*usual.split(), *map(str, more)])


@pytest.mark.slow
def test_a_run_on_data_of_ones_own_and_its_resume(talker, problems, tmp_path):
    adapter = ("--adapter.kind", "lora", "--algorithm", "rloo")
    looked = ("--eval-data", problems, "--eval-count", 2, "--samples", 2)
    whole = tool_use.run(options_for(talker, problems, tmp_path / "whole", *adapter, *looked))
    tool_use.run(options_for(talker, problems, tmp_path / "halves", *adapter, "--steps", 1))
    tool_use.run(options_for(talker, problems, tmp_path / "halves", *adapter, "--resume"))
    last = [read_metrics(folder)[-1] for folder in (whole.folder, tmp_path / "halves")]
    assert all(last[0][name] == last[1][name] for name in ("loss", "reward", "turns"))
    assert last[0]["sampling_logp_diff"] < 1e-4
    assert 0 <= last[0]["eval/tool_use"] <= 1
    assert len(json.loads((whole.folder / "samples.json").read_text())) == 2
    assert json.loads((whole.folder / "model.json").read_text())["adapter"]


@pytest.mark.slow
def test_callables_in_the_place_of_names(talker, problems, tmp_path):
    seen = []

    def note(text: str) -> str:
        """Takes a note."""
        return text

    def judge(prompts, completions, conversation, answer, **fields):
        seen.extend(zip(completions, conversation, answer, strict=True))
        return [float(len(text)) for text in conversation]

    options = options_for(talker, problems, tmp_path / "run", "--steps", 1, "--algorithm", "remax")
    rows = [{"prompt": f"{a}+1=?", "answer": "9"} for a in range(4)]
    tool_use.run(options, Given(tools=[note], rewards=[judge], rows=rows))
    assert len(seen) == 4 + 2  # of ReMax, also the most likely conversation about each prompt
    assert all(answer == "9" and completion in whole for completion, whole, answer in seen)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-turns", 0), "--max-turns 0 is out of range: give 1 or more"),
        (("--tool-timeout", 0), "--tool-timeout 0 is out of range: give a number above 0"),
        (("--response-length", 3), "--response-length 3 is below --max-new-tokens 6"),
        (("--tools",), "nothing to call: give --tools"),
        (("--tools", "rlhf_jax.tool_use:calculater"), "nearest name is calculator"),
        (("--rewards",), "nothing says what an answer is worth"),
    ],
)
def test_mistakes_are_one_sentence(talker, problems, tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        tool_use.run(options_for(talker, problems, tmp_path, *words))


def test_what_must_be_given(tiny, monkeypatch, capsys):
    assert tiny.main("tool_use", ["--out", "x"], monkeypatch) == 2
    assert "--model and --data and --tools must be given" in capsys.readouterr().err


def test_help_shows_every_option(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main("tool_use", ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    options = tool_use.Options(model="x", prompts=option_groups.PromptOptions("x"), tools=("x",))
    for flag in option_checks.flags(option_checks.to_json(options)):
        assert flag in shown, flag


def run_pipeline(words):
    calculator.run(tyro.cli(calculator.Options, args=words.split()))


@pytest.mark.slow
def test_a_run_from_nothing(tmp_path):
    run_pipeline(f"--out {tmp_path} {SMALL}")
    last = read_metrics(tmp_path / "grpo")[-1]
    assert last["sampling_logp_diff"] < 1e-4
    assert 0 <= last["eval/tool_use"] <= 1
    assert len(json.loads((tmp_path / "grpo" / "samples.json").read_text())) == 4
    assert json.loads((tmp_path / "sft" / "model.json").read_text())["kind"] == "policy"


@pytest.mark.slow
def test_the_policy_learns_to_call_the_calculator(tmp_path):
    run_pipeline(f"--out {tmp_path} --quiet")
    metrics = read_metrics(tmp_path / "grpo")
    assert metrics[1]["tool_use"] < 0.6
    assert metrics[-1]["tool_use"] > 0.8
    assert metrics[-1]["eval/score"] > 0.75
