"""The one training loop: state in, state out; it logs, warns, evaluates, saves, resumes and stops cleanly.

A step is atomic: whatever it samples or buffers lives and dies within it, and its inputs are functions of
the step's number and of the state. The state saved between two steps is therefore all that a resume needs,
and a run that was killed continues bit for bit as one that was not. What a learner keeps frozen is not saved:
the script that goes on with a run brings it again.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import jax

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import with_frozen, without_frozen
from rlhf_jax.core.types import Metrics
from rlhf_jax.distributed import any_host, is_first_host
from rlhf_jax.metrics.health import Monitor, Thresholds
from rlhf_jax.metrics.progress import Progress
from rlhf_jax.metrics.writers import MetricsWriter, read_metrics
from rlhf_jax.training.timers import Meter, Trace, describe

State = TypeVar("State")
StepFn = Callable[[State, int], tuple[State, Metrics]]
EvalFn = Callable[[State], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often the loop does what.

    Attributes:
      steps: steps in all, those before a resume included.
      save_every: steps between checkpoints; one is always saved at the end.
      eval_every: steps between evaluations, 0 for none before the end.
      keep: newest checkpoints that are kept.
      max_skipped_in_a_row: give up after this many steps in a row were not finite.
      quiet: show no progress.
      profile: steps that are recorded for a profiler in `folder/profile`, after the two first ones.
      thresholds: when a run is warned of: see `metrics.monitoring`.
    """

    steps: int
    save_every: int = 100
    eval_every: int = 0
    keep: int = 2
    max_skipped_in_a_row: int = 10
    quiet: bool = False
    profile: int = 0
    thresholds: Thresholds = Thresholds()


class Interrupted(Exception):
    """The loop was asked to stop, and saved.

    Attributes:
      signal_number: SIGINT or SIGTERM.
      step: the last step done, which the newest checkpoint holds.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.signal_number, self.step = signal_number, step


def run_loop(
    state: State,
    step_fn: StepFn[State],
    config: LoopConfig,
    *,
    stage: str,
    folder: Path,
    resume: bool = False,
    run_config: dict[str, Any] | None = None,
    data_fingerprint: str | None = None,
    eval_fn: EvalFn[State] | None = None,
    meter: Meter | None = None,
) -> State:
    """Runs `step_fn` until `config.steps` steps are done.

    Args:
      state: the state at step 0; donated to `step_fn` if that is jitted so.
      step_fn: (state, step) -> (state, metrics), with steps counted from 0. A metric `tokens` becomes a
        rate; `skipped_in_a_row` above the limit ends the run with an error.
      stage: the name of the metrics' lines and of the progress bar.
      folder: `folder/checkpoints`, `folder/metrics.jsonl` and `folder/tensorboard` are written.
      resume: go on from the newest whole checkpoint, if there is one.
      run_config: kept in each checkpoint's manifest.
      data_fingerprint: kept in each checkpoint, and compared on resuming: a run goes on with its own data.
      eval_fn: state -> numbers, logged as `eval/NAME`.
      meter: what `step_fn` times its parts with; the step as a whole is always timed.

    Raises:
      UserError: the folder holds checkpoints and `resume` is False, or those of a run on other data; too
        many steps were not finite.
      Interrupted: on SIGINT or SIGTERM, after the step under way was finished and saved.
    """
    with CheckpointManager(folder / "checkpoints", keep=config.keep, config=run_config) as checkpoints:
        start, state = _restore(state, checkpoints, folder, resume, data_fingerprint)
        first, meter = is_first_host(), meter or Meter()
        # The two first steps compile; a run of fewer is recorded as it is.
        warm = min(start + 2, max(config.steps - config.profile, start))
        trace = Trace(folder / "profile", first=warm, count=config.profile if first else 0)
        with (
            MetricsWriter(folder, stage=stage, resume_step=start) if first else nullcontext() as writer,
            Progress(stage, config.steps, completed=start, quiet=config.quiet or not first) as progress,
            _signals() as received,
            closing(trace),
        ):
            monitor = _recall(Monitor(config.thresholds), folder, stage, start)
            for step in range(start, config.steps):
                began = time.perf_counter()
                with trace.step(step):
                    state, metrics = step_fn(state, step)
                    metrics = jax.device_get(dict(metrics))
                done, seconds = step + 1, time.perf_counter() - began
                _stop_if_diverged(metrics, config, done, folder)
                alarms, under_way = monitor.see(metrics)
                metrics |= under_way
                for alarm in alarms:
                    progress.log(f"warning: step {done}: {alarm}")
                if _is_due(done, config.eval_every, config.steps) and eval_fn is not None:
                    with meter.timing("eval"):
                        metrics |= {f"eval/{name}": value for name, value in eval_fn(state).items()}
                times = meter.read(seconds, float(metrics["tokens"]) if "tokens" in metrics else None)
                if writer is not None:
                    writer.write(done, metrics | times)
                progress.update(done, metrics, note=describe(times))
                stopping = any_host(bool(received))
                if stopping or _is_due(done, config.save_every, config.steps):
                    # Its seconds stand in the next step's line: a step is logged before it is saved.
                    with meter.timing("save"):
                        checkpoints.save(
                            done,
                            without_frozen(state),
                            extra={"data": data_fingerprint},
                            wait=stopping or done == config.steps,
                        )
                # A signal that came during the last save has no later step to be seen at.
                if stopping or (received and done == config.steps):
                    # Where another process was asked to stop, this one ends as after SIGTERM.
                    raise Interrupted(received[0] if received else signal.SIGTERM, done)
    return state


def _restore(
    state: State, checkpoints: CheckpointManager, folder: Path, resume: bool, data_fingerprint: str | None
) -> tuple[int, State]:
    if checkpoints.latest_step() is None:
        return 0, state
    if not resume:
        raise UserError(
            f"{folder} already holds a run at step {checkpoints.latest_step()}: "
            "add --resume to go on with it, or choose another --out"
        )
    start, restored, extra = checkpoints.restore(without_frozen(state))
    held = (extra or {}).get("data")
    if held and data_fingerprint and held != data_fingerprint:
        raise UserError(
            f"{folder}: the data is not that of its checkpoint at step {start} (fingerprint "
            f"{data_fingerprint[:12]}, not {held[:12]}): give --resume the same data, or choose another --out"
        )
    return start, with_frozen(restored, state)


def _recall(monitor: Monitor, folder: Path, stage: str, start: int) -> Monitor:
    """The monitor as it was after step `start`."""
    for line in read_metrics(folder) if start else []:
        if line.get("stage") == stage and line.get("step", 0) <= start:
            monitor.see(line)
    return monitor


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _stop_if_diverged(metrics: Mapping[str, Any], config: LoopConfig, done: int, folder: Path) -> None:
    in_a_row = int(metrics.get("skipped_in_a_row", 0))
    if in_a_row >= config.max_skipped_in_a_row:
        raise UserError(
            f"step {done}: loss or gradients were not finite {in_a_row} times in a row, so training stopped "
            f"(the checkpoints in {folder / 'checkpoints'} are untouched): lower the learning rate or look "
            "for bad rows in the data"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one of them takes its usual course."""
    received: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM)
    try:
        previous: dict[int, Any] = {int(number): signal.getsignal(number) for number in watched}

        def note(number: int, _: Any) -> None:
            received.append(number)
            signal.signal(number, previous[number])

        for number in watched:
            signal.signal(number, note)
    except ValueError:  # not the main thread: signals are someone else's business
        yield received
        return
    try:
        yield received
    finally:
        for number in watched:
            signal.signal(number, previous[number])
