"""RAFT, expert iteration and iterated DPO in rounds, and distillation, from the command line."""

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.sources import read_rows
from rlhf_jax.metrics import read_metrics
from rlhf_jax.metrics.completions import read_completions
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.stages import distill, option_checks, option_groups, rounds
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer
from rlhf_jax.training.run_folder import load_policy

SMALL = "--prompt-count 64 --eval-count 8 --samples 2 --optimizer.warmup-steps 0 --batch-size 8"
SMALL += " --optimizer.schedule constant --save-every 3 --quiet --no-report --learning-rate 1e-2"
SMALL += " --data arithmetic:1 --rewards rlhf_jax.rewards.verifiers:exact_answer_reward --optimizer.b2 0.95"
PROMPTS = option_groups.PromptOptions("x", rewards=("x:y",))

REWARDS = """
def mixed(prompts, completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]
"""


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "round_rewards.py").write_text(REWARDS)
    return "round_rewards:mixed"


def run(script, out, *more):
    words = [*f"--out {out} {SMALL}".split(), *map(str, more)]
    script.run(tyro.cli(script.Options, args=words))
    steps = [line for line in read_metrics(out) if line["step"]]  # but for the first evaluation
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in steps]


def assert_same_policy(first, second):
    jax.tree.map(np.testing.assert_array_equal, load_policy(first).params, load_policy(second).params)


# Which answers are learned from ----------------------------------------------------------------------


def answers(texts, rewards, unfinished=()):
    tokenizer = arithmetic_tokenizer()
    ids = [tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    tokens = np.array([row + [0] * (width - len(row)) for row in ids])
    mask = np.array([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    finished = np.array([place not in unfinished for place in range(len(texts))])
    prompts = [
        PromptExample(np.array([1]), "", {"prompt": f"{place // 2}+1=?"}, "") for place in range(len(texts))
    ]
    rollout = Rollout(Sequences(tokens, tokens, mask.astype(int), mask), np.zeros(mask.shape), finished)
    return Answers(prompts, rollout, Scored(np.float32(rewards), np.zeros(len(texts), bool)))


def rows(method, found, **more):
    options = rounds.Options(model="x", prompts=PROMPTS, method=method, samples_per_prompt=2, **more)
    return rounds.to_rows(options, found, arithmetic_tokenizer())


def test_which_answers_become_rows():
    # The mean of the finished ones is 0.5: the best of prompt 0 was cut, and prompt 2's are equal.
    found = answers(["1", "2", "3", "4", "5", "5"], [1, 0.75, 1, 0.25, 0.5, 0], unfinished=(0,))
    best = [{"prompt": "0+1=?", "completion": "2"}, {"prompt": "1+1=?", "completion": "3"}]
    assert rows("raft", found) == best
    assert rows("raft", found, reward_threshold=0.5) == [*best, {"prompt": "2+1=?", "completion": "5"}]
    assert rows("expert_iteration", found, reward_threshold=0.2) == [
        *best,
        {"prompt": "1+1=?", "completion": "4"},
        {"prompt": "2+1=?", "completion": "5"},
    ]
    assert rows("dpo", found) == [{"prompt": "1+1=?", "chosen": "3", "rejected": "4"}]
    assert rows("raft", answers(["1", "2"], [1, 1])) == []


# Rounds ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["raft", "expert_iteration", "dpo"])
def test_rounds_go_on_where_they_stopped(method, tmp_path, talker, mixed):
    words = ("--model", talker, "--method", method, "--rewards", mixed, "--max-new-tokens", 8, "--steps", 4)
    words += ("--rounds", 2, "--prompts-per-round", 16, "--samples-per-prompt", 4, "--beta", 0.5)
    found = run(rounds, tmp_path / "whole", *words)
    assert [line["step"] for line in found] == [1, 2]
    assert all(line["kept"] > 0 and "eval/score" in line for line in found)
    fields = {"prompt", "chosen", "rejected"} if method == "dpo" else {"prompt", "completion"}
    first, second = (read_rows(str(tmp_path / "whole" / f"rows_{k}.jsonl")) for k in (1, 2))
    assert {row.fields.keys() == fields for row in first} == {True}
    assert [row.fields["prompt"] for row in first] != [row.fields["prompt"] for row in second]
    tables = read_completions(tmp_path / "whole")
    assert [len(rows) for rows in tables.values()] == [64, 64]
    for line, rows in zip(found, tables.values(), strict=True):
        assert np.mean([row["reward"] for row in rows]) == pytest.approx(line["reward"], abs=1e-6)
    # As after a kill in the second round: its training has begun, and nothing of it is summed up.
    out, expected = tmp_path / "whole", jax.device_get(load_policy(tmp_path / "whole" / "round_2").params)
    (out / "result_2.json").unlink()
    shutil.rmtree(out / "round_2" / "checkpoints" / "step_00000004")
    kept = (out / "rows_2.jsonl").read_bytes()
    assert run(rounds, out, *words, "--resume") == found
    assert (out / "rows_2.jsonl").read_bytes() == kept
    jax.tree.map(np.testing.assert_array_equal, load_policy(out / "round_2").params, expected)


@pytest.mark.slow
def test_a_writer_and_a_restart(tiny, tmp_path, talker, mixed):
    words = (
        "--model",
        tiny.finished("sft"),
        "--generator",
        talker,
        "--rewards",
        mixed,
        "--max-new-tokens",
        8,
    )
    words += ("--rounds", 2, "--prompts-per-round", 16, "--steps", 3)
    found = run(rounds, tmp_path / "run", *words, "--reinit-each-round")
    assert found[0]["finished"] > 0.5  # it is the writer that answers
    again = run(rounds, tmp_path / "again", *words)
    assert_same_policy(tmp_path / "run" / "round_1", tmp_path / "again" / "round_1")
    assert found[1]["reward"] == again[1]["reward"]
    assert (tmp_path / "run" / "rows_2.jsonl").read_bytes() == (
        tmp_path / "again" / "rows_2.jsonl"
    ).read_bytes()
    with pytest.raises(AssertionError):
        assert_same_policy(tmp_path / "run" / "round_2", tmp_path / "again" / "round_2")


def test_mistakes_of_rounds(tiny, tmp_path, monkeypatch, capsys):
    def refused(*more):
        words = [*f"--out {tmp_path / 'out'} --model x {SMALL}".split(), *map(str, more)]
        assert tiny.main("rounds", words, monkeypatch) == 2
        return capsys.readouterr().err

    assert "--samples-per-prompt 2 or more" in refused("--method", "dpo", "--samples-per-prompt", 1)
    assert "--prompts-per-round 12 is not divisible" in refused("--prompts-per-round", 12)
    assert "--reward-threshold means nothing" in refused("--method", "dpo", "--reward-threshold", 1)


@pytest.mark.parametrize(
    ("finished", "method", "said"),
    [
        ([0, 0, 0], "dpo", "all 3 answers were cut at --max-new-tokens: raise it"),
        (
            [1, 0, 0],
            "dpo",
            r"\(rewards from 0 to 1, 2 cut at --max-new-tokens\): answer more prompts, or",
        ),
        ([1, 1, 1], "raft", r"0 cut at --max-new-tokens\): answer more prompts, give --reward-threshold"),
    ],
)
def test_why_no_answer_is_worth_training_on(finished, method, said):
    rollout = types.SimpleNamespace(finished=np.array(finished, bool))
    answers = types.SimpleNamespace(prompts=["p"] * 3, rollout=rollout, rewards=np.array([0.0, 1.0, 0.5]))
    assert re.search(said, rounds.why_none(types.SimpleNamespace(method=method), answers))


# Distillation ----------------------------------------------------------------------------------------

LOSSES = ("forward_kl", "reverse_kl", "js", "sequence", "sampled_reverse_kl", "sequence_reverse_kl")


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_brings_the_student_closer(loss, tiny, tmp_path, talker):
    words = ("--teacher", talker, "--model", tiny.finished("sft"), "--loss", loss, "--max-new-tokens", 4)
    found = run(distill, tmp_path / "run", *words, "--steps", 12, "--eval-every", 100)
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in found)
    if loss != "sampled_reverse_kl" and loss != "sequence_reverse_kl":  # single samples are too noisy
        assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    rows = read_completions(tmp_path / "run")[12]
    assert {row["writer"] for row in rows} == {"student" if found[-1]["student_writes"] else "teacher"}
    assert np.mean([row["reward"] for row in rows]) == pytest.approx(found[-1]["reward"], abs=1e-6)
    if loss == "sampled_reverse_kl":  # of the tokens that were sampled, its loss is their mean
        of_tokens = [value for row in rows for value in row["token/kl"]]
        assert np.mean(of_tokens) == pytest.approx(found[-1]["loss"], abs=1e-4)
    writes = {line["student_writes"] for line in found}
    assert writes == ({1.0} if "sampled" in loss or "sequence_" in loss else {0.0})


@pytest.mark.slow
def test_a_mixture_of_writers_on_a_new_student_resumes_to_the_bit(tmp_path, talker):
    words = ("--teacher", talker, "--loss", "js", "--lmbda", 0.5, "--max-new-tokens", 4)
    words += ("--arch.width", 8, "--arch.layers", 1, "--arch.heads", 2, "--arch.kv-heads", 1)
    words += ("--eval-every", 100)
    whole = run(distill, tmp_path / "whole", *words, "--steps", 6)
    run(distill, tmp_path / "broken", *words, "--steps", 4)
    broken = run(distill, tmp_path / "broken", *words, "--steps", 6, "--resume")
    for ours, theirs in zip(broken, whole, strict=True):
        assert {k: v for k, v in ours.items() if "eval" not in k} == {
            k: v for k, v in theirs.items() if "eval" not in k
        }
    assert {line["student_writes"] for line in whole} == {0.0, 1.0}
    assert_same_policy(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_a_moving_teacher_with_a_context_resumes_to_the_bit(tmp_path, talker):
    data = tmp_path / "shown.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=?", "hint": str(a + b), "answer": str(a + b)} for a in range(4) for b in range(4)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--model", talker, "--self-teacher", "ema", "--teacher-context", "hint", "--data", data)
    words += ("--loss", "reverse_kl", "--top-k", 4, "--max-new-tokens", 4, "--eval-every", 100)
    whole = run(distill, tmp_path / "whole", *words, "--steps", 6)
    run(distill, tmp_path / "broken", *words, "--steps", 4)
    broken = run(distill, tmp_path / "broken", *words, "--steps", 6, "--resume")
    assert [line["loss"] for line in broken] == [line["loss"] for line in whole]
    assert {line["student_writes"] for line in whole} == {1.0}
    assert_same_policy(tmp_path / "broken", tmp_path / "whole")


def test_mistakes_of_distillation(tmp_path):
    def refused(teachers=1, **options):
        run = distill.option_groups.RunOptions(tmp_path)
        return distill.check(distill.Options(run=run, prompts=PROMPTS, **options), teachers)

    for options, said in (
        ({"loss": "sequence", "lmbda": 0.5}, "needs answers of the teacher"),
        ({"lmbda": 1.5}, "--lmbda 1.5 is out of range: give a number from 0 to 1"),
        ({"hard_label_weight": -0.1}, "hard-label-weight -0.1 is out of range"),
        ({"hard_label_weight": 0.5, "lmbda": 0.5}, "give --lmbda 0"),
        ({"loss": "sequence", "temperature": 2.0}, "is of sampled tokens"),
        ({"loss": "sampled_reverse_kl", "top_k": 4}, "is of sampled tokens"),
        ({"top_k": -1}, "--top-k -1 is out of range"),
        ({"self_teacher": "ema"}, "give either --teacher"),
        ({"teachers": 0}, "give either --teacher"),
        ({"teachers": 0, "self_teacher": "ema"}, "give --teacher-context"),
        ({"teachers": 0, "self_teacher": "ema", "teacher_context": "hint", "lmbda": 0.0}, "of the student"),
        (
            {"teachers": 0, "self_teacher": "ema", "teacher_context": "hint", "loss": "sequence"},
            "another --loss",
        ),
        ({"teacher_template": "{prompt}"}, "--teacher-template must hold"),
        ({"teacher_update_rate": 2.0}, "teacher-update-rate 2 is out of range"),
        ({"teachers": 2, "teacher_weights": (1.0,)}, "each of the 2 teachers"),
        ({"teachers": 2, "top_k": 3}, "several teachers have no likeliest"),
        (
            {"teachers": 2, "teacher_average": "log_probabilities", "loss": "sequence"},
            "give --teacher-average probabilities",
        ),
        ({"alignment": "spans"}, "--alignment is for --loss gold"),
        ({"loss": "uld", "gold_divergence": "js"}, "are for --loss gold"),
        ({"loss": "js", "gold_matched_weight": 0.0}, "are for --loss gold"),
        ({"loss": "gold", "gold_matched_weight": 1.5}, "gold-matched-weight 1.5 is out of range"),
        ({"loss": "gold", "teachers": 2}, "give one --teacher"),
        (
            {"loss": "uld", "teachers": 0, "self_teacher": "ema", "teacher_context": "hint"},
            "give one --teacher",
        ),
        ({"loss": "gold", "top_k": 4}, "goes without --teacher-context and --top-k"),
    ):
        with pytest.raises(UserError, match=said):
            refused(**options)
    assert refused(loss="gold") == 0
    assert refused(loss="sampled_reverse_kl") == 1
    assert refused(loss="js") == 0
    assert refused(0, self_teacher="current", teacher_context="hint") == 1


@pytest.mark.parametrize("script", [rounds, distill])
def test_help_shows_every_option(script, tiny, monkeypatch, capsys):

    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main(script.__name__.rpartition(".")[2], ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    needed = {"teacher" if script is distill else "model": "x", "prompts": PROMPTS}
    for flag in option_checks.flags(option_checks.to_json(script.Options(**needed))):
        assert flag in shown, flag
