"""SFT on several sources: shares, the loss of each, and a resume in the middle."""

import json

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import inputs


@pytest.fixture
def sources(tmp_path):
    for name, sign, count in (("sums", "+", 30), ("products", "*", 8)):
        rows = [{"prompt": f"{a}{sign}{a % 4}=?", "completion": str(a % 10)} for a in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "sums.jsonl", tmp_path / "products.jsonl"


def lines(folder):
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(folder)]


@pytest.mark.slow
def test_a_mixture_trains_reports_each_source_and_resumes(sources, tiny, tmp_path, capsys):
    spec = ",".join(f"{path}={weight}" for path, weight in zip(sources, (0.75, 0.25), strict=True))
    words = ("--data", spec, "--tokenizer", tiny.finished("sft") / "tokenizer", "--batch-size", 4)
    words += ("--optimizer.schedule", "constant", "--optimizer.warmup-steps", 0)
    whole = tiny.run("sft", tmp_path / "whole", *words, "--steps", 6, "--no-quiet")
    shown = capsys.readouterr().out
    assert "75.0%" in shown
    assert "25.0%" in shown
    losses = lines(whole)
    assert all(line["loss/sums.jsonl"] > 0 and line["loss/products.jsonl"] > 0 for line in losses)
    tiny.run("sft", tmp_path / "broken", *words, "--steps", 3)
    resumed = tiny.run("sft", tmp_path / "broken", *words, "--steps", 6, "--resume")
    assert lines(resumed) == losses
    with pytest.raises(UserError, match="has --data"):
        tiny.run("sft", tmp_path / "broken", *words, "--data", spec.replace("0.25", "0.5"), "--resume")


def test_a_mixture_is_read_or_refused_in_one_sentence(sources, tmp_path):
    assert inputs.split_mixture("a.jsonl") == {"a.jsonl": None}
    assert inputs.split_mixture("a.jsonl=2, arithmetic:1=0.5") == {"a.jsonl": 2.0, "arithmetic:1": 0.5}
    assert inputs.split_mixture("a.jsonl,b.jsonl") == {"a.jsonl": None, "b.jsonl": None}
    odd = tmp_path / "a,b.jsonl"
    odd.write_text("")
    assert inputs.split_mixture(str(odd)) == {str(odd): None}
    for spec, said in (
        ("a=x,b=1", "no weight"),
        ("a=1,b", "give all or none"),
        ("a=1,a=2", "twice"),
    ):
        with pytest.raises(UserError, match=said):
            inputs.split_mixture(spec)
