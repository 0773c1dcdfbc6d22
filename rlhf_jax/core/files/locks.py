"""One process at a time in a run folder: an advisory lock that ends with its holder.

On local disks it is `flock` on `folder/.lock`, which the kernel releases when the process dies. In object
stores it is a lease, a small file that its holder writes anew every few seconds: one that stands still was a
dead process's, and is taken over.
"""

import atexit
import contextlib
import errno
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import stores
from rlhf_jax.core.files.records import disk_errors
from rlhf_jax.core.files.stores import Path, PathLike, as_path, resolved

LOCK = ".lock"
SECONDS_BETWEEN_BEATS = 10.0
"""How often a lease is written anew; one that stands still three times as long is nobody's."""

_held: dict[str, Callable[[], None]] = {}  # folder -> how to release it
_scopes = 0


class InUse(Exception):
    """Another process, which the text names, holds a folder."""


def hold(folder: PathLike, name: str = "folder") -> None:
    """Keeps other processes out of a folder until the enclosing `releasing_locks` ends.

    Outside of any, it only looks whether another process is in it. The holder may take it again.

    Args:
      name: of the parameter or option that says which folder.

    Raises:
      UserError: another process holds it; or the folder cannot be written to.
    """
    folder = as_path(folder)
    place = str(resolved(folder))
    if place in _held:
        return
    try:
        with disk_errors(folder, name):
            release = _flock(folder) if isinstance(folder, pathlib.Path) else _lease(folder)
    except InUse as error:
        raise UserError(
            f"{folder} is in use by {error}: wait for its end or stop it, or choose another {name}"
        ) from None
    if _scopes:
        _held[place] = release
    else:
        release()


@contextlib.contextmanager
def releasing_locks() -> Iterator[None]:
    """Releases, at its end, the folders that were first held within it."""
    global _scopes
    before = set(_held)
    _scopes += 1
    try:
        yield
    finally:
        _scopes -= 1
        for name in set(_held) - before:
            _held.pop(name)()


def _flock(folder: pathlib.Path) -> Callable[[], None]:
    import fcntl  # not on every system

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 4096, 0)
            os.close(lock)
            raise InUse(_who(holder)) from None
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return lambda: None  # a file system without locks
        # Its last holder may have removed it since it was opened: then it keeps nobody out.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                break
        os.close(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, _me(), 0)

    def release() -> None:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        os.close(lock)

    return release


def _lease(folder: Path) -> Callable[[], None]:
    path = folder / LOCK
    held = _content(path)
    if held and not _is_dead(held):
        time.sleep(3 * SECONDS_BETWEEN_BEATS)
        if (now := _content(path)) and now != held:
            raise InUse(_who(now))
    stores.write_whole(path, _me())
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):  # a store that does not answer is the run's business
                stores.write_whole(path, _me())

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()

    def release() -> None:
        atexit.unregister(release)
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            stores.remove_file(path)

    atexit.register(release)
    return release


def _me() -> bytes:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}).encode()


def _content(path: Path) -> bytes:
    try:
        return stores.read_bytes(path)
    except FileNotFoundError:
        return b""


def _is_dead(holder: bytes) -> bool:
    """True if a lease's holder was a process of this machine that is no more, or had this one's number."""
    try:
        told = json.loads(holder)
        pid, host = int(told["pid"]), told["host"]
    except (ValueError, KeyError, TypeError):
        return True
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid()


def _who(holder: bytes) -> str:
    try:
        told = json.loads(holder)
        return f"process {told['pid']} on {told['host']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"
