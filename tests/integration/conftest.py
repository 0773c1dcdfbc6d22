"""Tiny runs of every stage, made once a session, that the tests of the scripts start from."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from rlhf_jax.core import files

ROOT = Path(__file__).resolve().parents[2]

_MODEL = "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1"
# So small a model learns with rates far above those that stages have for models of billions.
_DATA = "--data arithmetic:1 --optimizer.b2 0.95 --optimizer.schedule cosine --optimizer.warmup-steps 2"
_PAIRS = f"{_DATA} --optimizer.end-lr-ratio 0.1 --pair-count 64 --eval-count 16 --batch-size 8"
_PROMPTS = (
    "--data arithmetic:1 --prompt-count 64 --eval-count 8 --max-new-tokens 8 --samples 2 "
    "--learning-rate 3e-4 --optimizer.warmup-steps 0 --optimizer.b2 0.99 --optimizer.epsilon 1e-4"
)
_EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"
_OPTIONS = {
    "sft": f"{_MODEL} {_DATA} --optimizer.end-lr-ratio 0.02 --learning-rate 3e-3 --demonstrations 64 "
    "--eval-count 16 --batch-size 8",
    "reward_model": f"--model {{sft}} {_PAIRS} --learning-rate 5e-4",
    "dpo": f"--model {{sft}} {_PAIRS} --learning-rate 1e-4 --beta 2",
    "ppo": f"--model {{sft}} --reward-model {{reward_model}} {_PROMPTS} --batch-size 8 --num-minibatches 2 "
    f"--num-ppo-epochs 1 --cliprange-value 0.5 --value-coef 0.5 --kl-coef 0.2 --eval-reward {_EXACT} "
    "--adaptive-kl --scale-rewards",
    "grpo": f"--model {{sft}} {_PROMPTS} --rewards {_EXACT} --batch-size 4 --group-size 2 "
    "--num-minibatches 2",
}
# The scripts only read the tests' cache: one that is killed, or whose disk is full, would leave torn entries.
_READ_ONLY_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


class TinyRuns:
    """Stages of 12 steps on a decoder of width 16, each in a folder below `root`.

    Attributes:
      stages: names of the scripts.
    """

    stages = tuple(_OPTIONS)

    def __init__(self, root):
        self.root = root

    def words(self, stage, out, *more):
        """The command line of a stage, whose start is there; words in `more` win over the usual ones."""
        needed = (name for name in self.stages if f"{{{name}}}" in _OPTIONS[stage])
        folders = {name: self.finished(name) for name in needed}
        usual = f"--out {out} --steps 12 --save-every 3 --quiet --no-report {_OPTIONS[stage]}"
        return [*usual.format(**folders).split(), *map(str, more)]

    def run(self, stage, out, *more):
        """Runs a stage in this process."""
        module = importlib.import_module(f"rlhf_jax.stages.{stage}")
        module.run(tyro.cli(module.Options, args=self.words(stage, out, *more)))
        return Path(out)

    def finished(self, stage):
        """The folder of an unbroken run."""
        folder = self.root / stage
        return folder if folder.exists() else self.run(stage, folder)

    def process(self, words, limit=""):
        """`rlhf` in a process of its own, behind a shell command such as a `ulimit`."""
        command = f'{limit} exec "$0" "$@"'
        return subprocess.Popen(
            ["bash", "-c", command, sys.executable, "-m", "rlhf_jax", *map(str, words)],
            cwd=ROOT,
            env=os.environ | _READ_ONLY_CACHE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def main(self, stage, words, monkeypatch):
        """Runs a command line in this process; returns its exit status."""
        from rlhf_jax.cli.commands import main

        for name, value in _READ_ONLY_CACHE.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", sys.argv)
        try:
            main([stage.replace("_", "-"), *map(str, words)])
        except SystemExit as stop:
            return stop.code
        return 0

    def digest(self, folder=None):
        """A hash of every file below a folder, by its path, but for what is left of a save that failed."""
        paths = sorted(path for path in (folder or self.root).rglob("*") if path.is_file())
        whole = [path for path in paths if not any(part.startswith(".saving_") for part in path.parts)]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in whole}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return TinyRuns(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def talker(tiny, tmp_path_factory):
    """A policy that has learned to end its answers."""
    words = ("--data", tmp_path_factory.mktemp("data") / "rows.jsonl", "--steps", 60, "--learning-rate", 2e-2)
    rows = [{"prompt": f"{a}+{b}=?", "completion": str(a + b)} for a in range(10) for b in range(10)]
    words[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny.run(
        "sft",
        tmp_path_factory.mktemp("talker") / "run",
        *words,
        "--tokenizer",
        tiny.finished("sft") / "tokenizer",
    )


@pytest.fixture
def stop_within_a_line():
    """`stop(path, count)`: of line `count` and those after it, leaves what a kill would have."""

    def stop(path, count):
        lines = path.read_text().splitlines()
        path.unlink()
        files.forget_digests(path.parent, path.name)
        files.append_lines(path, map(json.loads, lines[:count]))
        whole = path.stat().st_size
        files.append_lines(path, map(json.loads, lines[count:]))
        os.truncate(path, whole + len(lines[count]) // 2)

    return stop
