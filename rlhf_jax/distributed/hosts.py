"""Several processes as one program: who they are, how they find each other, when they give up."""

import dataclasses
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.core.errors import UserError

_EXAMPLE = "write auto, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:8476,4,0"


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """Settings of `jax.distributed`, by which processes on several hosts become one program.

    Attributes:
      coordinator: empty for this process alone; `auto` for what Cloud TPU, SLURM, Open MPI or Kubernetes say;
        `HOST:PORT,COUNT,INDEX` elsewhere: the first process's address, how many there are, which one this is.
      init_timeout: seconds until all must have come.
      heartbeat_timeout: seconds of silence after which a process counts as lost, and the others end.
    """

    coordinator: str = ""
    init_timeout: int = 300
    heartbeat_timeout: int = 60


def init_distributed(options: DistributedOptions) -> None:
    """Joins the other processes. Must come before anything else that asks JAX for devices.

    Raises:
      UserError: `coordinator` is not of its form, the environment names no hosts, or these came too late.
    """
    if not options.coordinator:
        return
    for name in ("init_timeout", "heartbeat_timeout"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is not positive: give seconds"
            )
    address, count, index = (
        (None, None, None) if options.coordinator == "auto" else _parse(options.coordinator)
    )
    # On CPU the default collectives know one process only.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=options.init_timeout,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--coordinator {options.coordinator}: the processes did not find each other ({reason}): start "
            f"them all within {options.init_timeout} s of each other and check the address; {_EXAMPLE}"
        ) from error


def _parse(coordinator: str) -> tuple[str, int, int]:
    address, count, index = ([*coordinator.split(","), "", ""])[:3]
    numbers = [word for word in (count, index) if word.isascii() and word.isdecimal()]
    _, colon, port = address.rpartition(":")
    if coordinator.count(",") != 2 or len(numbers) != 2 or not (colon and port.isdecimal()):
        raise UserError(f"--coordinator {coordinator!r} is not understood: {_EXAMPLE}")
    if int(index) >= int(count):
        raise UserError(
            f"--coordinator {coordinator}: index {index} is not below the count {count}: indices start at 0"
        )
    return address, int(count), int(index)


def is_main_process() -> bool:
    """True in the process that writes logs, reports and descriptions."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Logical or of `flag` over all processes; all must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


_LOST = ("Connection closed by peer", "Connection reset", "Connection refused", "heartbeat", "UNAVAILABLE")


def is_lost_peer(error: BaseException) -> bool:
    """True for an error of a collective whose peer is gone. What is raised then differs by backend."""
    return any(words in str(error) for words in (*_LOST, "DEADLINE_EXCEEDED", "Timed out"))


def lost_peer_message(error: BaseException) -> str:
    """Error message of a surviving process when a collective failed."""
    reason = str(error).splitlines()[0][:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()}: another process of this run has ended or "
        f"does not answer ({reason}); the last whole checkpoint is untouched: start all processes again "
        f"with --resume"
    )


def abort(status: int) -> None:
    """Ends this process without the barrier at which JAX waits for all others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
