"""Tiny runs of every command that trains or writes, their data, and what of them two unbroken runs share."""

import hashlib
import json
import pathlib
import re
import shlex
import shutil
import time
import warnings
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from fault_server import Server

_SHORT = "--steps 2 --save-every 1 --quiet --log"
_MODEL = "--arch.width 8 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1"
_EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"
_PAIRS = "--data arithmetic:1 --pair-count 16 --eval-count 4 --batch-size 4 --learning-rate 1e-3"
_PROMPTS = (
    f"--data arithmetic:1 --rewards {_EXACT} --prompt-count 16 --eval-count 4 --max-new-tokens 4 --samples 2"
)
# For a policy that has learned to end its answers; rewards are of their letters.
_TALK = (
    "--data arithmetic:1 --rewards fault_rewards:mixed --prompt-count 16 --eval-count 4 --samples 2 "
    "--max-new-tokens 24"
)
_GROUPS = f"{_PROMPTS} --batch-size 4 --group-size 2 --learning-rate 1e-3"

LINES = {
    "sft": f"{_SHORT} {_MODEL} --data arithmetic:1 --demonstrations 32 --eval-count 4 --batch-size 4 "
    "--learning-rate 1e-3",
    "talker": f"{_SHORT} {_MODEL} --steps 30 --save-every 15 --data arithmetic:1 --demonstrations 64 "
    "--eval-count 4 --batch-size 8 --learning-rate 3e-2",
    "reward-model": f"{_SHORT} --model {{sft}} {_PAIRS}",
    "process-reward": f"{_SHORT} --model {{sft}} --data arithmetic:1 --labels rollouts --rollouts 2 "
    f"--label-reward {_EXACT} --row-count 8 --eval-count 2 --batch-size 2 --max-new-tokens 4",
    "dpo": f"{_SHORT} --model {{sft}} {_PAIRS}",
    "ppo": f"{_SHORT} --model {{sft}} {_PROMPTS} --batch-size 4 --num-minibatches 2 --scale-rewards",
    "grpo": f"{_SHORT} --model {{sft}} {_GROUPS} --log-completions 1",
    "tool-use": f"{_SHORT} --model {{talker}} {_TALK} --tools rlhf_jax.tool_use:calculator --max-turns 2 "
    "--batch-size 4 --group-size 2 --learning-rate 1e-3",
    "planned": f"{_SHORT} {_MODEL} --plan here --data arithmetic:1 --demonstrations 32 --eval-count 4 "
    "--batch-size 4",
    "online-dpo": f"{_SHORT} --model {{sft}} {_PROMPTS} --batch-size 4",
    "rounds": f"{_SHORT} --model {{talker}} {_TALK} --rounds 2 --prompts-per-round 8 --samples-per-prompt 4 "
    "--batch-size 4",
    "distill": f"{_SHORT} --teacher {{sft}} --model {{sft}} {_PROMPTS} --batch-size 4",
    "reviser": f"{_SHORT} {_MODEL} --steps 60 --save-every 30 --data {{reviews}} --batch-size 8 "
    "--tokenizer {sft}/tokenizer --learning-rate 3e-2",
    "constitutional": f"{_SHORT} --model {{reviser}} --constitution {{principles}} {_TALK} --revised 16 "
    "--batch-size 2 --answer-batch-size 8",
    "rule-rewards": "--data {ranked} --propositions {rules} --count 4 --held-out 4 --steps 4 --quiet",
    "pretrain": f"{_SHORT} {_MODEL} --data {{text}} --batch-size 2 "
    "--max-seq-length 32 --sample-tokens 4 --learning-rate 1e-3",
    "lora": f"{_SHORT} --model {{sft}} --adapter.kind lora --adapter.rank 2 --data arithmetic:1 "
    "--demonstrations 32 --eval-count 4 --batch-size 4",
    "prune": "--model {sft} --method magnitude --quiet",
    "search": "--model {sft} --data arithmetic:1 --prompts 2 --samples 2 --max-new-tokens 4 --quiet",
    "rag": "--model {sft} --documents {text} --ask why? --max-new-tokens 4 --quiet",
    "benchmark": "--model {sft} --quiet choices --data arithmetic:1 --form answers --count 4",
    "preferences": "--solutions {solutions} --held-out-share 0.5 --quiet",
    "judged": f"--model {{talker}} {_TALK} --batch-size 8 --samples-per-prompt 4 --quiet",
    "clean": "--data {rows} --quiet",
    "rl": "--env CartPole-v1 --algo ppo --seeds 1 --steps 2048 --chunks 2 --eval-episodes 2 --quiet",
    "rl-offline": "--data {log} --algo iql --seeds 1 --steps 100 --chunks 2 --eval-episodes 2 --quiet",
    "alphazero": "--steps 2 --save-every 1 --games 4 --num-simulations 2 --play-simulations 2 --widths 8 "
    "--openings 2 --quiet --no-report",
    "convert": "--source {sft}",
    "gguf": "--source {pretrain}",
    "adapter": "--source {lora}",
    "report": "{sft} {grpo}",
}
"""Words of a run by its name, without the command, `--out` and `--resume`."""
COMMANDS = {
    **dict.fromkeys(("lora", "talker", "reviser", "planned"), "sft"),
    **dict.fromkeys(("gguf", "adapter"), "convert"),
    "judged": "preferences",
}
"""Command of a run that is not named as its command."""
_RESUMED = {
    *("sft", "reward-model", "process-reward", "dpo", "ppo", "grpo", "online-dpo", "rounds", "distill"),
    *(
        "constitutional",
        "pretrain",
        "tool-use",
        "lora",
        "talker",
        "reviser",
        "search",
        "benchmark",
        "rl",
        "rl-offline",
        "alphazero",
    ),
}
_ENDINGS = {"gguf": "run.gguf", "report": "page.html"}
_UNCOMPARED = ("digests.json", ".lock")
_OF_THIS_RUN = ("started", "command", "resume", "commit")

_SUMS = [{"prompt": f"{n}+1=?", "completion": f"{n + 1} and more words of an answer"} for n in range(12)]
_PRINCIPLE = {"principle": "Be right.", "critique": "Is it right?", "revision": "Again."}
DATA: dict[str, list[Any]] = {
    "rows": _SUMS,
    "text": [{"text": "to be or not " * 100}],
    "principles": [_PRINCIPLE],
    "reviews": [
        {
            "messages": [
                {"role": ("user", "assistant")[place % 2], "content": text}
                for place, text in enumerate(
                    (f"{n}+1=?", f"{n + 1}", _PRINCIPLE["critique"], "ok", _PRINCIPLE["revision"], f"{n + 1}")
                )
            ]
        }
        for n in range(12)
    ],
    "rules": [{"name": "varied", "function": "rlhf_jax.rewards.rules:repetition_reward"}],
    "ranked": [{"prompt": f"{n}+1=?", "completions": ["a b c", "a a a"], "ranks": [0, 1]} for n in range(12)],
    "solutions": [
        {
            "question": f"{n}+1=?",
            "right": {"solution": f"{n + 1}", "is_correct": True},
            "wrong": {"solution": f"{n + 2}", "is_correct": False},
        }
        for n in range(12)
    ],
}


class Runs:
    """Unbroken runs, each made twice when it is first asked for.

    Args:
      root: their folder.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.server = Server(root / "server")

    def words(self, name: str, out: pathlib.Path, *, again: bool = False) -> list[str]:
        """The command line of a run into a folder, or of the run that goes on with it."""
        places = {}
        for place in (*LINES, *DATA, "log"):
            if f"{{{place}}}" in LINES[name]:
                places[place] = self.data(place) if place in (*DATA, "log") else self.run(place)
        words = shlex.split(LINES[name].format(**places))
        resume = ["--resume", "auto"] if again and name in _RESUMED else []
        out = out / _ENDINGS[name] if name in _ENDINGS else out
        return [COMMANDS.get(name, name), "--out", str(out), *resume, *words]

    def data(self, name: str) -> pathlib.Path:
        """A file of rows, or a log of transitions."""
        path = self.root / ("log.npz" if name == "log" else f"{name}.jsonl")
        if not path.exists() and name == "log":
            words = [
                "rl-offline",
                "--collect",
                "random:4",
                "--env",
                "CartPole-v1",
                "--data",
                str(path),
                "--quiet",
            ]
            code, said, _ = self.server.run(words)
            assert code == 0, said
        elif not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in DATA[name]))
        return path

    def run(self, name: str) -> pathlib.Path:
        """The folder of an unbroken run."""
        self.notes(name)
        return self.root / name

    def notes(self, name: str) -> dict[str, Any]:
        """Of a run: its `calls` that change files, its `seconds`, and the `files` that two of it share."""
        path = self.root / f"{name}.notes"
        if not path.exists():
            found, calls, seconds = [], 0, 0.0
            for out in (self.root / f"{name}_twin", self.root / name):
                shutil.rmtree(out, ignore_errors=True)
                words, began = self.words(name, out), time.monotonic()
                code, said, calls = self.server.run(words, below=out)
                assert code == 0, f"{shlex.join(words)}\n{said}"
                seconds = time.monotonic() - began
                found.append(contents(out))
            shutil.rmtree(self.root / f"{name}_twin")
            first, second = found
            files = {place: digest for place, digest in first.items() if second.get(place) == digest}
            path.write_text(json.dumps({"calls": calls, "seconds": seconds, "files": files}, indent=1))
        return json.loads(path.read_text())


def contents(folder: pathlib.Path, source: pathlib.Path | None = None) -> dict[str, str]:
    """Digest of every file of a run, but for times and its own path; of checkpoints, those of the arrays.

    Args:
      source: the run that the folder was copied from, whose path files may hold that were not written again.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and path.name not in _UNCOMPARED and "checkpoints" not in place.parts:
            content = path.read_bytes()
            for place_of in (folder, source or folder):
                content = content.replace(str(place_of).encode(), b"OUT")
            if path.suffix in (".json", ".jsonl"):
                content = _without_times(content)
            if path.suffix == ".yaml":
                content = re.sub(rb"resume: .*", b"", content)
            found[str(place)] = hashlib.sha256(content).hexdigest()
        elif path.name.startswith("step_") and (path / "manifest.json").exists():
            try:
                found[str(place)] = _arrays(path)
            except Exception:  # of a step that a fault has damaged, whichever way
                found[str(place)] = "damaged"
    return found


def _arrays(step: pathlib.Path) -> str:
    folder = step / json.loads((step / "manifest.json").read_text())["arrays"]
    with warnings.catch_warnings(action="ignore"):  # of a topology that may be another
        held = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder)
    digest = hashlib.sha256()
    for name, leaf in sorted(held.items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _without_times(content: bytes) -> bytes:
    try:
        rows = [json.loads(content)]
    except ValueError:
        try:
            rows = [json.loads(line) for line in content.splitlines()]
        except ValueError:
            return content
    return json.dumps([_kept(row) for row in rows], sort_keys=True).encode()


def _kept(data: Any) -> Any:
    if isinstance(data, dict):
        named = {name: part for name, part in data.items() if name not in _OF_THIS_RUN}
        return {
            name: _kept(part)
            for name, part in named.items()
            if not name.startswith("time") and "second" not in name
        }
    return [_kept(part) for part in data] if isinstance(data, list) else data
