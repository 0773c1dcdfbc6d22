"""Compiler and client options that whole runs need so that they end."""

import os
import re

import jax

THREADS_A_DEVICE = 2
"""Of a client with several devices, at least."""


def choose_threads(*, side_by_side: bool = False) -> None:
    """Sets how many threads XLA's CPU client has; call it before anything is computed.

    By default it has one a core. Threads of such a pool can come to wait for each other in large loops over
    several runs side by side: every thread is idle and the program never ends (jax 0.10.2, two cores: PPO on
    Pendulum over 4 and over 8 seeds, on CartPole over 256). One thread has nobody to wait for, ends all of
    these, and is the fastest for programs of small operations, which it costs more to hand over than to
    compute. Several devices need more than one each: with eight threads for eight devices, programs that were
    begun together each held some of the threads and waited for the others (jax 0.10.2: 40 sums of sharded
    arrays at once hung within 6,000 of them; with two threads a device 120,000 ended).

    Args:
      side_by_side: the program will hold whole runs under `vmap`; else one device keeps JAX's default, which
        is the fastest for models. A PJRT_NPROC that is set already stays.
    """
    if (devices := _cpu_devices()) > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS_A_DEVICE * devices, os.cpu_count() or 1)))
    elif side_by_side:
        os.environ.setdefault("PJRT_NPROC", "1")


def _cpu_devices() -> int:
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(forced[1]) if forced else jax.config.values["jax_num_cpu_devices"]


def compiler_options() -> dict[str, bool | str]:
    """Options for `jax.jit(run, compiler_options=...)` so that the run does not hang; none off CPU.

    The scheduler that keeps memory low leaves the threads less to wait for: it lets most programs end also
    where `choose_threads` was not called in time, but not all (PPO on CartPole over 256 seeds).
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
