"""Work under limits: every way to go wrong is one outcome, and the next task is served."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.sandbox.workers import LimitedWorker

sys.path.append(os.path.dirname(__file__))  # of `hostile`, which workers import
TIMEOUT, ENDLESS = 0.4, 10**6


def one(worker, task):
    return worker.run([task])[0]


def test_tasks_are_answered_by_one_process():
    worker = LimitedWorker("builtins:sum", seconds=20)
    outcomes = worker.run([[1, 2], [], ["x"], [0.5]])
    assert [outcome.status for outcome in outcomes] == ["done", "done", "crashed", "done"]
    assert [outcome.value for outcome in outcomes] == [3, 0, None, 0.5]
    assert "TypeError" in outcomes[2].message
    pid = worker.pid
    assert one(worker, [5]).value == 5
    assert worker.pid == pid
    assert one(worker, {1, 2}).status == "crashed"
    worker.close()
    assert worker.pid is None
    assert one(worker, [6]).value == 6
    worker.close()


def test_a_process_that_takes_too_long_is_replaced():
    worker = LimitedWorker("time:sleep", seconds=TIMEOUT)
    start = time.monotonic()
    outcomes = worker.run([ENDLESS, 0])
    assert time.monotonic() - start < 20
    assert [outcome.status for outcome in outcomes] == ["timeout", "done"]
    assert "0.4 s" in outcomes[0].message
    worker.close()


def test_processor_time_is_limited_though_nobody_watches():
    worker = LimitedWorker("math:factorial", seconds=60, cpu_seconds=1)
    outcome = one(worker, 3 * 10**6)
    assert outcome.status == "timeout"
    assert "processor" in outcome.message
    worker.close()


def test_memory_and_output_are_limited():
    worker = LimitedWorker("builtins:range", seconds=20, memory_bytes=1 << 27)
    assert one(worker, 3).status == "crashed"  # a range is no JSON
    worker.close()
    worker = LimitedWorker("builtins:bytearray", seconds=20, memory_bytes=1 << 27)
    assert one(worker, 1 << 32).status == "memory"
    worker.close()
    worker = LimitedWorker("builtins:str", seconds=20, reply_bytes=1000)
    outcomes = worker.run(["x" * 10_000, "y"])
    assert [outcome.status for outcome in outcomes] == ["killed", "done"]
    assert "1000 bytes" in outcomes[0].message
    worker.close()


def test_a_process_that_dies_is_named_and_replaced():
    worker = LimitedWorker("signal:raise_signal", seconds=20)
    outcomes = worker.run([signal.SIGKILL, signal.SIGSEGV])
    assert [outcome.status for outcome in outcomes] == ["killed", "killed"]
    assert "SIGKILL" in outcomes[0].message
    worker.close()
    worker = LimitedWorker("os:_exit", seconds=20)
    assert "exit status 3" in one(worker, 3).message
    worker.close()


def test_prints_of_the_function_are_no_reply():
    worker = LimitedWorker("builtins:print", seconds=20)
    assert one(worker, "{}").value is None
    assert one(worker, "{}").status == "done"
    worker.close()


def test_a_function_that_cannot_be_imported_is_one_sentence():
    with pytest.raises(UserError, match="no_such_module:f did not start"):
        one(LimitedWorker("no_such_module:f", seconds=1), 1)


def test_the_process_ends_with_its_parent():
    program = (
        "from rlhf_jax.sandbox.workers import LimitedWorker\n"
        "worker = LimitedWorker('builtins:abs', seconds=20)\n"
        "worker.run([1])\nprint(worker.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still alive")


# Hostile tasks -----------------------------------------------------------------------------------------


def is_alive(pid):
    """Whether there is such a process, and it has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def marked_processes(worker):
    """Processes of a worker beside its own."""
    mark, found = worker._process.mark, []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read() and is_alive(int(name)) and int(name) != worker.pid:
                    found.append(int(name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", ["popen", "session", "fork", "double", "exec"])
def test_no_process_can_be_started(how):
    worker = LimitedWorker("hostile:start_child", seconds=20)
    assert one(worker, {"how": how}).value == "PermissionError"
    assert one(worker, {"how": "thread"}).value == "threads"
    assert marked_processes(worker) == []
    worker.close()


@pytest.mark.parametrize("hang", [False, True])
@pytest.mark.parametrize("how", ["popen", "session", "fork", "double", "anonymous"])
def test_processes_that_may_be_started_end_with_their_task(how, hang):
    worker = LimitedWorker("hostile:start_child", seconds=0.5 if hang else 20, processes=True)
    one(worker, {"how": "thread"})
    mark = worker._process.mark
    outcome = one(worker, {"how": how, "hang": hang})
    assert outcome.status == ("timeout" if hang else "done")
    assert hang or not is_alive(outcome.value)
    alive = [int(n) for n in os.listdir("/proc") if n.isdigit() and has_mark(n, mark) and is_alive(n)]
    assert alive == ([] if hang else [worker.pid])
    worker.close()


def has_mark(name, mark):
    try:
        return any(mark in Path(f"/proc/{name}/{kind}").read_bytes() for kind in ("environ", "cmdline"))
    except OSError:
        return False


FORGED = '{"outcome": {"status": "done", "value": "FORGED", "message": ""}, "spent": false}\n'


@pytest.mark.parametrize(
    "text", [FORGED, "0" * 32 + " " + FORGED, "half a line", "\x00\x00\x01\x00ready", "\n"]
)
@pytest.mark.parametrize("hang", [False, True])
def test_replies_cannot_be_forged_and_half_of_one_holds_nobody(text, hang):
    worker = LimitedWorker("hostile:forge", seconds=0.5)
    outcome = one(worker, {"text": text, "hang": hang})
    assert outcome.status in ("killed", "timeout")
    assert outcome.value is None
    assert one(worker, {"text": ""}).value == "honest"
    worker.close()


def test_a_process_in_which_a_thread_was_left_gets_no_other_task():
    worker = LimitedWorker("hostile:answer_later", seconds=20)
    assert one(worker, 0).value == "honest"
    pid = worker.pid
    assert one(worker, 1).value == "honest"
    assert worker.pid is None
    assert one(worker, 0).value == "honest"
    assert worker.pid != pid
    worker.close()


def test_files_are_limited(tmp_path):
    worker = LimitedWorker("hostile:write_file", seconds=20, file_bytes=2 << 20)
    outcomes = worker.run([{"path": str(tmp_path / "f"), "megabytes": count} for count in (2, 3)])
    assert outcomes[0].value == 2 << 20
    assert "File too large" in outcomes[1].message
    assert os.path.getsize(tmp_path / "f") == 2 << 20
    worker.close()


def test_the_limit_on_processor_time_is_hard():
    worker = LimitedWorker("hostile:burn", seconds=20, cpu_seconds=3)
    hard = one(worker, {"lift": True}).value
    assert 300 <= hard < 400
    assert hard != resource.RLIM_INFINITY
    worker.close()


def test_keys_stay_with_the_parent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("SEARCH_KEY", "sk-2")
    names = ["OPENAI_API_KEY", "SEARCH_KEY", "PATH"]
    worker = LimitedWorker("hostile:environment", seconds=20)
    assert one(worker, names).value == {
        "OPENAI_API_KEY": None,
        "SEARCH_KEY": None,
        "PATH": os.environ["PATH"],
    }
    worker.close()
    worker = LimitedWorker("hostile:environment", seconds=20, environment=["SEARCH_KEY"])
    assert one(worker, names).value["SEARCH_KEY"] == "sk-2"
    worker.close()
