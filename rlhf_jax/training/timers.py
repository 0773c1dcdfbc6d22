"""Timers of a step: its parts, the share of the devices' peak it uses, and a trace of it for a profiler."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from rlhf_jax.core import files
from rlhf_jax.core.files import Path
from rlhf_jax.distributed.accelerator_specs import chip_of

PARTS = ("data", "rollout", "reward", "update", "save", "eval")
"""What a step may be made of, in its order; `save` and `eval` come between steps."""


class Meter:
    """Times the parts of a step. What it measures goes to the log and nowhere else: not into any state.

        rollout = meter.timed("rollout", generate, params, prompts, key)

    Args:
      flops: operations that the model needs for one update (`models.training_flops`), for `time/mfu`; 0 for
        no such metric.
      peak_flops: of all devices together, a second; None for what is known of them (`distributed.chips`), and
        no such metric where nothing is.
    """

    def __init__(self, *, flops: float = 0.0, peak_flops: float | None = None) -> None:
        if peak_flops is None:
            chips = [chip_of(device.device_kind) for device in jax.devices()]
            peak_flops = sum(chip.peak_flops for chip in chips if chip)
        self._flops, self._peak = flops, peak_flops
        self._seconds: dict[str, float] = {}

    def timed(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, its results ready, and the seconds until they are added to `part`."""
        with self.timing(part):
            return jax.block_until_ready(function(*args))

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the seconds spent within to `part`; a profiler shows them under this name."""
        began = time.perf_counter()
        with jax.profiler.TraceAnnotation(part):
            yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began

    def read(self, step_seconds: float, tokens: float | None) -> dict[str, float]:
        """The metrics of a step that took so long, after which counting starts anew.

        `time/mfu` is the share of the peak that the model's own operations make up, over the time of the part
        `update` where that was taken, else over the whole step.
        """
        seconds, self._seconds = self._seconds, {}
        metrics = {"time/step_seconds": step_seconds}
        if tokens is not None:
            metrics["time/tokens_per_second"] = tokens / step_seconds
        metrics |= {f"time/{part}_seconds": seconds[part] for part in PARTS if part in seconds}
        if self._flops and self._peak:
            metrics["time/mfu"] = self._flops / seconds.get("update", step_seconds) / self._peak
        return metrics | _memory()


def _memory() -> dict[str, float]:
    """Bytes on the fullest device of this process, where the backend counts them (CPUs do not)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"time/memory_bytes": "bytes_in_use", "time/memory_peak_bytes": "peak_bytes_in_use"}
    found = {name: [float(one[key]) for one in stats if key in one] for name, key in names.items()}
    return {name: max(values) for name, values in found.items() if values}


def describe(metrics: dict[str, float]) -> str:
    """Shares of a step's parts, for the progress: `rollout 61 %, update 30 %, MFU 0.412`."""
    whole = metrics["time/step_seconds"]
    shares = {
        part: metrics.get(f"time/{part}_seconds", 0.0) / whole
        for part in ("data", "rollout", "reward", "update")
    }
    words = [f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005]
    if "time/mfu" in metrics:
        words.append(f"MFU {metrics['time/mfu']:.3f}")
    return ", ".join(words) if len(words) > 1 or "time/mfu" in metrics else ""


class Trace:
    """Records some steps for a profiler: `folder` then opens in XProf (TensorBoard's profile tab), and the
    `*.trace.json.gz` within it in Perfetto (https://ui.perfetto.dev).

    Args:
      first: the first step that is recorded; those before it compile.
      count: how many; 0 for none.
    """

    def __init__(self, folder: Path, *, first: int, count: int) -> None:
        self._folder, self._steps = folder, range(first, first + count)
        # The profiler writes to local disks.
        elsewhere = bool(count) and files.is_remote(folder)
        self._local: Path = pathlib.Path(tempfile.mkdtemp()) if elsewhere else folder
        self._open = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step."""
        if self._steps and number >= self._steps[0] and not self._open and number in self._steps:
            jax.profiler.start_trace(str(self._local))
            self._open = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._open and number >= self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if recording is on."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            if isinstance(self._local, pathlib.Path) and self._local is not self._folder:
                files.upload(self._local, self._folder, files.list_files(self._local))
                shutil.rmtree(self._local)
