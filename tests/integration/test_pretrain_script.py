"""Pre-training from the command line: full rows, samples, a resume to the bit, a longer context after it."""

import jax
import numpy as np
import pytest
import tyro

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import pretrain
from rlhf_jax.training.run_folder import load_policy

MODEL = "--arch.width 8 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --arch.intermediate-size 16"
OBJECTIVES = "--arch.mtp-depth 1 --arch.experts 3 --arch.router sigmoid --optimizer.schedule wsd"
LSTM = "--arch.kind lstm --arch.width 64 --learning-rate 1e-2 --demonstrations 2000 --sample-tokens 0"
SMALL = "--data arithmetic:1 --learning-rate 3e-3 "
SMALL += "--max-seq-length 24 --batch-size 4 --eval-rows 4 --optimizer.warmup-steps 1 --quiet "
SMALL += "--no-report --save-every 2"


def run(out, *more):
    words = [*f"--out {out} {SMALL}".split(), *map(str, more)]
    pretrain.run(tyro.cli(pretrain.Options, args=words))
    steps = [line for line in read_metrics(out) if line["step"]]  # but for the first evaluation
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in steps]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "play.txt"
    lines = [f"Speaker {number % 7}: well, {number} or {number * 3 % 11}?" for number in range(120)]
    path.write_text("\n\n".join(lines))
    return path


@pytest.mark.slow
def test_everything_at_once_resumes_to_the_bit(tmp_path, text):
    """Middles, further tokens, experts, a decay with other data; then a longer context."""
    decay = tmp_path / "decay.jsonl"
    decay.write_text('{"text": "Exeunt, with a flourish of trumpets."}\n' * 40)
    words = f"{MODEL} --data {text} --eval-every 2 --sample-tokens 4 --intra-document-masking".split()
    words += ["--separator", "\n\n"]
    words += f"--fim-rate 0.5 --fim-chunk 12 --decay-data {decay} --micro-batches 2".split()
    words += OBJECTIVES.split()
    whole = run(tmp_path / "whole", *words, "--steps", 4)
    first = run(tmp_path / "parts", *words, "--optimizer.total-steps", 4, "--steps", 2)
    second = run(tmp_path / "parts", *words, "--optimizer.total-steps", 4, "--steps", 4, "--resume")
    assert second[:2] == first
    for ours, theirs in zip(second, whole, strict=True):
        for name in ("loss", "further_loss", "balance_loss", "load_violation", "gradient_norm"):
            assert ours[name] == theirs[name], name
    assert second[-1]["eval/bits_per_byte"] == whole[-1]["eval/bits_per_byte"] < 9
    one, two = (load_policy(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    pages = sorted(path.name for path in (tmp_path / "parts" / "samples").iterdir())
    assert pages == ["0000000.txt", "0000002.txt", "0000004.txt"]
    assert (tmp_path / "parts" / "samples" / pages[1]).read_text().count(">>>") == 2  # go on, and a middle

    assert one.config.context_length == 24
    long = f"--model {tmp_path / 'whole'} --data {text} --max-seq-length 48 --rope.scaling yarn "
    long += "--sample-tokens 0"
    run(tmp_path / "long", *long.split(), "--steps", 1, "--optimizer.warmup-steps", 0)
    stretched = load_policy(tmp_path / "long").config
    scaling = stretched.pattern[0].attention.position.scaling
    assert scaling == models.YarnScaling(2.0, 24)
    assert stretched.context_length == 48


def test_contradictions_are_one_sentence(tmp_path, text):
    out = tmp_path / "none"
    for words, said in [
        ("--fim-rate 2", "--fim-rate 2 is out of range: give a number from 0 to 1"),
        (f"--decay-data {text}", "wsd"),
        ("--rope.theta 1e5", "--model"),
        ("--arch.kind lstm --arch.mtp-depth 1", "mean nothing"),
        ("--eval-share 1", "lower it"),
    ]:
        with pytest.raises(UserError, match=said):
            run(out, "--data", text, *words.split())
    assert not out.exists()


@pytest.mark.slow
def test_a_recurrent_model_learns_the_sums(tmp_path):
    """The embedded task as plain text: far below the entropy of its characters."""
    more = f"{LSTM} --max-seq-length 64 --batch-size 16 --steps 200"
    lines = run(tmp_path / "lstm", *more.split())
    assert lines[-1]["eval/bits_per_byte"] < 1.6 < lines[0]["loss"] / np.log(2)
