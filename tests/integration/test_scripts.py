"""The stage scripts as a user meets them: help, data by path, rewards by path, what a run leaves behind."""

import dataclasses
import importlib
import json
import textwrap

import numpy as np
import pytest
import tyro

from rlhf_jax.metrics import read_metrics
from rlhf_jax.metrics.completions import read_completions

EXAMPLES = [
    {"prompt": f"{a}+{b}=?", "completion": str(a + b), "chosen": str(a + b), "rejected": "x", "answer": a + b}
    for a in range(4)
    for b in range(4)
]


def without_time(folder):
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(folder)]


def losses_of(lines):
    """Of the steps; the line of the start has none."""
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "ppo", "grpo"])
def test_help_shows_every_option(tiny, stage, monkeypatch, capsys):
    from rlhf_jax.stages import option_checks

    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main(stage, ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    module = importlib.import_module(f"rlhf_jax.stages.{stage}")
    options = tyro.cli(module.Options, args=tiny.words(stage, "out"))
    for flag in option_checks.flags(option_checks.to_json(options)):
        assert f"{flag} " in shown or f"{flag}," in shown, flag
    assert shown.count("(default:") + shown.count("(required)") >= len(
        option_checks.flags(option_checks.to_json(options))
    )

    def check_documented(described):
        for field in dataclasses.fields(described):
            value = getattr(described, field.name)
            if dataclasses.is_dataclass(value):
                check_documented(value)
            else:
                documented = "".join(base.__doc__ or "" for base in type(described).__mro__)
                assert f"{field.name}: " in documented, field.name

    check_documented(options)
    assert f"rlhf {stage.replace('_', '-')} --out" in module.__doc__


@pytest.mark.slow
def test_what_a_run_leaves_behind(tiny, tmp_path):
    for stage in ("sft", "grpo"):
        out = tiny.run(stage, tmp_path / stage, "--report", "--steps", 3)
        left = {path.name for path in out.iterdir()}
        assert left >= {"config.json", "model.json", "tokenizer", "checkpoints"}
        assert left >= {"metrics.jsonl", "tensorboard", "report.html"}
        assert "<svg" in (out / "report.html").read_text()
        assert json.loads((out / "config.json").read_text())["stage"] == stage
    samples = json.loads((tmp_path / "grpo" / "samples.json").read_text())
    assert len(samples) == 2
    for sample in samples:
        assert set(sample["completions"]) == {"before", "grpo"}
        for completion in sample["completions"].values():
            assert completion["correct"] == (completion["reward"] == 1)
    assert samples[0]["prompt"] in (tmp_path / "grpo" / "report.html").read_text()
    check_completions(tmp_path / "grpo", steps=3)


def check_completions(folder, steps):
    """The table of the last step says of each row what the log says of all of them."""
    tables = read_completions(folder)
    assert list(tables) == [steps]
    line, rows = without_time(folder)[-1], tables[steps]
    assert line["step"] == steps
    for name in ("reward", "kl", "length"):
        np.testing.assert_allclose(np.mean([row[name] for row in rows]), line[name], rtol=1e-4, atol=1e-5)
    assert all(row["logp"] < 0 and row["answer"] for row in rows)
    groups = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row["advantage"])
    for advantages in groups.values():  # of a group that differs, mean 0 and deviation 1; of another, 0
        assert sum(advantages) == pytest.approx(0, abs=1e-4)
        assert np.std(advantages, ddof=1) == pytest.approx(1, abs=1e-3) or not any(advantages)


@pytest.mark.slow
def test_another_loss_on_the_same_pairs(tiny, tmp_path, monkeypatch, capsys):
    dpo = tiny.run("dpo", tmp_path / "dpo", "--steps", 3)
    simpo = tiny.run("dpo", tmp_path / "simpo", "--steps", 3, "--loss", "simpo")
    first = [next(line["loss"] for line in without_time(folder) if "loss" in line) for folder in (dpo, simpo)]
    assert first[0] == pytest.approx(0.6931, abs=1e-3)
    assert first[1] != pytest.approx(first[0], abs=1e-2)
    words = [*tiny.words("dpo", tmp_path / "aot"), "--loss", "aot", "--micro-batches", "2"]
    assert tiny.main("dpo", words, monkeypatch) == 2
    assert "--micro-batches 1" in capsys.readouterr().err


@pytest.mark.slow
def test_losses_of_losses_and_their_numbers(tiny, tmp_path, monkeypatch, capsys):
    """At the start policy and reference agree: the logistic losses are log 2 each, whatever is summed."""
    mixed = ("--loss", "dpo,bco_pair", "--loss-weights", 0.8, 0.2, "--rpo-alpha", 1, "--ld-alpha", 0.5)
    lines = {}
    for reference in ("stored", "each_step"):
        out = tiny.run("dpo", tmp_path / reference, "--steps", 3, "--reference", reference, *mixed)
        lines[reference] = [line for line in without_time(out) if "loss" in line]
    first, last = lines["stored"][0], lines["stored"][-1]
    assert first["loss"] - first["rpo_nll"] == pytest.approx((0.8 + 0.2 * 2) * 0.6931, abs=1e-3)
    assert last["loss"] == pytest.approx(lines["each_step"][-1]["loss"], abs=1e-4)

    weighted = tiny.run(
        "dpo", tmp_path / "wpo", "--steps", 2, "--use-weighting", "--f-divergence-type", "js_divergence"
    )
    (first, *_) = (line for line in without_time(weighted) if "loss" in line)
    # Each pair's log 2 times the pair's weight.
    assert first["loss"] > 0
    assert first["loss"] != pytest.approx(0.6931, abs=1e-2)

    for words, said in (
        (("--gamma", 1), "dpo_loss has no parameter gamma: it has label_smoothing"),
        (("--loss", "kto", "--gamma", 1), "--gamma goes with losses on pairs"),
        (("--loss", "kto", "--rpo-alpha", 1), "--rpo-alpha goes with losses on pairs"),
        (("--loss", "kto", "--bco-shift", "rows"), "--bco-shift means nothing to --loss kto"),
        (("--desirable-weight", 2), "--desirable-weight means nothing to --loss dpo"),
        (("--loss", "dpo,ipo"), "a weight for each"),
        (("--ld-alpha", 2), "--ld-alpha 2 is out of range: give a number from 0 to 1"),
        (("--loss", "aot", "--use-weighting"), "--use-weighting"),
        (("--loss", "orpo", "--f-divergence-type", "js_divergence"), "has no f-divergence"),
    ):
        assert tiny.main("dpo", [*tiny.words("dpo", tmp_path / "no"), *map(str, words)], monkeypatch) == 2
        assert said in " ".join(capsys.readouterr().err.split()), words


# Data by path ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_rows_as_jsonl_and_parquet_train_the_same(tiny, tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl, parquet = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(EXAMPLES), parquet)
    for path in (jsonl, parquet):
        tiny.run("sft", tmp_path / path.suffix[1:], "--data", path, "--eval-data", path, "--steps", 4)
    ours, theirs = without_time(tmp_path / "jsonl"), without_time(tmp_path / "parquet")
    assert ours == theirs
    assert ours[-1]["eval/loss"] > 0


@pytest.mark.slow
def test_a_tfds_data_set(tiny, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    from rlhf_jax.tasks import arithmetic_tfds  # noqa: F401  (its import makes the data set known)

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    out = tiny.run("sft", tmp_path / "run", "--data", "tfds:arithmetic/level_1:heldout[:32]", "--steps", 3)
    assert len(read_metrics(out)) == 3


@pytest.mark.slow
def test_packing_and_a_learnt_tokenizer(tiny, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES * 4))
    words = ("--data", data, "--train-tokenizer", 280, "--packing", "--max-length", 64, "--batch-size", 4)
    out = tiny.run("sft", tmp_path / "run", *words, "--steps", 3)
    config = json.loads((out / "model.json").read_text())["config"]
    assert 259 <= config["vocab_size"] <= 280
    # What was learnt stands in the run folder, for the stages that start from it and for others by path.
    again = tiny.run(
        "sft", tmp_path / "again", "--data", data, "--tokenizer", out / "tokenizer", "--steps", 3
    )
    assert json.loads((again / "model.json").read_text())["config"]["vocab_size"] == config["vocab_size"]


# Rewards ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rewards_by_path_with_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weighed_rewards.py").write_text(
        textwrap.dedent("""
            def one(prompts, completions, **_):
                return [1.0] * len(prompts)

            def answered(prompts, completions, *, answer, finished, **_):
                assert all(answer) and set(finished) <= {True, False}
                return [2.0] * len(prompts)

            def unsure(prompts, completions, *, token_count, token_limit, **_):
                assert max(token_count) <= min(token_limit) == 8
                return [None, *[0.0] * (len(prompts) - 1)]
        """)
    )
    rewards = ["weighed_rewards:one", "weighed_rewards:answered=0.25", "weighed_rewards:unsure"]
    out = tiny.run("grpo", tmp_path / "functions", "--steps", 2, "--rewards", *rewards)
    assert [line["reward"] for line in read_metrics(out)[1:]] == [1.5, 1.5]
    assert [line["unscorable"] for line in read_metrics(out)[1:]] == [1, 1]
    assert read_metrics(out)[-1]["eval/score"] == 1.0

    model = tiny.finished("reward_model")
    alone = tiny.run("grpo", tmp_path / "model", "--steps", 1, "--rewards", model)
    # Without the last one, for the answer that it cannot score would not be in the mean.
    mixed = tiny.run("grpo", tmp_path / "mixed", "--steps", 1, "--rewards", f"{model}=0.5", *rewards[:2])
    expected = 0.5 * read_metrics(alone)[1]["reward"] + 1.5
    assert read_metrics(mixed)[1]["reward"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_ppo_with_reward_functions(tiny, tmp_path):
    functions = ("--reward-model", "--rewards", "rlhf_jax.rewards.verifiers:exact_answer_reward")
    out = tiny.run("ppo", tmp_path / "ppo", "--steps", 3, "--policy-loss", "penalty", *functions)
    for line in read_metrics(out)[1:]:
        assert 0 <= line["reward"] <= 1
        assert "clip_fraction" not in line
        assert line["unscorable"] == 0
        assert line["loss"] is not None
    (rows,) = read_completions(out).values()
    for name in ("reward", "kl", "length"):
        found = np.mean([row[name] for row in rows])
        np.testing.assert_allclose(found, read_metrics(out)[-1][name], rtol=1e-4, atol=1e-5)


# DPO -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stored_reference_is_the_reference(tiny, tmp_path):
    losses = {}
    for reference in ("stored", "each_step"):
        out = tiny.run("dpo", tmp_path / reference, "--reference", reference, "--learning-rate", 1e-2)
        losses[reference] = [line["loss"] for line in read_metrics(out)[1:]]
    assert losses["stored"] == pytest.approx(losses["each_step"], abs=1e-5)
    assert losses["stored"][-1] < losses["stored"][0] - 1e-3


# KTO and BCO -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_single_responses_of_pairs_or_of_labelled_rows(loss, tiny, tmp_path):
    labelled = tmp_path / "labelled.jsonl"
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in EXAMPLES
        for side in ("chosen", "rejected")
    ]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    found = []
    for data in (labelled, pairs):
        words = ("--loss", loss, "--data", data, "--eval-data", data, "--learning-rate", 1e-2)
        found.append(without_time(tiny.run("dpo", tmp_path / data.stem, *words)))
    assert found[0] == found[1]
    assert found[0][-1]["eval/auc"] > 0.9
    assert found[0][-1]["eval/margin"] > 0
    words = ("--loss", loss, "--data", pairs, "--eval-data", pairs, "--learning-rate", 1e-2)
    other = without_time(tiny.run("dpo", tmp_path / "each", *words, "--reference", "each_step"))
    assert losses_of(other) == pytest.approx(losses_of(found[1]), abs=1e-4)


def test_labels_are_true_or_false(tiny, tmp_path, monkeypatch, capsys):
    data = tmp_path / "labelled.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=?", "completion": "2", "label": "yes"}) + "\n")
    words = tiny.words(
        "dpo", tmp_path / "out", "--model", tiny.finished("sft"), "--data", data, "--loss", "kto"
    )
    assert tiny.main("dpo", words, monkeypatch) == 2
    assert "field 'label' is 'yes'" in capsys.readouterr().err
    words = tiny.words("dpo", tmp_path / "out", "--desirable-weight", 2)
    assert tiny.main("dpo", words, monkeypatch) == 2
    assert "--desirable-weight means nothing to --loss dpo" in capsys.readouterr().err
