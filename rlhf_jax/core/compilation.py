"""Options for compiling whole runs."""

import jax


def compiler_options() -> dict[str, bool | str]:
    """What `jax.jit(run, compiler_options=...)` needs so that the run does not hang; nothing off CPU.

    With its default scheduler, XLA's CPU client may lose a wake-up in large loops over several runs side by
    side: every thread is idle and the program never ends. Seen with jax 0.10.2 on two cores, for TRPO and
    GRPO over four seeds and TD3 over two. The scheduler that keeps memory low has not hung.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
