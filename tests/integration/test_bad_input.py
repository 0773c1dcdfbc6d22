"""What a user gets wrong: one sentence with what, where and the mend, and every checkpoint untouched."""

import json
import logging
import re
import shlex
import shutil
import signal
import textwrap
import time

import pytest
from tiers import few

from rlhf_jax.metrics import read_metrics
from rlhf_jax.training.run_folder import load_policy

_HEADS = ["--arch.heads", "2", "--arch.kv-heads", "1"]
MODEL = [
    "--arch.width",
    "16",
    "--arch.layers",
    "1",
    *_HEADS,
    "--demonstrations",
    "64",
    "--data",
    "arithmetic:1",
]
REWARDED = {
    stage: ["--rewards", "rlhf_jax.rewards.verifiers:exact_answer_reward"] for stage in ("ppo", "grpo")
}
GOOD = {"prompt": "1+1=?", "completion": "2", "chosen": "2", "rejected": "3", "answer": "2"}


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch, capsys):
    """Runs a command line that must fail; checks sentence, status and that nothing was touched."""
    monkeypatch.chdir(tmp_path)

    def run(stage, words, *phrases):
        capsys.readouterr()
        before = tiny.digest()
        status = tiny.main(stage, words, monkeypatch)
        errors = capsys.readouterr().err
        assert status == 2, errors
        assert errors.startswith("error: "), errors
        assert errors.count("\n") == 1, errors
        for phrase in phrases:
            assert str(phrase) in errors
        assert tiny.digest() == before
        return errors

    return run


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Data ------------------------------------------------------------------------------------------------


BAD_LINES = {
    "not JSON": ('{"prompt": "1+1=?", "completion"', "rows.jsonl:2", "not JSON"),
    "an array": ("[1, 2]", "rows.jsonl:2", "not a JSON object"),
    "NaN": ('{"prompt": "1+1=?", "completion": NaN}', "rows.jsonl:2", "NaN"),
    "a lone surrogate": ('{"prompt": "1+1=?", "completion": "\\ud800"}', "rows.jsonl:2", "surrogate"),
    "a missing field": ('{"prompt": "1+1=?"}', "rows.jsonl:2", "'completion' is missing"),
    "no field at all": ('{"text": "1+1=2"}', "rows.jsonl:2", "none of the fields"),
    "an empty field": ('{"prompt": "1+1=?", "completion": " "}', "rows.jsonl:2", "'completion' is empty"),
    "a number": ('{"prompt": "1+1=?", "completion": 2}', "rows.jsonl:2", "'completion' is a number"),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "1+1=?"}]}',
        "rows.jsonl:2",
        "no assistant turn",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_rows(refused, tmp_path, case):
    line, *phrases = BAD_LINES[case]
    data = write_lines(tmp_path / "rows.jsonl", json.dumps(GOOD), line)
    refused("sft", [*MODEL, "--out", tmp_path / "out", "--data", data], *phrases)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_rows_of_the_other_stages(refused, tiny, tmp_path):
    sft = tiny.finished("sft")
    pairs = write_lines(tmp_path / "pairs.jsonl", json.dumps(GOOD), json.dumps(GOOD | {"rejected": ""}))
    same = write_lines(tmp_path / "same.jsonl", json.dumps(GOOD | {"rejected": "2"}))
    prompts = write_lines(tmp_path / "prompts.jsonl", json.dumps(GOOD), json.dumps({"answer": "2"}))
    for stage in ("reward_model", "dpo"):
        words = ["--model", sft, "--out", tmp_path / "out", "--data"]
        refused(stage, [*words, pairs], "pairs.jsonl:2", "'rejected' is empty")
        refused(stage, [*words, same], "same.jsonl:1", "the same")
    for stage, rewards in REWARDED.items():
        words = ["--model", sft, "--out", tmp_path / "out", *rewards, "--data"]
        refused(stage, [*words, prompts], "prompts.jsonl:2", "prompt")
    assert not (tmp_path / "out").exists()


def test_missing_empty_and_unknown_data(refused, tiny, tmp_path):
    sft, out = tiny.finished("sft"), tmp_path / "out"
    write_lines(tmp_path / "rows.jsonl", json.dumps(GOOD))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    for stage in tiny.stages:
        words = ["--out", out, *(["--model", sft] if stage != "sft" else MODEL)]
        words += [*REWARDED.get(stage, []), "--data"]
        refused(stage, [*words, "row.jsonl"], "row.jsonl: no such file", "did you mean rows.jsonl?")
        refused(stage, [*words, "empty.jsonl"], "empty.jsonl: the data set is empty")
    refused("sft", [*MODEL, "--out", out, "--data", "rows.csv"], "rows.csv", ".parquet")
    refused("sft", [*MODEL, "--out", out, "--data", "arithmetic:99"], "no such level", "arithmetic:1")
    refused("sft", [*MODEL, "--out", out, "--tokenizer", "nowhere"], "no such tokenizer")
    assert not out.exists()


@pytest.mark.slow
def test_too_long(refused, tiny, tmp_path):
    sft, out = tiny.finished("sft"), tmp_path / "out"
    words = ["--model", sft, "--out", out, "--data", "arithmetic:1"]
    refused(
        "sft", [*MODEL, "--out", out, "--max-length", 5], "arithmetic:1:1", "more than 5", "raise the length"
    )
    refused("dpo", [*words, "--max-length", 5], "arithmetic:1:1", "more than 5")
    prompts = [*words, *REWARDED["grpo"], "--max-prompt-length", 3]
    refused("grpo", prompts, "arithmetic:1:1", "the prompt has", "more than 3")
    refused("ppo", [*prompts, "--overlength", "drop"], "all", "raise the length")
    assert not out.exists()


# Options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "ppo", "grpo"])
def test_an_unknown_option_brings_the_nearest_name(tiny, stage, monkeypatch, capsys, tmp_path):
    words = ["--out", tmp_path / "out", "--model", "x", "--data", "x", "--batchsize", 3]
    assert tiny.main(stage, words, monkeypatch) == 2
    errors = capsys.readouterr().err
    assert "--batchsize" in errors
    assert "--batch-size" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


IMPOSSIBLE = {
    "heads": ("sft", "--arch.width 16 --arch.heads 3", "--arch.heads 3", "--arch.width 16"),
    "key-value heads": ("sft", "--arch.width 16 --arch.heads 4 --arch.kv-heads 3", "--arch.kv-heads 3"),
    "odd heads": ("sft", "--arch.width 12 --arch.heads 4 --arch.kv-heads 4", "head_dim=3"),
    "no heads": ("sft", "--arch.heads 0", "--arch.heads 0 is out of range: give a number from 1"),
    "micro-batches": ("sft", "--batch-size 8 --micro-batches 3", "--batch-size 8", "--micro-batches 3"),
    "batch of data": ("sft", "--demonstrations 5 --batch-size 6", "batch of 6", "5 examples"),
    "no batch": ("sft", "--batch-size 0", "--batch-size 0 is out of range: give 1 or more"),
    "no steps": ("sft", "--steps 0", "--steps 0 is out of range: give 1 or more"),
    "seed": ("sft", "--seed -1", "seed -1"),
    "not a number": ("sft", "--learning-rate nan", "--learning-rate is not a number"),
    "two tokenizers": ("sft", "--tokenizer a --train-tokenizer 300", "--train-tokenizer excludes"),
    "a small vocabulary": ("sft", "--train-tokenizer 100", "vocab_size 100"),
    "pairs": ("dpo", "--model {sft} --batch-size 8 --micro-batches 3", "--micro-batches 3"),
    "mini-batches": ("grpo", "--model {sft} --batch-size 3 --num-minibatches 5", "--num-minibatches 5"),
    "groups": ("grpo", "--model {sft} --group-size 0", "--group-size 0"),
    "two rewards": ("ppo", "--model {sft} --reward-model x --rewards my:own", "--reward-model excludes"),
    "temperature": (
        "ppo",
        "--model {sft} --reward-model x --temperature 0",
        "--temperature 0 is out of range: give a number from 0.01 to 100",
    ),
    "PPO's parts": (
        "ppo",
        "--model {sft} --reward-model x --batch-size 8 --num-minibatches 2 --micro-batches 3",
        "--micro-batches 3",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_options(refused, tiny, tmp_path, case):
    stage, words, *phrases = IMPOSSIBLE[case]
    words = words.format(sft=tiny.finished("sft")).split()
    words += ["--demonstrations", "64"] if stage == "sft" and "--demonstrations" not in words else []
    data = ["--data", "arithmetic:1", *(REWARDED["grpo"] if stage == "grpo" else ())]
    refused(stage, [*words, *data, "--out", tmp_path / "out"], *phrases)
    assert not (tmp_path / "out").exists()


def test_nothing_is_learned_without_data_or_rewards(refused, tiny, tmp_path):
    start = ["--model", tiny.finished("sft"), "--out", tmp_path / "out"]
    for stage in tiny.stages:
        refused(stage, start, "--data")
    for stage in REWARDED:
        refused(stage, [*start, "--data", "arithmetic:1"], "what an answer is worth", "--rewards")
    assert not (tmp_path / "out").exists()


# Rewards ---------------------------------------------------------------------------------------------

REWARDS = """
    calls = 0

    def raises(prompts, completions, **_):
        raise KeyError("boom")

    def is_nan(prompts, completions, **_):
        return [float("nan")] * len(prompts)

    def is_short(prompts, completions, **_):
        return [0.0]

    def needs(prompts, completions, *, nowhere):
        return [0.0] * len(prompts)

    def later(prompts, completions, **_):
        global calls
        calls += 1
        return [0.0 if calls < 9 else float("inf")] * len(prompts)
"""


BAD_REWARDS = {
    "broken_rewards:raises": ("KeyError", "boom", "broken_rewards.py:5", "mend the function"),
    "broken_rewards:is_nan": ("returned nan for row 0 (arithmetic:1:1)", "2 finite numbers"),
    "broken_rewards:is_short": ("of shape (1,)", "2 finite numbers"),
    "broken_rewards:needs": ("cannot be called", "nowhere"),
    "broken_rewards:raise": ("does not exist", "raises"),
    "broken_reward:raises": ("no module broken_reward", "broken_rewards"),
    "broken_rewards:raises=much": ("'much' is no weight",),
    "nowhere": ("nowhere",),
}


@pytest.mark.parametrize("reward", few(BAD_REWARDS, "broken_reward:raises"))
def test_bad_reward_functions(reward, refused, tiny, tmp_path):
    (tmp_path / "broken_rewards.py").write_text(textwrap.dedent(REWARDS))
    tiny.finished("sft")
    refused("grpo", tiny.words("grpo", tmp_path / "out", "--rewards", reward), *BAD_REWARDS[reward])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bad_reward_in_the_evaluation_of_ppo(refused, tiny, tmp_path):
    (tmp_path / "broken_rewards.py").write_text(textwrap.dedent(REWARDS))
    broken = ("--rewards", "broken_rewards:is_nan", "--eval-reward", "broken_rewards:is_nan")
    said = ("returned nan for row 0 (arithmetic:1:1)", "2 finite numbers")
    refused("ppo", tiny.words("ppo", tmp_path / "out", "--reward-model", *broken), *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reward_that_breaks_later_leaves_the_checkpoints(refused, tiny, tmp_path):
    (tmp_path / "late_rewards.py").write_text(textwrap.dedent(REWARDS))
    out = tmp_path / "out"
    words = tiny.words("grpo", out, "--rewards", "late_rewards:later", "--save-every", 2)
    refused("grpo", words, "late_rewards:later", "returned inf")
    assert [line["step"] for line in read_metrics(out)] == [0, 1, 2, 3, 4, 5]
    assert {path.name for path in (out / "checkpoints").iterdir()} >= {"step_00000004"}
    load_policy(out)


# Other runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_start(refused, tiny, tmp_path):
    sft, reward_model = tiny.finished("sft"), tiny.finished("reward_model")
    out = ["--out", tmp_path / "out", "--data", "arithmetic:1"]
    for stage in tiny.stages:
        words = [*out, *REWARDED.get(stage, [])]
        refused(stage, [*words, "--model", "nowhere"], "nowhere", "no such file")
        refused(stage, [*words, "--model", reward_model], "holds a reward model, not a policy")
    refused("sft", [*out, "--model", sft, "--arch.width", 32], f"--model {sft}", "width 16, not 32")
    refused("sft", [*out, "--model", sft, "--tokenizer", "x"], "--model exclude")
    refused("ppo", [*out, "--model", sft, "--reward-model", sft], "holds a policy, not a reward model")
    alone = ("--reward-model", reward_model, "--ensemble", "worst")
    refused("ppo", [*out, "--model", sft, *alone], "--ensemble worst", "several reward models")
    # A run that was stopped before its first checkpoint holds nothing to start from.
    shutil.copytree(sft, tmp_path / "hollow", ignore=shutil.ignore_patterns("checkpoints"))
    refused("dpo", [*out, "--model", tmp_path / "hollow"], "hollow")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reward_model_of_another_architecture(refused, tiny, tmp_path):
    tiny.finished("reward_model")
    other = tmp_path / "other"
    wide = ("--model", "", "--arch.width", 32, "--arch.layers", 1, *_HEADS, "--steps", 3)
    tiny.run("reward_model", other, *wide)
    words = tiny.words("ppo", tmp_path / "out", "--reward-model", other)
    refused("ppo", words, other, "width 32, not 16")
    # A reward model may be larger than the policy where it only scores, but not read other tokens.
    bytes_model = tmp_path / "bytes"
    data = write_lines(tmp_path / "pairs.jsonl", *[json.dumps(GOOD)] * 8)
    tiny.run("reward_model", bytes_model, "--data", data, *wide)
    words = tiny.words("grpo", tmp_path / "out", "--rewards", bytes_model)
    refused("grpo", words, bytes_model, "tokenizer")


def test_a_used_folder(refused, tiny, tmp_path):
    """Each of these would have gone on with, or written over, a run that is not the one asked for."""
    out = tmp_path / "run"
    shutil.copytree(tiny.finished("sft"), out)
    before = tiny.digest(out)
    refused("sft", tiny.words("sft", out), "already holds a run at step 12", "--resume", "--out")
    for flag, value in {
        "--batch-size": 4,
        "--learning-rate": 0.5,
        "--seed": 3,
        "--data": "arithmetic:2",
        "--optimizer.b1": 0.5,
        "--arch.width": 32,
    }.items():
        refused("sft", tiny.words("sft", out, "--resume", flag, value), out, f"{flag} ", f"not {value}")
    refused("dpo", tiny.words("dpo", out, "--resume"), "holds a run of sft, not of dpo")
    assert tiny.digest(out) == before


@pytest.mark.slow
def test_resuming_after_the_start_was_replaced(refused, tiny, tmp_path):
    """The same --model, but another model has been trained there in between."""
    start, out = tmp_path / "start", tmp_path / "run"
    few = ["--steps", 3]
    shutil.copytree(tiny.finished("sft"), start)
    words = tiny.words("dpo", out, "--model", start, *few)
    tiny.run("dpo", out, "--model", start, *few)
    shutil.rmtree(start)
    tiny.run("sft", start, "--arch.width", 32, *few)
    before = tiny.digest(out)
    refused("dpo", [*words, "--resume"], out, "width 16, not 32")
    assert tiny.digest(out) == before


# Disk, signals, divergence ---------------------------------------------------------------------------


def test_a_file_stands_where_the_folder_should(refused, tiny, tmp_path):
    file = write_lines(tmp_path / "file", "precious")
    refused("sft", tiny.words("sft", file), file, "is a file where a folder is meant", "--out")
    refused("sft", tiny.words("sft", file / "below"), file, "cannot be written")
    assert file.read_text() == "precious\n"


@pytest.mark.slow
def test_a_full_disk(tiny, tmp_path):
    """No file may grow beyond 20 KiB, which is less than a checkpoint needs."""
    constant = ("--optimizer.schedule", "constant")
    out = tiny.run("sft", tmp_path / "run", *constant, "--steps", 3)
    before = tiny.digest(out / "checkpoints")
    words = tiny.words("sft", out, *constant, "--resume", "--steps", 6)
    process = tiny.process(["sft", *words], limit="ulimit -f 20;")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    sentence = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert "File too large" in sentence
    assert "untouched" in sentence
    assert "Traceback" not in errors
    assert tiny.digest(out / "checkpoints") == before


@pytest.mark.parametrize(("error", "printed"), [("write failed [os_error_code='27']", 0), ("other", 1)])
def test_what_ends_after_a_failed_save_says_nothing_more(error, printed, caplog):
    from rlhf_jax.cli import command_line

    record = logging.LogRecord(
        "asyncio", logging.ERROR, "", 0, "Task exception was never retrieved", (), None
    )
    record.exc_info = (ValueError, ValueError(error), None)
    log = logging.getLogger("asyncio")
    log.addFilter(command_line.is_not_late)
    log.handle(record)
    assert len(caplog.records) == printed


@pytest.mark.slow
def test_interrupted_and_continued(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    constant = ("--optimizer.schedule", "constant")  # one that falls is bound to the steps it began with
    process = tiny.process(["sft", *tiny.words("sft", out, "--steps", 100_000, *constant)])
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(read_metrics(out)) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    stopped = re.search(r"Stopped after step (\d+), which is saved.\nTo go on: rlhf (.*)\n", errors)
    assert stopped, errors
    step, (script, *words) = int(stopped[1]), shlex.split(stopped[2])
    assert script == "sft"
    assert (out / "checkpoints" / f"step_{step:08d}").is_dir()
    assert tiny.main("sft", [*words, "--steps", step + 2], monkeypatch) == 0, capsys.readouterr().err
    assert [line["step"] for line in read_metrics(out)] == list(range(step + 3))


def test_divergence(refused, tiny, tmp_path):
    out = tmp_path / "run"
    steepest = ("--optimizer.optimizer", "sgd", "--optimizer.clip-norm", "inf", "--learning-rate", 1000)
    words = tiny.words("sft", out, *steepest, "--steps", 60, "--save-every", 100)
    refused("sft", words, "not finite 10 times in a row", "untouched", "lower the learning rate")
    last = read_metrics(out)[-1]
    assert last["loss"] is None or last["consecutive_skipped"] == 9
