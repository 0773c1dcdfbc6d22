"""The study of distillation: its data, a small one run, and what it leaves."""

import json

import distillation
import pytest

from rlhf_jax.core.errors import UserError

SMALL = {"seeds": 1, "steps": 2, "batch_size": 4, "student_steps": 3, "teacher_steps": 3, "eval_prompts": 8}


def test_the_student_is_careless_and_can_read_demonstrations():
    rows = [[message["content"] for message in row["messages"]] for row in distillation.student_rows(0)]
    plain, shown = rows[:8_000], rows[8_000:]
    wrong = sum(eval(asked.removesuffix("=?")) != int(said.split("#### ")[1]) for asked, said in plain)
    assert 0.2 < wrong / len(plain) < 0.8
    assert all(asked.endswith(said) and asked.count("=?\n\n") == 1 for asked, said in shown)


def test_what_is_held_out_is_in_no_row(tmp_path):
    options = distillation.Options(out=tmp_path, eval_prompts=64)
    distillation.write_data(options)
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    held_out = {line["prompt"] for line in lines}
    assert len(lines) == 64
    seen = (tmp_path / "teacher.jsonl").read_text() + (tmp_path / "prompts.jsonl").read_text()
    seen += json.dumps(distillation.student_rows(0))
    assert not [prompt for prompt in held_out if f'"{prompt}' in seen]


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ways gkd: choose among sequence"):
        distillation.run(distillation.Options(out=tmp_path, ways=("gkd",)))


@pytest.mark.slow
def test_a_small_study_is_run_once(tmp_path, monkeypatch):
    options = distillation.Options(
        out=tmp_path, ways=("uld", "self_distillation"), search=False, quiet=True, **SMALL
    )
    distillation.run(options)
    table = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| student",
        "| uld",
        "| self_distillation",
    ]
    assert (tmp_path / "scores.svg").stat().st_size > 5_000
    monkeypatch.setattr(distillation.distill, "run", None)
    distillation.run(options)
    assert (tmp_path / "table.md").read_text() == table
