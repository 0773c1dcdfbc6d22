"""The script of process and outcome reward models, from its command line."""

import json

import pytest
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import option_checks, process_reward

_SMALL = "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --row-count 64 --eval-count 16 "
_LEARNING = (
    "--learning-rate 1e-3 --optimizer.schedule cosine --optimizer.end-lr-ratio 0.1 --optimizer.b2 0.95"
)
_SMALL += f"--batch-size 8 --optimizer.warmup-steps 2 --quiet --no-report --data arithmetic:1 {_LEARNING}"


def run(out, *more):
    words = f"--out {out} --steps 6 --save-every 3 {_SMALL}".split()
    process_reward.run(tyro.cli(process_reward.Options, args=[*words, *map(str, more)]))
    return out


@pytest.mark.slow
def test_a_run_and_its_resume(tmp_path):
    whole = run(tmp_path / "whole")
    halves = run(tmp_path / "halves", "--steps", 3, "--optimizer.total-steps", 6)
    run(tmp_path / "halves", "--resume", "--optimizer.total-steps", 6)
    last = [read_metrics(folder)[-1] for folder in (whole, halves)]
    assert last[0]["loss"] == last[1]["loss"]
    assert 0 <= last[0]["eval/step_accuracy"] <= 1
    curve = json.loads((whole / "calibration.json").read_text())
    assert sum(curve["counts"]) > 16
    assert json.loads((whole / "model.json").read_text())["kind"] == "reward_model"


@pytest.fixture
def socratic(tmp_path):
    """A file of GSM8K's kind."""
    rows = [
        {"question": f"{n} and 1?", "answer": f"How many? ** {n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(32)
    ]
    data = tmp_path / "socratic.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.mark.slow
def test_socratic_rows(socratic, tmp_path):
    out = run(tmp_path / "run", "--data", socratic, "--steps", 4)
    assert read_metrics(out)[-1]["eval/right_share"] > 0


def test_outcomes_are_those_of_the_last_step(socratic, tmp_path):
    def read(rows, *more):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["--out", str(tmp_path), "--data", str(path), "--eval-data", str(path), "--outcome", *more]
        train, held_out = process_reward.load_rows(tyro.cli(process_reward.Options, args=words))
        assert train == held_out
        return [row.fields["labels"] for row in train]

    steps = {"prompt": "1+1+1=?", "completions": ["1+1=2", "2+1=3", "#### 3"]}
    judged = [{**steps, "labels": [True, False, True]}, {**steps, "labels": [None, True, False]}]
    assert read(judged) == [[None, None, True], [None, None, False]]
    known = [{**steps, "answer": "3"}, {**steps, "answer": "4", "labels": [True, True, True]}]
    by_answer = ("--label-reward", "rlhf_jax.rewards.verifiers:exact_answer_reward")
    assert read(known, *by_answer) == [[None, None, True], [None, None, False]]
    with pytest.raises(UserError, match=r"rows.jsonl:1: the last of its labels is null"):
        read([{**steps, "labels": [True, True, None]}])
    with pytest.raises(UserError, match="the last of its labels is null"):
        run(tmp_path / "no", "--data", socratic, "--outcome")


@pytest.mark.slow
def test_an_outcome_model_of_rows_of_ones_own(tmp_path):
    steps = {"prompt": "1+1=?", "completions": ["1+1=2", "#### 2"]}
    rows = [{**steps, "labels": [True, number % 2 == 0]} for number in range(16)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(tmp_path / "run", "--data", path, "--eval-data", path, "--outcome", "--steps", 2)
    assert read_metrics(out)[-1]["eval/right_share"] == 0.5


def test_a_label_reward_that_labels_nothing(tmp_path):
    with pytest.raises(UserError, match="--label-reward means nothing here"):
        run(tmp_path / "run", "--label-reward", "my_rewards:exact")


def test_labels_by_rollouts_need_a_policy(tmp_path):
    for words in ((), ("--model", tmp_path, "--outcome")):
        with pytest.raises(UserError, match="give --model, and no --outcome"):
            run(tmp_path / "run", "--labels", "rollouts", *words)


@pytest.mark.slow
def test_labels_by_rollouts_are_kept(tiny, tmp_path):
    words = (
        f"--out {tmp_path / 'run'} --model {tiny.finished('sft')} --labels rollouts --rollouts 2 --steps 2"
    )
    words += f" --data arithmetic:1 --label-reward rlhf_jax.rewards.verifiers:exact_answer_reward {_LEARNING}"
    words += " --row-count 16 --eval-count 16 --batch-size 8 --optimizer.warmup-steps 1 --quiet --no-report"
    process_reward.run(tyro.cli(process_reward.Options, args=words.split()))
    rows = [json.loads(line) for line in (tmp_path / "run" / "labelled.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert all(row["labels"][-1] is None and len(row["labels"]) == 5 for row in rows)
    again = run(tmp_path / "again", "--data", tmp_path / "run" / "labelled.jsonl", "--steps", 4)
    assert 0 <= read_metrics(again)[-1]["eval/step_accuracy"] <= 1


def test_help_shows_every_option(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main("process_reward", ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for flag in option_checks.flags(option_checks.to_json(process_reward.Options(data="x"))):
        assert flag in shown, flag
