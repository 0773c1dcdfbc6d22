"""What a campaign of faults damages: tiny finished runs, processes, and verdicts on what they say."""

import contextlib
import io
import os
import pathlib
import random
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from rlhf_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
Found = tuple[str, str, str] | tuple[str, str, str, int]
"""(what was done, outcome, what was said), and of how many faults the case consists where that is not one"""
Kind = Callable[["World", random.Random, pathlib.Path], Found]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    """Makes a function a kind of the campaign."""
    KINDS[function.__name__] = function
    return function


_MODEL = "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1"
_SHORT = "--steps 6 --save-every 2 --quiet --no-report --log"
_REWARD = "fault_rewards:mixed"
_PROMPTS = "--data arithmetic:1 --prompt-count 32 --eval-count 4 --max-new-tokens 6 --samples 2"
COMMAND_LINES = {
    "sft": f"sft {_MODEL} {_SHORT} --data arithmetic:1 --demonstrations 64 --eval-count 8 "
    "--batch-size 8 --learning-rate 3e-3",
    "reward-model": f"reward-model --model {{sft}} {_SHORT} --data arithmetic:1 --pair-count 32 "
    "--eval-count 8 --batch-size 8 --learning-rate 1e-3",
    "dpo": f"dpo --model {{sft}} {_SHORT} --data arithmetic:1 --pair-count 32 --eval-count 8 --batch-size 8 "
    "--learning-rate 1e-3",
    "grpo": f"grpo --model {{sft}} {_SHORT} {_PROMPTS} --rewards {_REWARD} --batch-size 4 --group-size 2 "
    "--learning-rate 1e-3",
    "ppo": f"ppo --model {{sft}} {_SHORT} {_PROMPTS} --rewards {_REWARD} --batch-size 8 --num-minibatches 2 "
    "--learning-rate 1e-3 --scale-rewards",
    "online-dpo": f"online-dpo --model {{sft}} {_SHORT} {_PROMPTS} --rewards {_REWARD} --batch-size 4 "
    "--learning-rate 1e-3",
    "distill": f"distill --model {{sft}} --teacher {{sft}} {_SHORT} {_PROMPTS} --loss js --lmbda 1 "
    "--batch-size 4 --learning-rate 1e-3",
    "process-reward": f"process-reward --model {{sft}} {_SHORT} --data arithmetic:1 --row-count 32 "
    "--batch-size 8 --learning-rate 1e-3",
    "rounds": f"rounds --model {{sft}} --steps 2 --rounds 2 --quiet --no-report --log {_PROMPTS} "
    f"--max-new-tokens 128 --rewards {_REWARD} --method dpo --prompts-per-round 8 --samples-per-prompt 8 "
    "--batch-size 2 --learning-rate 1e-3",
    "pretrain": f"pretrain {_MODEL} {_SHORT} --data arithmetic:1 --demonstrations 200 --batch-size 4 "
    "--max-seq-length 32 --sample-tokens 4 --learning-rate 1e-3",
}


# Compiled programs are kept, however small: most of the time of a tiny run goes there.
_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class World:
    """Finished tiny runs, made when they are first asked for.

    Args:
      root: their folder.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def words(self, name: str, out: pathlib.Path, *more: str) -> list[str]:
        """A command line, after `python -m rlhf_jax`."""
        sft = self.run("sft") if "{sft}" in COMMAND_LINES[name] else ""
        return [*shlex.split(COMMAND_LINES[name].format(sft=sft)), "--out", str(out), *more]

    def run(self, name: str) -> pathlib.Path:
        """An unbroken run."""
        folder = self.root / f"run_{name}"
        if not (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)
            code, said = finish(start(self.words(name, folder)))
            assert code == 0, said
            (self.root / f"run_{name}" / "finished").touch()
        return folder

    def seconds(self, name: str) -> float:
        """How long a run takes whose programs were compiled before."""
        path = self.run(name) / "finished"
        if not path.read_text():
            folder, began = self.root / f"timed_{name}", time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            finish(start(self.words(name, folder)))
            path.write_text(str(time.monotonic() - began))
        return float(path.read_text())


def start(words: list[str], limit: str = "") -> subprocess.Popen:
    """`rlhf` in a process of its own, behind a shell command such as a `ulimit`."""
    return subprocess.Popen(
        ["bash", "-c", f'{limit} exec "$0" "$@"', sys.executable, "-m", "rlhf_jax", *words],
        cwd=ROOT,
        env=os.environ | _CACHE | {"PYTHONPATH": f"{ROOT}:{ROOT}/tools:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """(exit status, what was printed); status 124 where it hangs."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return 124, process.communicate()[0]
    return process.returncode, said


def judged(action: Callable[[], Any], expected: Any = None) -> tuple[str, str]:
    """(outcome, what was said) of something in this process; what it gives must be `expected`, if that is."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            given = action()
    except UserError as error:
        said = str(error)
        return ("right" if said and "\n" not in said else "unexplained"), said
    except SystemExit as end:
        return ("right" if end.code == 2 or printed.getvalue() else "silent"), printed.getvalue()
    except Exception:
        return "unexplained", traceback.format_exc()
    said = printed.getvalue()
    return ("right" if expected is None or given == expected or said else "silent"), said


def fits(code: int, said: str) -> bool:
    """Whether a process ended well or with one sentence."""
    return "Traceback" not in said and (code == 0 or "error: " in said or code in (75, 130))
