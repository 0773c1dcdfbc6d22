"""rlhf_jax/stages/benchmark.py as a user meets it: both kinds of benchmarks, resumed, and mistakes."""

import json

import pytest


@pytest.fixture
def bench(tiny, monkeypatch, capsys, tmp_path):
    """Runs the script's command line in its own folder; returns its exit status and what it prints."""
    folder = tiny.finished("sft")
    monkeypatch.chdir(tmp_path)

    def run(*words, out="bench", quiet=True, more=()):
        capsys.readouterr()
        usual = ["--model", folder, "--out", out, "--batch-size", 8, *(["--quiet"] if quiet else []), *more]
        status = tiny.main("benchmark", [*usual, *words], monkeypatch)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


QUESTIONS = [
    {
        "question": f"{n}+{n % 3}=?",
        "choices": [str(n + n % 3), str(n + 7), "0+0"],
        "answer": 0,
        "subject": subject,
    }
    for n in range(6)
    for subject in ("sums", "more_sums")
]


@pytest.mark.slow
def test_choices_with_shots_and_a_stop(bench, tmp_path, stop_within_a_line):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    words = ["choices", "--data", "rows.jsonl", "--shots", 2, "--form", "letters"]
    status, shown, _ = bench(*words, quiet=False)
    assert status == 0
    assert "mean over subjects" in shown
    assert "guessing: 33.3%" in shown
    path = tmp_path / "bench" / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(12))
    for line in lines:
        assert len(line["choices"]) == 3
        assert line["where"] not in line["shots"]
        assert len(line["shots"]) == 2
    summary = json.loads((tmp_path / "bench" / "summary.json").read_text())
    right = sum(line["chosen"]["raw"] == line["answer"] for line in lines)
    assert summary["scores"]["raw"]["all items"]["mean"] == pytest.approx(right / 12)
    assert (tmp_path / "bench" / "results.svg").stat().st_size > 1000
    # Against itself no difference; against other items none at all.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.jsonl").write_text(path.read_text())
    assert bench(*words, more=["--resume", "--against", "other"])[0] == 0
    found = json.loads((tmp_path / "bench" / "summary.json").read_text())["against"]
    assert found["raw"]["difference"]["mean"] == 0
    (tmp_path / "other" / "results.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "not the same as the 12" in bench(*words, more=["--resume", "--against", "other"])[2]
    # Stopped within a line: what is missing comes out as it was, to the bit.
    stop_within_a_line(path, 6)
    assert bench(*words)[0] == 2  # not without being told
    assert bench(*words, more=["--resume"])[0] == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(again, key=lambda line: line["index"]) == sorted(lines, key=lambda line: line["index"])
    # Other rows under the same name are noticed.
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS[:-1]))
    status, _, error = bench(*words, more=["--resume"])
    assert status == 2
    assert "its items or prompts are not those of --data now" in error


@pytest.mark.slow
def test_whole_solutions_and_written_answers(bench, tmp_path, stop_within_a_line):
    words = ["choices", "--data", "arithmetic:1", "--form", "answers", "--chat", "--count", 8]
    assert bench(*words, out="choices")[0] == 0
    scores = json.loads((tmp_path / "choices" / "summary.json").read_text())
    assert scores["items"] == 8
    assert set(scores["scores"]) == {"raw", "tokens", "bytes"}
    words = [
        "generate",
        "--data",
        "arithmetic:1",
        "--chat",
        "--shots",
        1,
        "--count",
        8,
        "--max-new-tokens",
        6,
    ]
    assert bench(*words, out="answers")[0] == 0
    path = tmp_path / "answers" / "results.jsonl"
    kept = path.read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(8))
    assert all(line["tokens"] <= 6 and line["reward"] in (0, 1) for line in lines)
    stop_within_a_line(path, 1)
    assert bench(*words, out="answers", more=["--resume"])[0] == 0
    assert path.read_text() == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["choices", "--data", "none.jsonl"], "no such file"),
        (["choices", "--data", "arithmetic:1", "--shots", -1], "--shots -1 is out of range: give 0 or more"),
        (["generate", "--data", "arithmetic:1", "--reward", "nowhere"], "not of the form module:function"),
        (["harness", "--tasks", "hellaswag"], "pip install lm_eval"),
    ],
)
def test_mistakes_are_one_sentence(bench, monkeypatch, words, message):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    status, _, error = bench(*words)
    assert status == 2
    assert message in error
