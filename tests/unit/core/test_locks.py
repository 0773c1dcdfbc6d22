"""One process at a time in a run folder; the lock of a dead one keeps nobody out."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import locks

HOLDER = """
import sys
from rlhf_jax.core import files
with files.releasing_locks():
    files.hold(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """`start(folder) -> process` that holds it, until its standard input is closed."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_folder_that_another_process_holds(tmp_path, holder):
    folder = tmp_path / "new" / "run"
    process = holder(folder)
    message = (
        rf"run is in use by process {process.pid} on {socket.gethostname()}: wait for its end or stop it"
    )
    for _ in range(2):
        with files.releasing_locks(), pytest.raises(UserError, match=message):
            files.hold(folder)
    with pytest.raises(UserError, match=message):
        files.hold(folder)  # outside of a scope, too
    files.hold(tmp_path / "other")
    process.stdin.close()
    assert process.wait() == 0
    assert list(folder.iterdir()) == []
    with files.releasing_locks():
        files.hold(folder)


def test_a_killed_process_holds_nothing(tmp_path, holder):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / locks.LOCK).exists()
    with files.releasing_locks():
        files.hold(tmp_path)
        assert str(os.getpid()) in (tmp_path / locks.LOCK).read_text()
    assert not (tmp_path / locks.LOCK).exists()


def test_the_holder_may_come_again_and_lets_go_at_the_end_of_the_outermost(tmp_path, holder):
    with files.releasing_locks():
        files.hold(tmp_path)
        with files.releasing_locks():
            files.hold(tmp_path)
            files.hold(tmp_path / "inner")
        assert (tmp_path / locks.LOCK).exists()
        assert not (tmp_path / "inner" / locks.LOCK).exists()

    def fails():
        with files.releasing_locks():
            files.hold(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    holder(tmp_path)


def test_links_in_a_circle_are_one_sentence(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert files.resolved(loop).name == "loop"
    assert files.resolved(tmp_path / "a" / ".." / "b") == files.resolved(tmp_path) / "b"
    with pytest.raises(UserError, match="cannot be written"):
        files.hold(loop)


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file: cannot be written, as .*file is a file where a folder is meant"
    ):
        files.hold(tmp_path / "file")

    def without_locks(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with files.releasing_locks():
        files.hold(tmp_path)  # a file system that has none


def lease(**changes):
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": 1.0} | changes)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Leases as in an object store, on a local disk and with quick beats."""
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_BEATS", 0.05)
    return tmp_path


@pytest.mark.parametrize(
    "left",
    [
        "torn {",
        lease(),  # of a process with this one's number, as the first in a container has
        lease(pid=2**22 + 1),  # no such process here
        lease(host="elsewhere"),  # stands still
    ],
    ids=["torn", "own number", "no process", "elsewhere"],
)
def test_a_dead_lease_is_taken_over(store, left):
    (store / locks.LOCK).write_text(left)
    release = locks._lease(store)
    assert str(os.getpid()) in (store / locks.LOCK).read_text()
    before = (store / locks.LOCK).read_text()
    for _ in range(200):
        if (store / locks.LOCK).read_text() != before:
            break
        locks.time.sleep(0.05)
    else:
        pytest.fail("the lease is not written anew")
    release()
    assert not (store / locks.LOCK).exists()


def test_a_lease_that_lives_keeps_others_out(store, monkeypatch):
    (store / locks.LOCK).write_text(lease(host="elsewhere", pid=7))

    def beats_meanwhile(_):
        (store / locks.LOCK).write_text(lease(host="elsewhere", pid=7, time=2.0))

    monkeypatch.setattr(locks.time, "sleep", beats_meanwhile)
    with pytest.raises(locks.InUse, match="process 7 on elsewhere"):
        locks._lease(store)
