"""SFT, then GRPO, on real GSM8K rows with a tokenizer learnt from them."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tyro

from rlhf_jax.metrics import read_metrics
from rlhf_jax.training.run_folder import load_policy

DATA = (
    Path(os.environ.get("RLHF_JAX_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "gsm8k"
)

pytestmark = pytest.mark.skipif(
    not (DATA / "train.jsonl").exists(),
    reason="there are no GSM8K rows: set RLHF_JAX_DATA to the folder that holds gsm8k/train.jsonl",
)


def run(stage, words):
    module = importlib.import_module(f"rlhf_jax.stages.{stage}")
    module.run(tyro.cli(module.Options, args=[str(word) for word in words.split()]))


def train(folder, *, rows, sft_steps, grpo_steps, new_tokens):
    """Returns the metrics of both stages."""
    data, held_out = folder / "train.jsonl", folder / "test.jsonl"
    for path, count in ((data, rows), (held_out, 16)):
        lines = (DATA / path.name).read_text(encoding="utf-8").split("\n")
        path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    run(
        "sft",
        f"--out {folder}/sft --data {data} --eval-data {held_out} --train-tokenizer 1000 --max-length 384 "
        "--overlength drop --packing --arch.width 64 --arch.layers 2 --batch-size 4 --learning-rate 5e-3 "
        "--optimizer.b2 0.95 --optimizer.end-lr-ratio 0.02 "
        f"--optimizer.warmup-steps 5 --steps {sft_steps} --quiet",
    )
    run(
        "grpo",
        f"--out {folder}/grpo --model {folder}/sft --data {data} --eval-data {held_out} "
        f"--max-prompt-length 96 --overlength drop --max-new-tokens {new_tokens} "
        "--rewards rlhf_jax.rewards.verifiers:gsm8k_reward "
        "--learning-rate 3e-4 --optimizer.b2 0.99 --optimizer.epsilon 1e-4 "
        "--batch-size 4 --group-size 4 --eval-count 4 --samples 4 "
        f"--optimizer.warmup-steps 0 --steps {grpo_steps} --quiet",
    )
    # The first line of each is the evaluation before the first step.
    return read_metrics(folder / "sft")[1:], read_metrics(folder / "grpo")[1:]


def check(folder, sft, grpo, *, least_fall, least_letters):
    losses = [line["loss"] for line in sft]
    assert losses[0] > 6  # close to log 1000, the loss of knowing nothing
    assert np.mean(losses[-5:]) < losses[0] - least_fall
    assert sft[-1]["eval/loss"] < losses[0] - least_fall
    for line in grpo:
        assert 0 <= line["reward"] <= 1
        assert line["reward"] * 16 == pytest.approx(round(line["reward"] * 16))
        assert line["sampling_logp_diff"] < 1e-4
        assert line["loss"] is not None
    tokenizer = load_policy(folder / "grpo").tokenizer
    assert 900 < tokenizer.vocab_size <= 1000
    samples = json.loads((folder / "grpo" / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == 4
    texts = []
    for sample in samples:
        assert sample["answer"].count("####") == 1
        for name, completion in sample["completions"].items():
            text = completion["text"]
            print(f"{name}, reward {completion['reward']}: {text!r}")
            assert completion["reward"] in (0, 1)
            assert "\ufffd" not in text  # whole characters, not broken bytes
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert all(character.isprintable() or character == "\n" for character in text)
            texts.append(text)
    letters = sum(character.isalpha() for text in texts for character in text)
    assert letters >= least_letters * sum(map(len, texts))


@pytest.mark.slow
def test_a_few_steps_on_gsm8k(tmp_path):
    sft, grpo = train(tmp_path, rows=500, sft_steps=60, grpo_steps=2, new_tokens=32)
    # Too short a training for words in the likeliest answers: they need only be whole characters.
    check(tmp_path, sft, grpo, least_fall=2.2, least_letters=0)


@pytest.mark.slow
def test_gsm8k(tmp_path):
    sft, grpo = train(tmp_path, rows=7473, sft_steps=400, grpo_steps=10, new_tokens=96)
    check(tmp_path, sft, grpo, least_fall=3.2, least_letters=0.2)
