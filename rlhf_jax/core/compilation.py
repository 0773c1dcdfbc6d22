"""What whole runs need of the compiler and of the client, so that they end."""

import os

import jax

LEAST_THREADS = 8


def ensure_threads() -> None:
    """Gives XLA's CPU client at least eight threads; call it before anything is computed.

    By default it has one a core. On two cores they can come to wait for each other in large loops over
    several runs side by side: every thread is idle and the program never ends. Seen with jax 0.10.2 for PPO
    on Pendulum over 4 and over 8 seeds and on CartPole over 256; with eight threads the first and the last
    were tried again, and end. A PJRT_NPROC that is set already stays.
    """
    os.environ.setdefault("PJRT_NPROC", str(max(LEAST_THREADS, os.cpu_count() or 1)))


def compiler_options() -> dict[str, bool | str]:
    """What `jax.jit(run, compiler_options=...)` needs so that the run does not hang; nothing off CPU.

    The scheduler that keeps memory low leaves the threads less to wait for: it lets most programs end also
    where `ensure_threads` was not called in time, but not all (PPO on CartPole over 256 seeds).
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
