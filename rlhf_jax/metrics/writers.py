"""Metrics of a run on disk: one JSON object a line, and TensorBoard events."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.core.errors import UserError

METRICS_FILE = "metrics.jsonl"
_OWN_FIELDS = ("stage", "step", "time")


class MetricsWriter:
    """Appends the metrics of one stage to `folder/metrics.jsonl` and `folder/tensorboard/<stage>`.

    Every line is strict JSON (NaN and infinity become null) and is on disk when `write` returns, so that
    a run killed at any moment loses at most the line it was writing. Floats keep all their digits: equal
    text means equal bits.

    On resume, lines that the killed run wrote after the checkpoint are dropped first, so that apart from
    `time` the file ends up equal to that of a run never killed. One writer at a time may be open on a folder.

    Args:
      folder: the run folder, made if missing.
      stage: name of the stage, such as "sft"; written on every line.
      resume_step: the step the stage goes on from; its lines with a greater step are dropped (-1 drops all
        of them). None keeps every whole line.
    Raises:
      UserError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], *, stage: str, resume_step: int | None = None) -> None:
        self.folder = Path(folder)
        self.stage = stage
        self._path = self.folder / METRICS_FILE
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _drop_lines(self._path, stage, resume_step)
            # Unbuffered: nothing is left in the process for a kill to lose or for `close` to fail on.
            self._lines = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
            try:
                self._events = _EventLog(self.folder / "tensorboard" / stage, resume_step)
            except BaseException:
                self._lines.close()
                raise

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one step.

        Args:
          step: the step they belong to; several lines may share one.
          metrics: numbers and 0-d arrays by name; arrays are fetched from the device here.
        Raises:
          UserError: the disk is full or cannot be written to.
          ValueError: a metric is not one number, or is called `stage`, `step` or `time`.
        """
        # One fetch for all: a transfer per metric would wait for the device as many times.
        values = jax.device_get(list(metrics.values()))
        numbers = {name: _to_number(name, value) for name, value in zip(metrics, values, strict=True)}
        now = time.time()
        record = {"stage": self.stage, "step": int(step), "time": now}
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with _disk_errors(self._path):
            _write_all(self._lines, json.dumps(record, allow_nan=False).encode() + b"\n")
            self._events.write(int(step), now, numbers)

    def close(self) -> None:
        """Closes both files; a second call does nothing."""
        with _disk_errors(self.folder):
            self._lines.close()
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl` in order; none if there is no file.

    A last line cut off by a kill is left out.

    Raises:
      UserError: another line is not a JSON object.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    # Split on the newline byte only: str.splitlines also splits at U+2028.
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: not a JSON object; remove the line or give another run folder")
    return record


def _to_number(name: str, value: Any) -> bool | int | float:
    if name in _OWN_FIELDS:
        raise ValueError(f"metric {name!r}: the name is taken by the writer itself")
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"metric {name!r} has shape {array.shape}; reduce it to one number")
    kind: type[bool] | type[int] | type[float] = {"b": bool, "i": int, "u": int}.get(array.dtype.kind, float)
    return kind(array[()])


def _drop_lines(path: Path, stage: str, resume_step: int | None) -> None:
    """Drops a torn last line, and lines of `stage` after `resume_step`, in one atomic replacement."""
    if not path.exists():
        return
    before = path.read_bytes()
    *lines, _torn = before.split(b"\n")
    kept: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line, path, number)
        late = (
            resume_step is not None and record.get("stage") == stage and record.get("step", 0) > resume_step
        )
        if not late:
            kept.append(line + b"\n")
    after = b"".join(kept)
    if after == before:
        return
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_all(file: Any, data: bytes) -> None:
    """Unbuffered files may take only a part of what they are given, as on a disk that is just filling up."""
    while data:
        data = data[file.write(data) :]


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write metrics ({error.strerror or error}); free or unlock the disk, or give "
            "another run folder, and start the same command again"
        ) from error


class _EventLog:
    """TensorBoard events written in this thread.

    tensorboardX's own SummaryWriter hands events to a thread through a bounded queue; when the disk is
    full that thread dies and the training loop waits for it for ever.
    """

    _seconds_between_flushes = 10.0

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two writers of the same second from truncating each other's file.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}.{os.getpid()}")
        if resume_step is not None:
            # A start event tells TensorBoard to hide what earlier files hold from this step on.
            self._writer.write_event(_event(time.time(), resume_step + 1, session_log={"status": "START"}))
        self._writer.flush()
        self._flushed_at = time.monotonic()
        self._closed = False

    def write(self, step: int, wall_time: float, numbers: Mapping[str, float]) -> None:
        values = [
            {"tag": name, "simple_value": float(number)}
            for name, number in numbers.items()
            if math.isfinite(number)
        ]
        self._writer.write_event(_event(wall_time, step, summary={"value": values}))
        # A flush of this writer also syncs the disk: too slow for every step.
        if time.monotonic() - self._flushed_at > self._seconds_between_flushes:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._writer.close()


def _event(wall_time: float, step: int, **what: Any) -> Any:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    return Event(wall_time=wall_time, step=step, **what)
