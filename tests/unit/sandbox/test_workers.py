"""Work under limits: every way to go wrong is one outcome, and the next task is served."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.sandbox.workers import LimitedWorker

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
