"""Limits that a process lays upon itself, and that nothing it runs can lift: memory, files, processes."""

import ctypes
import errno
import os
import platform
import signal
import sys
import time
from pathlib import Path

_KEPT = (
    "PATH",
    "HOME",
    "TMPDIR",
    "TZ",
    "LANG",
    "LANGUAGE",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "JAX_PLATFORMS",
)
_KEPT_PREFIXES = ("LC_", "PYTHON")

# Numbers of system calls (<asm/unistd.h>), and of the machine (<linux/audit.h>).
_MACHINES = {
    "x86_64": (0xC000003E, 56, 435, (57, 58, 59, 322)),  # clone, clone3; fork, vfork, execve, execveat
    "aarch64": (0xC00000B7, 220, 435, (221, 281)),  # clone, clone3; execve, execveat
}
_SET_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES, _SET_CHILD_SUBREAPER = 22, 2, 38, 36
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x00010000
_KILL_SECONDS = 5.0


def clean_environment(*names: str) -> dict[str, str]:
    """Environment variables that a worker process needs, and no keys or tokens.

    Args:
      names: further variables.
    """
    kept = {*_KEPT, *names}
    return {k: v for k, v in os.environ.items() if k in kept or k.startswith(_KEPT_PREFIXES)}


def limit_resources(*, memory_bytes: int, file_bytes: int, cpu_seconds: int) -> None:
    """Hard limits from now on.

    Args:
      memory_bytes: of address space beyond what is taken already.
      file_bytes: of any file that is written.
      cpu_seconds: processor time in all that this process may yet use.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no such file off Linux
        taken = 0
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, taken + memory_bytes))
    end = processor_seconds() + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (end, end))


def limit_processor_time(seconds: int) -> bool:
    """CPU time limit of what comes now; past it the process gets SIGXCPU, even if its parent is gone.

    Returns:
      Whether the hard limit leaves so much.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    end = processor_seconds() + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (min(end, hard), hard))
    return end <= hard


def processor_seconds() -> int:
    """CPU time of this process, in whole seconds."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_utime + usage.ru_stime)


def forbid_processes() -> bool:
    """From now on this thread, and those it starts, can start threads but no process.

    A filter of system calls (seccomp), which holds for root, too, where RLIMIT_NPROC does not.

    Returns:
      Whether the system knows how; only Linux on x86-64 and 64-bit ARM does.
    """
    known = _MACHINES.get(platform.machine())
    if known is None or not sys.platform.startswith("linux"):
        return False
    program = _filter(*known)
    code = b"".join(
        kind.to_bytes(2, sys.byteorder) + bytes([yes, no]) + value.to_bytes(4, sys.byteorder)
        for kind, yes, no, value in program
    )
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filled = Program(len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return False
    return libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(filled), 0, 0) == 0


def _filter(
    machine: int, clone: int, clone3: int, others: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    """(operation, jump if true, jump if false, value) of a BPF program over `struct seccomp_data`."""
    refused, unknown = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),  # the machine
        (_EQUAL, 1, 0, machine),
        (_RETURN, 0, 0, refused),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 interface, with numbers of its own
        (_RETURN, 0, 0, refused),
        (
            _EQUAL,
            0,
            1,
            clone3,
        ),  # its flags are in memory, out of reach: libraries fall back to clone
        (_RETURN, 0, 0, unknown),
    ]
    for number in others:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, refused)]
    return [
        *lines,
        (_EQUAL, 1, 0, clone),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, 16),  # its flags
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refused),
    ]


def adopt_orphans() -> bool:
    """From now on processes whose parent ends become children of this one, if they descend from it.

    Returns:
      Whether the system knows how; only Linux does.
    """
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def reap_children() -> None:
    """Forgets children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def kill_descendants(pid: int, mark: bytes) -> None:
    """Kills what came of a process, but not the process itself.

    What descends from it is found by its parents, if the process called `adopt_orphans` and lives; what
    outlived it by its environment, as long as it kept that. Process groups would not find one that has left
    the group. Off Linux there is no list of processes: nothing is done.

    Args:
      pid: the process.
      mark: an entry of its environment that no other process has, such as `NAME=value`.
    """
    end = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < end:  # one may be born while the others die
        parents = _parents()
        found = [p for p in parents if p not in (pid, os.getpid()) and _comes_of(p, pid, parents, mark)]
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        if not found:
            return
        time.sleep(0.001)


def _parents() -> dict[int, int]:
    """The parent of each process that has not ended."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:  # ended meanwhile
            continue
        if state not in "ZX":
            parents[int(folder.name)] = int(parent)
    return parents


def _comes_of(process: int, pid: int, parents: dict[int, int], mark: bytes) -> bool:
    above = process
    while above in parents:
        above = parents[above]
        if above == pid:
            return True
    try:
        return mark in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return False
