"""The one training loop, and the run folder that every stage writes and the next one reads."""

from rlhf_jax.training.loop import EXIT_NOT_FINISHED, Interrupted, LoopConfig, StepFn, run_loop
from rlhf_jax.training.timers import Meter

__all__ = ["EXIT_NOT_FINISHED", "Interrupted", "LoopConfig", "Meter", "StepFn", "run_loop"]
