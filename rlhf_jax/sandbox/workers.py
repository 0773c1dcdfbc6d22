"""Work that may never end, in a process of its own with limits on time, memory and output."""

import dataclasses
import importlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf_jax.core.errors import UserError
from rlhf_jax.sandbox import limits

Status = Literal["done", "timeout", "memory", "killed", "crashed"]

START_SECONDS = 60.0
"""How long a worker may take to import what its function needs."""
_LIFETIME = 100
"""Tasks whose whole processor time a worker may use before it is replaced."""
_MARK = "RLHF_JAX_WORKER"

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from rlhf_jax.sandbox.workers import serve; serve(*json.loads(sys.argv[2]))"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of one task.

    Attributes:
      status: `done`; `timeout` (wall or CPU limit); `memory` (the function ran out of it); `killed` (its
        process died); `crashed` (the function raised).
      value: what the function returned, as JSON gives it back; None unless done.
      message: what happened otherwise, as the end of a sentence.
    """

    status: Status
    value: Any = None
    message: str = ""


class LimitedWorker:
    """Calls one function in another process, one task at a time, under limits.

    The process starts with the first task, keeps the function's modules loaded between tasks, is replaced
    after every task that did not end by itself, and ends with its parent. Threads may share a worker; a
    forked child gets a process of its own.

    The process has the limits of `sandbox.limits`, an environment without keys, and a group of its own, which
    is killed with all that came of it. A reply counts if it repeats a number drawn for its task: what earlier
    tasks wrote, and what is written blindly, ends the process.

    Args:
      function: `module:name` of a function from one JSON value to another.
      by_keywords: tasks are objects, whose entries the function takes by name.
      seconds: wall time of a task.
      cpu_seconds: processor time of a task, for a parent that is not there to count; None for `seconds`,
        rounded up, and one more.
      memory_bytes: what a task may take beyond what the loaded modules already have.
      reply_bytes: the longest reply.
      file_bytes: the longest file that may be written.
      processes: whether tasks may start processes, which end with their task.
      environment: variables that the process gets beside the usual ones.
    """

    def __init__(
        self,
        function: str,
        *,
        seconds: float,
        by_keywords: bool = False,
        cpu_seconds: int | None = None,
        memory_bytes: int = 1 << 29,
        reply_bytes: int = 1 << 24,
        file_bytes: int = 1 << 26,
        processes: bool = False,
        environment: Sequence[str] = (),
    ) -> None:
        self.seconds = seconds
        cpu_seconds = cpu_seconds or int(seconds) + 2
        self._arguments = [function, by_keywords, cpu_seconds, memory_bytes, file_bytes, processes]
        self._reply_bytes, self._environment, self._processes = reply_bytes, tuple(environment), processes
        self._process: _Process | None = None
        self._lock = threading.Lock()

    def run(self, tasks: Sequence[Any]) -> list[Outcome]:
        """One outcome for each task; a task that goes wrong does not touch the others.

        Raises:
          UserError: the process does not start.
        """
        return [self._run(task) for task in tasks]

    @property
    def pid(self) -> int | None:
        """The process that waits for the next task; None where there is none."""
        return None if self._process is None else self._process.popen.pid

    def close(self) -> None:
        """Ends the process; the next task starts another."""
        with self._lock:
            self._replace(None)

    def _run(self, task: Any) -> Outcome:
        try:
            message = json.dumps(task).encode()
        except (TypeError, ValueError) as error:
            return Outcome("crashed", message=f"was given what is not plain JSON ({error})")
        with self._lock:
            # A fork must not share its parent's pipes.
            if self._process is None or self._process.owner != os.getpid():
                self._replace(_Process(self._arguments, self._environment))
            process = self._process
            assert process is not None
            outcome, is_spent = process.call(message, self.seconds, self._reply_bytes)
            if is_spent:
                self._replace(None)
            elif self._processes:
                process.end_others()
            return outcome

    def _replace(self, process: "_Process | None") -> None:
        old, self._process = self._process, process
        if old is not None and old.owner == os.getpid():
            old.stop()


class _Process:
    """The parent's side of a running worker."""

    def __init__(self, arguments: list[Any], environment: Sequence[str]) -> None:
        self.owner = os.getpid()
        mark = secrets.token_hex(16)
        self.mark = f"{_MARK}={mark}".encode()
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=limits.clean_environment(*environment) | {_MARK: mark},
            start_new_session=True,
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.requests, self.replies = os.dup(self.popen.stdin.fileno()), os.dup(self.popen.stdout.fileno())
        self.popen.stdin.close()
        self.popen.stdout.close()
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe, False)
        self.stop = weakref.finalize(
            self, _stop, self.owner, self.popen, self.mark, self.requests, self.replies
        )
        try:
            ready = _read_line(self.replies, 100, time.monotonic() + START_SECONDS) == b"ready"
        except (EOFError, _TooLate, _TooLong):
            ready = False
        if not ready:
            self.stop()
            raise UserError(
                f"the process that runs {arguments[0]} did not start; "
                f"check that {sys.executable} can import it"
            )

    def call(self, message: bytes, seconds: float, reply_bytes: int) -> tuple[Outcome, bool]:
        """(how the task ended, whether the process must not be given another)."""
        number, end = secrets.token_hex(16).encode(), time.monotonic() + seconds
        try:
            _write(self.requests, number + b" " + message + b"\n", end)
            reply = _read_line(self.replies, reply_bytes, end)
        except _TooLate:
            return Outcome("timeout", message=f"ran for more than {seconds:g} s"), True
        except _TooLong:
            return Outcome("killed", message=f"replied with more than {reply_bytes} bytes"), True
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return self._death(), True
        repeated, _, content = reply.partition(b" ")
        if repeated != number:
            return Outcome("killed", message="wrote where its replies go"), True
        told = json.loads(content)
        return Outcome(**told["outcome"]), told["spent"]

    def end_others(self) -> None:
        """Ends what a task has started, and left."""
        limits.kill_descendants(self.popen.pid, self.mark)

    def _death(self) -> Outcome:
        try:
            code = self.popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return Outcome("killed", message="closed its pipes")
        if -code == signal.SIGXCPU:
            return Outcome("timeout", message="used up its processor time")
        ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Outcome("killed", message=f"died ({ended})")


def _stop(owner: int, popen: subprocess.Popen, mark: bytes, requests: int, replies: int) -> None:
    if owner == os.getpid():
        popen.send_signal(signal.SIGSTOP)  # while it lives, it is the parent of all that came of it
        limits.kill_descendants(popen.pid, mark)
        try:
            os.killpg(popen.pid, signal.SIGKILL)  # the group lives on where its leader has died
        except (ProcessLookupError, PermissionError):
            popen.kill()
        popen.wait()
    os.close(requests)
    os.close(replies)


# Lines between the two, with a time limit for all of a line -----------------------------------------


class _TooLate(Exception):
    """The time of a task is over."""


class _TooLong(Exception):
    """A line is longer than a reply may be."""


def _read_line(pipe: int, most: int, end: float) -> bytes:
    """A line, without its end; nothing may follow it."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
            raise _TooLate
        part = os.read(pipe, 1 << 16)
        if not part:
            raise EOFError
        line += part
        if len(line) > most + 1000:  # the number and the outcome's own words
            raise _TooLong
    return line[:-1]


def _write(pipe: int, line: bytes, end: float) -> None:
    while line:
        if not select.select([], [pipe], [], max(end - time.monotonic(), 0))[1]:
            raise _TooLate
        line = line[os.write(pipe, line) :]


# The other process ----------------------------------------------------------------------------------


def serve(
    function: str, by_keywords: bool, cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: bool
) -> None:
    """The worker's loop: a task from standard input, its outcome to standard output, until input ends."""
    # Ctrl-C may be sent to this process, too; it is for the parent to say what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    # What the function prints or asks for must not pass for a reply, nor take a task away.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nowhere, standard)
    for pipe in (requests.fileno(), replies):
        os.set_inheritable(pipe, False)
    module, _, name = function.partition(":")
    function_of = getattr(importlib.import_module(module), name)
    call = (lambda task: function_of(**task)) if by_keywords else function_of
    limits.limit_resources(
        memory_bytes=memory_bytes, file_bytes=file_bytes, cpu_seconds=_LIFETIME * cpu_seconds
    )
    if processes:
        limits.adopt_orphans()
    else:
        limits.forbid_processes()
    _write_all(replies, b"ready\n")
    threads = threading.active_count()
    for line in requests:
        limits.reap_children()
        number, _, message = line.partition(b" ")
        goes_on = limits.limit_processor_time(cpu_seconds)
        outcome = dataclasses.asdict(_outcome(call, message))
        spent = not goes_on or threading.active_count() > threads  # a thread could answer a later task
        reply = json.dumps({"outcome": outcome, "spent": spent}).encode()
        _write_all(replies, number + b" " + reply + b"\n")


def _write_all(pipe: int, line: bytes) -> None:
    while line:
        line = line[os.write(pipe, line) :]


def _outcome(call: Callable[[Any], Any], message: bytes) -> Outcome:
    try:
        value = call(json.loads(message))
        json.dumps(value)
    except MemoryError:
        return Outcome("memory", message="ran out of memory")
    # Some libraries report their own time-outs by exceptions that are no Exception.
    except BaseException as error:
        return Outcome("crashed", message=f"raised {type(error).__name__}: {error}"[:500])
    return Outcome("done", value)
