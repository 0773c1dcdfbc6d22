"""Online DPO, XPO and Nash-MD from the command line: by rewards, by a judge, resumed, and refused."""

import typing

import jax
import numpy as np
import pytest
import tyro

from rlhf_jax.metrics import read_metrics
from rlhf_jax.metrics.completions import read_completions
from rlhf_jax.stages import online_dpo
from rlhf_jax.training.run_folder import load_policy

TINY = "--prompt-count 64 --eval-count 8 --max-new-tokens 8 --samples 2 --optimizer.warmup-steps 0"
TINY += (
    " --optimizer.schedule constant --batch-size 8 --save-every 3 --quiet --no-report --learning-rate 1e-2"
)
TINY += " --data arithmetic:1 --optimizer.b2 0.99 --optimizer.epsilon 1e-4 --beta 0.5"
METHODS = ("dpo", "xpo", "nash_md")

FUNCTIONS = """
def mixed(prompts, completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]

def equal(prompts, completions, **_):
    return [1.0] * len(completions)

def judge(prompts, completions, *, opponents, answer, **_):
    assert len(opponents) == len(completions) == len(answer)
    return [0.9 if len(text) >= len(other) else 0.2 for text, other in zip(completions, opponents)]

def sure(prompts, completions, **_):
    return [2.0] * len(completions)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "online_functions.py").write_text(FUNCTIONS)
    return "online_functions"


def words(tiny, out, *more):
    return [*f"--out {out} --model {tiny.finished('sft')} {TINY}".split(), *map(str, more)]


def run(tiny, out, *more):
    online_dpo.run(tyro.cli(online_dpo.Options, args=words(tiny, out, *more)))
    steps = [line for line in read_metrics(out) if line["step"]]  # but for the first evaluation
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in steps]


def test_methods_are_those_that_are_tested():
    field = next(f for f in online_dpo.dataclasses.fields(online_dpo.Options) if f.name == "method")
    assert typing.get_args(field.type) == METHODS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_by_rewards_and_resumed_to_the_bit(method, tiny, tmp_path, functions):
    more = ("--method", method, "--rewards", f"{functions}:mixed", "--eval-every", 100)
    more += ("--beta", 0.02 if method == "nash_md" else 0.5)
    whole = run(tiny, tmp_path / "whole", *more, "--steps", 5)
    run(tiny, tmp_path / "broken", *more, "--steps", 3)
    broken = run(tiny, tmp_path / "broken", *more, "--steps", 5, "--resume")
    for ours, theirs in zip(broken, whole, strict=True):
        assert {k: v for k, v in ours.items() if "eval" not in k} == {
            k: v for k, v in theirs.items() if "eval" not in k
        }
    first, last = (load_policy(tmp_path / name).params for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, first, last)
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert abs(whole[-1]["kl"]) > 1e-3
    assert all(line["skipped"] == 0 and 0 <= line["win_rate"] <= 1 for line in whole)
    if method != "nash_md":
        assert whole[0]["loss"] == pytest.approx(0.693, abs=0.1)
    table = read_completions(tmp_path / "whole")[5]
    assert np.mean([row["kl"] for row in table]) == pytest.approx(whole[-1]["kl"], abs=1e-5)
    assert np.mean([row["reward"] for row in table]) == pytest.approx(whole[-1]["reward"], abs=1e-6)
    assert all({"opponent", "preference", "logp"} <= row.keys() for row in table)
    assert [sum(row["token/logp"]) for row in table] == pytest.approx(
        [row["logp"] for row in table], abs=1e-4
    )


@pytest.mark.slow
def test_a_judge_and_answers_that_are_all_equal(tiny, tmp_path, functions):
    judged = run(tiny, tmp_path / "judged", "--judge", f"{functions}:judge", "--steps", 2)
    # Asked in both orders: 0.9 and 0.2 become 0.85 and 0.15, two equally long answers 1/2.
    assert all("reward" not in line and line["order_bias"] <= 0.8 for line in judged)
    assert not any("reward" in row for row in read_completions(tmp_path / "judged")[2])
    tied = run(tiny, tmp_path / "tied", "--rewards", f"{functions}:equal", "--steps", 2)
    assert all(line["ties"] == 1 and line["loss"] == 0 and line["skipped"] == 0 for line in tied)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_policy(tmp_path / "tied").params,
        load_policy(tiny.finished("sft")).params,
    )


@pytest.mark.slow
def test_an_adapter(tiny, tmp_path, functions):
    lora = ("--adapter.kind", "lora", "--adapter.rank", 2, "--method", "nash_md", "--steps", 2)
    found = run(tiny, tmp_path / "run", *lora, "--rewards", f"{functions}:mixed")
    assert all(np.isfinite(line["loss"]) for line in found)


def test_mistakes_are_sentences(tiny, tmp_path, functions, monkeypatch, capsys):
    def refused(*more):
        assert tiny.main("online_dpo", words(tiny, tmp_path / "out", *more), monkeypatch) == 2
        return capsys.readouterr().err

    assert "dpo_loss has no parameter alpha: it has label_smoothing" in refused("--alpha", 0.5)
    assert "--alpha means nothing to --method nash_md" in refused("--method", "nash_md", "--alpha", 0.5)
    assert "--judge excludes --rewards" in refused("--judge", "x:y", "--rewards", "z:u")
    assert "does not exist in" in refused("--judge", f"{functions}:nobody")


def test_help_shows_every_option(monkeypatch, capsys, tiny):
    from rlhf_jax.stages import option_checks, option_groups

    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main("online_dpo", ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for flag in option_checks.flags(
        option_checks.to_json(online_dpo.Options(model="x", prompts=option_groups.PromptOptions("x")))
    ):
        assert flag in shown, flag
