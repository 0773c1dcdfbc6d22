"""Work that may never end, in a process of its own with limits on time, memory and output."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal

from rlhf_jax.core.errors import UserError

Status = Literal["done", "timeout", "memory", "killed", "crashed"]

START_SECONDS = 60.0
"""How long a worker may take to import what its function needs."""

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from rlhf_jax.sandbox.workers import serve; serve(*json.loads(sys.argv[2]))"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one task ended.

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

    Args:
      function: `module:name` of a function from one JSON value to another.
      by_keywords: tasks are objects, whose entries the function takes by name.
      seconds: wall time of a task.
      cpu_seconds: processor time of a task, for a parent that is not there to count; None for `seconds`,
        rounded up, and one more.
      memory_bytes: what a task may take beyond what the loaded modules already have.
      reply_bytes: the longest reply.
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
    ) -> None:
        self.seconds = seconds
        self._arguments = [function, by_keywords, cpu_seconds or int(seconds) + 2, memory_bytes]
        self._reply_bytes = reply_bytes
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
                self._replace(_Process(self._arguments))
            process = self._process
            assert process is not None
            outcome = process.call(message, self.seconds, self._reply_bytes)
            if outcome.status not in ("done", "crashed"):
                self._replace(None)
            return outcome

    def _replace(self, process: "_Process | None") -> None:
        old, self._process = self._process, process
        if old is not None and old.owner == os.getpid():
            old.stop()


class _Process:
    """The parent's side of a running worker."""

    def __init__(self, arguments: list[Any]) -> None:
        self.owner = os.getpid()
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.requests = Connection(os.dup(self.popen.stdin.fileno()), readable=False)
        self.replies = Connection(os.dup(self.popen.stdout.fileno()), writable=False)
        self.popen.stdin.close()
        self.popen.stdout.close()
        self.stop = weakref.finalize(self, _stop, self.owner, self.popen, self.requests, self.replies)
        try:
            ready = self.replies.poll(START_SECONDS) and self.replies.recv_bytes()
        except EOFError:
            ready = None
        if not ready:
            self.stop()
            raise UserError(
                f"the process that runs {arguments[0]} did not start; "
                f"check that {sys.executable} can import it"
            )

    def call(self, message: bytes, seconds: float, reply_bytes: int) -> Outcome:
        try:
            self.requests.send_bytes(message)
            if not self.replies.poll(seconds):
                return Outcome("timeout", message=f"ran for more than {seconds:g} s")
            return Outcome(**json.loads(self.replies.recv_bytes(reply_bytes)))
        except EOFError:
            return self._death()
        except OSError as error:
            if isinstance(error, BrokenPipeError | ConnectionResetError):
                return self._death()
            return Outcome("killed", message=f"replied with more than {reply_bytes} bytes")

    def _death(self) -> Outcome:
        try:
            code = self.popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return Outcome("killed", message="closed its pipes")
        if -code == signal.SIGXCPU:
            return Outcome("timeout", message="used up its processor time")
        ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Outcome("killed", message=f"died ({ended})")


def _stop(owner: int, popen: subprocess.Popen, requests: Connection, replies: Connection) -> None:
    if owner == os.getpid():
        popen.kill()
        popen.wait()
    requests.close()
    replies.close()


# The other process ----------------------------------------------------------------------------------


def serve(function: str, by_keywords: bool, cpu_seconds: int, memory_bytes: int) -> None:
    """The worker's loop: a task from standard input, its outcome to standard output, until input ends."""
    # Ctrl-C reaches the whole process group; it is for the parent to say what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = Connection(0, writable=False), Connection(os.dup(1), readable=False)
    # What the function prints must not pass for a reply.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    module, _, name = function.partition(":")
    function_of = getattr(importlib.import_module(module), name)
    call = (lambda task: function_of(**task)) if by_keywords else function_of
    _limit_memory(memory_bytes)
    replies.send_bytes(b"ready")
    while True:
        try:
            message = requests.recv_bytes()
        except EOFError:
            return
        _limit_processor_time(cpu_seconds)
        replies.send_bytes(json.dumps(dataclasses.asdict(_outcome(call, message))).encode())


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


def _limit_memory(extra_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no such file off Linux
        taken = 0
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra_bytes, taken + extra_bytes))


def _limit_processor_time(seconds: int) -> None:
    """From now on; past it the process gets SIGXCPU and ends, whether its parent still watches or not."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
