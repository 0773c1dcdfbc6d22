"""Commands in processes forked from one that has imported everything, each with a fault at a chosen instant.

    server = Server(folder)
    code, said, calls = server.run(["sft", "--out", ...], below=folder, at=17, how=-signal.SIGKILL)

An import takes longer than a tiny run. The server forks before JAX has started anything, and asks the shim
`fault_shim.c` for the fault.
"""

import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIM = "shim.so"
HAS_COMPILER = sys.platform == "linux" and shutil.which("cc") is not None
HANGS = 124  # its status, as of timeout(1)


class Server:
    """A process that forks commands.

    Args:
      folder: of the shim, of compiled programs, and of what commands print; they run in it.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SHIM).exists():
            source = str(ROOT / "tools" / "fault_shim.c")
            subprocess.run(
                ["cc", "-shared", "-fPIC", "-O2", "-o", str(folder / SHIM), source, "-ldl"], check=True
            )
        self.process: subprocess.Popen | None = None

    def run(
        self,
        words: list[str],
        *,
        below: pathlib.Path | None = None,
        at: int = 0,
        how: int = 0,
        lasting: bool = False,
        clock: tuple[int, float] = (0, 0.0),
        kill_after: float = 0.0,
        seconds: float = 300.0,
    ) -> tuple[int, str, int]:
        """(status, what was printed, calls that changed something) of a command.

        Args:
          below: folder whose changes are counted.
          at: number of the change at which the fault is; 0 for none.
          how: errno of the failure, or minus a signal that the process sends itself.
          lasting: later changes fail, too.
          clock: (number of the change from which the clock is off, by so many seconds).
          kill_after: seconds after which the process is killed; 0 for never.
          seconds: after which it hangs.
        """
        asked = {"words": words, "below": str(below or ""), "at": at, "how": how, "lasting": lasting}
        asked |= {
            "clock": clock,
            "kill_after": kill_after,
            "seconds": seconds,
            "said": str(self.folder / "said"),
        }
        if self.process is None or self.process.poll() is not None:
            self.process = _start(self.folder)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code, calls = json.loads(self.process.stdout.readline())
        return code, (self.folder / "said").read_text(errors="replace"), calls

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.communicate()


def _start(folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).resolve())],
        cwd=folder,
        env=os.environ
        | {
            "LD_PRELOAD": str(folder / SHIM),
            "PYTHONPATH": f"{ROOT}:{ROOT}/tools:{os.environ.get('PYTHONPATH', '')}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# In the server --------------------------------------------------------------------------------------


def serve() -> None:
    """Does what is asked, one line of JSON at a time, until the input ends."""
    _import_everything()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        pathlib.Path(asked["said"]).write_text("")
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _become(asked, writing)
        os.close(writing)
        code = _wait(pid, asked)
        counted = os.read(reading, 99) if code >= 0 else b""
        os.close(reading)
        print(json.dumps([code, int(counted or 0)]), file=answers, flush=True)


def _import_everything() -> None:
    import importlib

    from rlhf_jax.cli.commands import COMMANDS, stage_module

    for names in COMMANDS.values():
        for name in names:
            importlib.import_module(stage_module(name))


def _wait(pid: int, asked: dict[str, Any]) -> int:
    began, stopped = time.monotonic(), 0.0
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        passed = time.monotonic() - began
        if ended and os.WIFSTOPPED(status):
            stopped = passed
        elif ended:
            return os.waitstatus_to_exitcode(status)
        if stopped and passed - stopped > 0.3:
            os.kill(pid, signal.SIGCONT)
            stopped = 0.0
        if passed > asked["seconds"]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HANGS
        if asked["kill_after"] and passed > asked["kill_after"]:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _become(asked: dict[str, Any], counted: int) -> None:
    """Makes the forked process the command."""
    import jax

    from rlhf_jax.cli.commands import main

    said, nothing = os.open(asked["said"], os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for fd, other in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(fd, other)
    sys.stdin = os.fdopen(0)
    at, how = asked["at"], asked["how"]
    if at or asked["kill_after"]:  # what is killed would leave torn programs to the others
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    shim, code = ctypes.CDLL(None), 0
    if asked["below"]:
        clock_at, shift = asked["clock"]
        shim.fault_arm(
            os.fsencode(asked["below"]), ctypes.c_long(at), how, int(asked["lasting"]),
            ctypes.c_long(clock_at), ctypes.c_double(shift),
        )  # fmt: skip
    try:
        main(asked["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    os.write(counted, str(shim.fault_count()).encode())
    sys.exit(code)


if __name__ == "__main__":
    serve()
