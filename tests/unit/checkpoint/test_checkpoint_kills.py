"""A process killed while it saves leaves a whole step behind, whenever it is killed."""

import random
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.checkpoint import CheckpointManager

SCRIPT = """
import os, signal, sys, threading, time
import jax, numpy as np
from rlhf_jax.checkpoint import CheckpointManager

folder, kill_event, kill_ms = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
events = -1

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def count(event, args):
    global events
    if events >= 0 and event in EVENTS and str(args[0]).startswith(folder):
        events += 1
        if events == kill_event:
            kill()

def make_state(step):
    return {"w": np.random.default_rng(step).normal(size=(400, 400)), "key": jax.random.key(step)}

manager = CheckpointManager(folder, max_to_keep=1)
start = 0
if manager.steps():
    start, state, extra = manager.restore(make_state(0))
    expected = make_state(start)
    assert state["w"].tobytes() == expected["w"].tobytes() and extra == {"step": start}
    assert (jax.random.key_data(state["key"]) == jax.random.key_data(expected["key"])).all()
print("restored", start, flush=True)
manager.save(start + 1, make_state(start + 1), extra={"step": start + 1}, wait=True)
print("whole", start + 1, flush=True)
sys.addaudithook(count)
events = 0
if kill_ms:
    threading.Timer(kill_ms / 1000, kill).start()
for step in range(start + 2, start + 40):
    for _ in range(1 + step % 2):  # every other step is saved twice: the second replaces the first
        manager.save(step, make_state(step), extra={"step": step})
    manager.wait()
    print("whole", step, flush=True)
    if not (kill_event or kill_ms):
        break
manager.close()
"""


def run(folder, *, event: int = 0, milliseconds: float = 0) -> tuple[int, list[str], str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(event), str(milliseconds)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return process.returncode, process.stdout.splitlines(), process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_whole_step(tmp_path, seed):
    rng = random.Random(seed)
    whole = 0
    kills = [
        {"event": rng.randint(1, 60)},
        {"milliseconds": rng.uniform(1, 150)},
        {"event": rng.randint(61, 150)},
    ]
    for kill in [*kills, {}]:
        code, lines, errors = run(tmp_path, **kill)
        assert code == (-9 if kill else 0), errors
        assert errors == ""
        restored = int(lines[0].removeprefix("restored "))
        assert restored >= whole, (kill, lines)
        whole = int(lines[-1].removeprefix("whole "))
    assert [path.name for path in tmp_path.iterdir()] == [f"step_{whole:08d}"]


def test_a_kill_while_the_step_is_marked_leaves_an_unfinished_one(tmp_path, capfd):
    """The mark is written under another name first: with only that there, no word is said of damage."""
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": np.ones(2)}, wait=True)
    manager.close()
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "step_00000002" / "unfinished.4711.part").write_text("This st")
    manager = CheckpointManager(tmp_path)
    assert manager.restore({"w": np.zeros(2)})[0] == 1
    manager.save(2, {"w": np.ones(2)}, wait=True)
    manager.close()
    assert not (tmp_path / "step_00000002" / "unfinished.4711.part").exists()
    assert capfd.readouterr().err == ""
