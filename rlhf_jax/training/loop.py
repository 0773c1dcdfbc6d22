"""Training loop: state in, state out; it logs, warns, evaluates, saves, resumes and stops cleanly.

A step is atomic: whatever it samples or buffers lives and dies within it, and its inputs are functions of
the step's number and of the state. The state saved between two steps is therefore all that a resume needs,
and a run that was killed continues bit for bit as one that was not. What a learner keeps frozen is not saved:
the script that goes on with a run brings it again.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.core.train_state import with_frozen, without_frozen
from rlhf_jax.core.trees import not_finite
from rlhf_jax.core.types import Metrics
from rlhf_jax.distributed import any_process, is_main_process
from rlhf_jax.metrics.completions import COMPLETIONS, CompletionsTable, Row, write_completions
from rlhf_jax.metrics.health import HealthMonitor, Thresholds
from rlhf_jax.metrics.loggers import Logger, TableLogger, as_logger
from rlhf_jax.metrics.progress import Progress
from rlhf_jax.metrics.writers import JSONLLogger, read_metrics, to_numbers
from rlhf_jax.training.timers import Meter, Trace, describe

State = TypeVar("State")
StepFn = Callable[[State, int], tuple[State, Metrics]]
EvalFn = Callable[[State, int], Mapping[str, Any]]
"""(state, steps done) -> numbers."""
CompletionsFn = Callable[[], Sequence[Row]]
OnStepFn = Callable[[State, Mapping[str, Any], int], Any]
"""(state, metrics, steps done); what it returns is not looked at. A jitted step donates the state's buffers:
copy what is to be kept."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Loop settings: steps, intervals of saving and evaluation, limits.

    Attributes:
      steps: steps in all, those before a resume included.
      save_every: steps between checkpoints; one is always saved at the end.
      eval_every: steps between evaluations, 0 for none between the first and the last.
      eval_at_start: evaluate before the first step, too, so that curves begin where the run did.
      max_to_keep: newest checkpoints that are kept.
      max_consecutive_skipped: give up after this many steps in a row were not finite.
      quiet: show no progress.
      log_completions: steps between tables of completions, 0 for none; the last step has one, too.
      num_completions_to_print: rows of such a table that are printed.
      profile: steps that are recorded for a profiler in `folder/profile`, after the two first ones.
      thresholds: when a run is warned of: see `metrics.monitoring`.
    """

    steps: int
    save_every: int = 100
    eval_every: int = 0
    eval_at_start: bool = True
    max_to_keep: int = 2
    max_consecutive_skipped: int = 10
    quiet: bool = False
    log_completions: int = 0
    num_completions_to_print: int = 3
    profile: int = 0
    thresholds: Thresholds = Thresholds()


EXIT_NOT_FINISHED = 75
"""The run is saved and not at its end: the same command with `--resume` goes on with it. The number is that
of "try again later" (sysexits.h), at which schedulers are told to start the run anew."""


class Interrupted(SystemExit):
    """The loop was asked to stop, and saved; a script that lets it pass ends without a traceback.

    Its status is 130 after SIGINT, and `EXIT_NOT_FINISHED` otherwise.

    Attributes:
      signal_number: SIGINT, SIGTERM, SIGUSR1 or SIGHUP.
      step: the last step done, which the newest checkpoint holds.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(130 if signal_number == signal.SIGINT else EXIT_NOT_FINISHED)
        self.signal_number, self.step = signal_number, step


def run_loop(
    state: State,
    step_fn: StepFn[State],
    config: LoopConfig,
    *,
    stage: str,
    folder: str | os.PathLike[str],
    resume: bool = False,
    run_config: dict[str, Any] | None = None,
    data_fingerprint: str | None = None,
    eval_fn: EvalFn[State] | None = None,
    on_step: OnStepFn[State] | Sequence[OnStepFn[State]] = (),
    loggers: Sequence[Logger | Callable[..., Any]] = (),
    meter: Meter | None = None,
    completions_fn: CompletionsFn | None = None,
) -> State:
    """Runs `step_fn` until `config.steps` steps are done.

    Args:
      state: the state at step 0; donated to `step_fn` if that is jitted so.
      step_fn: (state, step) -> (state, metrics), with steps counted from 0. A metric `tokens` becomes a
        rate; `consecutive_skipped` above the limit ends the run with an error.
      stage: the name of the metrics' lines and of the progress bar.
      folder: local, or an address such as `s3://BUCKET/RUN`; `folder/checkpoints` and
        `folder/metrics.jsonl` are written.
      resume: go on from the newest whole checkpoint, if there is one.
      run_config: kept in each checkpoint's manifest.
      data_fingerprint: kept in each checkpoint, and compared on resuming: a run goes on with its own data.
      eval_fn: (state, steps done) -> numbers, logged as `eval/NAME`.
      on_step: called after each step with (state, metrics, steps done), in every process.
      loggers: take the metrics that go to `metrics.jsonl` (`metrics.as_logger` says what may stand here);
        closed at the end.
      meter: what `step_fn` times its parts with; the step as a whole is always timed.
      completions_fn: what the policy wrote in the step just done, for `folder/completions`, the loggers that
        take tables, and the console; called in the first process alone.

    Raises:
      UserError: the folder holds checkpoints and `resume` is False, or those of a run on other data; another
        process runs in it; too many steps were not finite, or the state that would be saved is not.
      Interrupted: on SIGINT, SIGTERM, SIGUSR1 or SIGHUP, after the step under way was finished and saved.
    """
    folder, meter, first = files.as_path(folder), meter or Meter(), is_main_process()
    calls = [on_step] if callable(on_step) else list(on_step)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.releasing_locks())
        if first:
            files.hold(folder)
        others = [as_logger(logger) for logger in loggers]
        for logger in others:
            stack.callback(logger.close)
        checkpoints = CheckpointManager(
            folder / "checkpoints", max_to_keep=config.max_to_keep, config=run_config
        )
        stack.enter_context(checkpoints)
        start, state = _restore(state, checkpoints, folder, resume, data_fingerprint)
        log, flush = _open_log(stack, folder, stage, start, others)
        progress = Progress(stage, config.steps, completed=start, quiet=config.quiet or not first)
        stack.enter_context(progress)
        received = stack.enter_context(_signals())
        # The two first steps compile; a run of fewer is recorded as it is.
        warm = min(start + 2, max(config.steps - config.profile, start))
        trace = Trace(folder / "profile", first=warm, count=config.profile if first else 0)
        stack.enter_context(contextlib.closing(trace))
        monitor = _recall(HealthMonitor(config.thresholds), folder, stage, start)

        def evaluation(done: int) -> dict[str, Any]:
            if eval_fn is None:
                return {}
            with meter.timing("eval"):
                return {f"eval/{name}": value for name, value in eval_fn(state, done).items()}

        if start == 0 < config.steps and config.eval_at_start and (evaluated := evaluation(0)):
            log(evaluated, 0)
            progress.update(0, evaluated)
        for step in range(start, config.steps):
            began = time.perf_counter()
            with trace.step(step):
                state, metrics = step_fn(state, step)
                metrics = jax.device_get(dict(metrics))
            done, seconds = step + 1, time.perf_counter() - began
            _stop_if_diverged(metrics, config, done, folder)
            warnings, under_way = monitor.see(metrics)
            metrics |= under_way
            for warning in warnings:
                progress.log(f"warning: step {done}: {warning}")
            if _is_due(done, config.eval_every, config.steps):
                metrics |= evaluation(done)
            times = meter.read(seconds, float(metrics["tokens"]) if "tokens" in metrics else None)
            log(metrics | times, done)
            progress.update(done, metrics | times, note=describe(times))
            for call in calls:
                call(state, metrics | times, done)
            every = config.log_completions
            if completions_fn and first and every and _is_due(done, every, config.steps):
                count = config.num_completions_to_print
                log_completions(completions_fn(), done, folder, others, progress.show, count=count)
            stopping = any_process(bool(received))
            if stopping or _is_due(done, config.save_every, config.steps):
                saved, wait = without_frozen(state), stopping or done == config.steps
                _check_finite(saved, done, folder)
                flush()  # a checkpoint whose lines are lost would leave a gap in them
                # Its seconds stand in the next step's line: a step is logged before it is saved.
                with meter.timing("save"):
                    checkpoints.save(done, saved, extra={"data": data_fingerprint}, wait=wait)
            # A signal that came during the last save has no later step to be seen at.
            if stopping or (received and done == config.steps):
                if first:
                    print(f"Stopped after step {done}, which is saved.", file=sys.stderr, flush=True)
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
            "give resume=True to go on with it, or choose another folder"
        )
    start, restored, extra = checkpoints.restore(without_frozen(state))
    held = (extra or {}).get("data")
    if held and data_fingerprint and held != data_fingerprint:
        raise UserError(
            f"{folder}: the data is not that of its checkpoint at step {start} (fingerprint "
            f"{data_fingerprint[:12]}, not {held[:12]}): resume with the same data, or choose another folder"
        )
    return start, with_frozen(restored, state)


def _open_log(
    stack: contextlib.ExitStack, folder: Path, stage: str, start: int, loggers: Sequence[Logger]
) -> tuple[Callable[[Mapping[str, Any], int], None], Callable[[], None]]:
    """(`log(metrics, steps done)`, `flush()`) to `metrics.jsonl` and the loggers, in the first process."""
    if not is_main_process():
        return lambda metrics, done: None, lambda: None
    # A run that begins anew writes its first evaluation again.
    writer = stack.enter_context(JSONLLogger(folder, stage=stage, resume_step=start or -1))

    def log(metrics: Mapping[str, Any], done: int) -> None:
        writer.log(metrics, done)
        numbers = to_numbers(metrics) if loggers else {}
        for logger in loggers:
            logger.log(numbers, done)

    return log, writer.flush


def log_completions(
    rows: Sequence[Row],
    step: int,
    folder: str | os.PathLike[str],
    loggers: Sequence[Logger],
    show: Callable[[CompletionsTable], Any],
    *,
    count: int,
) -> None:
    """Completions table of a step: to the run folder, to the loggers that take tables, and to the console.

    Args:
      show: prints a table.
      count: rows that are shown; 0 for no table.
    """
    write_completions(folder, step, rows)
    for logger in loggers:
        if isinstance(logger, TableLogger):
            logger.log_table(COMPLETIONS, rows, step)
    if count:
        show(CompletionsTable(rows, step, count))


def _recall(monitor: HealthMonitor, folder: Path, stage: str, start: int) -> HealthMonitor:
    """The monitor as it was after step `start`."""
    for line in read_metrics(folder) if start else []:
        if line.get("stage") == stage and line.get("step", 0) <= start:
            monitor.see(line)
    return monitor


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _stop_if_diverged(metrics: Mapping[str, Any], config: LoopConfig, done: int, folder: Path) -> None:
    in_a_row = int(metrics.get("consecutive_skipped", 0))
    if in_a_row >= config.max_consecutive_skipped:
        raise UserError(
            f"step {done}: {_what_is_not_finite(metrics)} not finite {in_a_row} times in a row, so training "
            f"stopped (the checkpoints in {folder / 'checkpoints'} are untouched): lower the learning rate "
            "or look for bad rows in the data"
        )


def _what_is_not_finite(metrics: Mapping[str, Any]) -> str:
    """The first of what a step computes that is not finite: what follows from it is not, either."""
    for name, said in (("loss", "the loss is"), ("gradient_norm", "the gradients are")):
        if name in metrics and not np.all(np.isfinite(np.asarray(metrics[name], np.float64))):
            return said
    return "updates of the optimizer are"


def _check_finite(state: Any, done: int, folder: Path) -> None:
    """Refuses to save a state that no run could go on from, beside those that are whole.

    Raises:
      UserError: a part of it is not finite.
    """
    bad = not_finite(state)
    if bad:
        name = next(iter(bad))
        raise UserError(
            f"step {done}: {len(bad)} parts of the state are not finite ({name}: {bad[name]} of its values), "
            f"so it is not saved (the checkpoints in {folder / 'checkpoints'} are untouched): lower the "
            "learning rate, or look for what computes it"
        )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask for an end; a second one of them takes its usual course.

    SIGTERM is what Kubernetes and preempted machines send, SIGUSR1 what SLURM is told to send ahead of time,
    SIGHUP what a lost connection does.
    """
    received: list[int] = []
    watched = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        watched.append(signal.SIGHUP)
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
