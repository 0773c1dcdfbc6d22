"""Files of jobs under two processes, damage and disks that say no: one sentence, and nothing believed."""

import json
import os
import signal
import time

import numpy as np
import pytest
from tiers import few

from rlhf_jax.metrics import read_metrics


@pytest.mark.slow
def test_two_processes_in_one_run_folder(tiny, tmp_path):
    out = tmp_path / "run"
    first = tiny.process(["sft", *tiny.words("sft", out)])
    try:
        while not (out / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = tiny.process(["sft", *tiny.words("sft", out, "--resume")])
        _, errors = second.communicate()
        assert second.returncode == 2, errors
        assert f"error: {out} is in use by process {first.pid} on " in errors
        assert "Traceback" not in errors
    finally:
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert [line["step"] for line in read_metrics(out)] == list(range(13))
    assert not (out / ".lock").exists()


ROWS = [{"prompt": f"{n}+1=?", "completion": f"{n + 1} and more words of an answer"} for n in range(12)]
SOLUTIONS = [
    {
        "question": f"{n}+1=?",
        "right": {"solution": f"{n + 1}", "is_correct": True},
        "wrong": {"solution": f"{n + 2}", "is_correct": False},
    }
    for n in range(12)
]
RANKED = [{"prompt": f"{n}+1=?", "completions": ["a b c", "a a a"], "ranks": [0, 1]} for n in range(12)]
RULES = [{"name": "varied", "function": "rlhf_jax.rewards.rules:repetition_reward"}]
DATA = {
    "rows": ROWS,
    "solutions": SOLUTIONS,
    "text": [{"text": "to be or not " * 500}],
    "ranked": RANKED,
    "rules": RULES,
    "principles": [{"principle": "Be right."}],
}
JOBS = {
    "clean": "--data {rows}",
    "preferences": "--solutions {solutions} --held-out-share 0.5",
    "prune": "--model {sft} --method magnitude",
    "benchmark": "--model {sft} choices --data arithmetic:1 --form answers --count 4",
    "search": "--model {sft} --data arithmetic:1 --prompts 2 --samples 2 --max-new-tokens 4",
    "alphazero": "--steps 1 --no-report",
    "rl": "--env CartPole-v1 --seeds 1",
    "constitutional": "--model {sft} --constitution {principles} --data {rows} --revised 4",
    "rule-rewards": "--data {ranked} --propositions {rules} --count 4 --held-out 4",
    "rag": "--model {sft} --documents {text} --ask why?",
    "pretrain": "--data {text} --arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --steps 2",
    "sft": "--data {rows} --steps 2 --batch-size 4",
}


@pytest.fixture
def job(tiny, tmp_path, monkeypatch, capsys):
    """`run(name, out) -> (status, standard error)` of a small job, in this process."""
    names = {name: tmp_path / f"{name}.jsonl" for name in DATA}
    for name, rows in DATA.items():
        names[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    names["sft"] = tiny.finished("sft")
    monkeypatch.chdir(tmp_path)

    def run(name, out, *more):
        words = JOBS[name].format(**names).split()
        status = tiny.main(name, ["--out", out, "--quiet", *more, *words], monkeypatch)
        return status, capsys.readouterr().err

    return run


def assert_one_sentence(status, errors, path):
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(said) == 1
    assert str(path) in said[0]
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", few(JOBS, "benchmark", "sft"))
def test_a_file_where_the_folder_should_be(job, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert_one_sentence(*job(name, out), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["clean", "preferences", pytest.param("benchmark", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_write(job, tmp_path, name, monkeypatch):
    job("clean", tmp_path / "warm")  # what is imported and compiled is not of interest
    sync, count, failed_at = os.fsync, 0, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count == failed_at:
            raise OSError(28, os.strerror(28))
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for failed_at in range(1, 60):
        count, out = 0, tmp_path / f"{name}_{failed_at}"
        status, errors = job(name, out)
        if status == 0:
            break
        assert_one_sentence(status, errors, out)
        assert "No space left on device" in errors
    assert 8 < failed_at < 59


DAMAGES = {
    "a bit": lambda content: bytes([*content[:-3], content[-3] ^ 2, *content[-2:]]),
    "half": lambda content: content[: len(content) // 2],
    "nothing": lambda _: b"",
    "something": lambda _: b'["something"]\n',
}


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        pytest.param("benchmark", "config.json", marks=pytest.mark.slow),
        pytest.param("benchmark", "data.json", marks=pytest.mark.slow),
        ("benchmark", "results.jsonl"),
        pytest.param("search", "results.json", marks=pytest.mark.slow),
        pytest.param("search", "pool.npz", marks=pytest.mark.slow),
    ],
)
def test_damaged_files_of_a_job_are_named_or_made_again(job, tmp_path, name, damaged):
    out = tmp_path / "out"
    assert job(name, out)[0] == 0
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    result = "summary.json" if name == "benchmark" else "results.json"
    for done, damage in DAMAGES.items():
        for file, content in kept.items():
            (out / file).write_bytes(content)
        content = damage(kept[damaged])
        (out / damaged).write_bytes(content)
        status, errors = job(name, out, "--resume", "auto")
        if damaged == "pool.npz":
            assert status == 0
            assert "pool.npz: " in errors
            assert "the pool is sampled again" in errors
            assert json.loads((out / result).read_text()) == json.loads(kept[result])
        elif damaged == "results.jsonl" and done != "a bit":  # as a kill may leave lines: they are made again
            assert (status, errors) == (0, "")
            assert (out / damaged).read_bytes() == kept[damaged]
        else:
            assert_one_sentence(status, errors, out / damaged)


def test_labels_by_rollouts_are_of_the_options_that_made_them(tiny, tmp_path, monkeypatch):
    from rlhf_jax.stages import process_reward
    from rlhf_jax.training.loading import load

    made = []

    def label(rows, *_, rollouts, **__):
        made.append(rollouts)
        return rows

    monkeypatch.setattr(process_reward, "label_by_rollouts", label)
    policy = load(str(tiny.finished("sft")))

    def labelled(**changes):
        run = process_reward.option_groups.RunOptions(tmp_path / "out", resume=True, quiet=True)
        settings = {"rollouts": 2, "label_reward": "rlhf_jax.rewards.verifiers:exact_answer_reward"} | changes
        options = process_reward.Options(
            run=run, data="arithmetic:1", labels="rollouts", row_count=16, eval_count=2, **settings
        )
        rows = process_reward.load_rows(options)
        made.clear()
        found = process_reward.label(options, policy, rows)[0]
        assert [row.fields for row in found] == [row.fields for row in rows[0]]
        return list(made)

    assert labelled() == [2]
    assert labelled() == []  # read again
    assert labelled(rollouts=8) == [8]
    assert labelled(rollouts=8, max_new_tokens=3) == [8]
    assert labelled(rollouts=8, max_new_tokens=3) == []
    path = tmp_path / "out" / "labelled.jsonl"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"".join(whole.splitlines(keepends=True)[:9]), b"{}\n"):
        path.write_bytes(content)
        assert labelled(rollouts=8, max_new_tokens=3) == [8]
        assert path.read_bytes() == whole


def test_policies_to_start_from_are_whole_or_made_again(tmp_path, capsys):
    import post_training

    path, like = tmp_path / "base.npz", {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}
    tree, made = {"w": np.arange(3, dtype=np.float32), "b": np.float32(7)}, []

    def make():
        made.append(1)
        return tree

    class Late:
        """An array that is still being computed when the process is stopped."""

        shape = (3,)

        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        post_training.kept(path, lambda: {**tree, "w": Late()}, like)
    assert list(tmp_path.iterdir()) == []
    for expected in (1, 1):
        found = post_training.kept(path, make, like)
        assert len(made) == expected
        np.testing.assert_array_equal(found["w"], tree["w"])
    whole = path.read_bytes()
    for content in (b"", whole[:40], b"PK" + whole[5:]):
        made.clear()
        path.write_bytes(content)
        np.testing.assert_array_equal(post_training.kept(path, make, like)["w"], tree["w"])
        assert made == [1]
        assert f"{path}: damaged" in capsys.readouterr().err
        assert post_training.kept(path, make, like)["b"] == 7
        assert made == [1]
