"""Metrics of a run on disk as JSON Lines: the record that the report, the health checks and a resume read."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError, shown
from rlhf_jax.core.files import Path

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_UPLOADS = 30.0
"""How long lines may wait before they are in an object store, to whose files nothing can be appended."""
_OWN_FIELDS = ("stage", "step", "time")
_MOST_STEPS = 2**53  # beyond which pictures and other readers of JSON count no further


class JSONLLogger:
    """JSON Lines logger: appends the metrics of one stage to `folder/metrics.jsonl`.

    Every line is strict JSON (NaN and infinity become null) and is on disk when `log` returns, so that
    a run killed at any moment loses at most the line it was writing. Floats keep all their digits: equal
    text means equal bits.

    On resume, lines that the killed run wrote after the checkpoint are dropped first, so that apart from
    `time` the file ends up equal to that of a run never killed. One writer at a time may be open on a folder.

    In an object store both files are written anew as a whole, every `SECONDS_BETWEEN_UPLOADS` and on `flush`.
    Call that before a checkpoint is saved: what a kill then loses is what a resume does again.

    Args:
      folder: the run folder, made if missing.
      stage: name of the stage, such as "sft"; written on every line.
      resume_step: the step the stage goes on from; its lines with a greater step are dropped (-1 drops all
        of them). None keeps every whole line.

    Raises:
      UserError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], *, stage: str, resume_step: int | None = None) -> None:
        self.folder = files.as_path(folder)
        self.stage = stage
        self._path = self.folder / METRICS_FILE
        with files.disk_errors(self.folder):
            kept = _drop_lines(self._path, stage, resume_step)
            self._lines = _open_lines(self._path, kept)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Writes the metrics of one step.

        Args:
          metrics: numbers and 0-d arrays by name; arrays are fetched from the device here.
          step: the step they belong to; several lines may share one.

        Raises:
          UserError: the disk is full or cannot be written to.
          ValueError: a metric is not one number, or is called `stage`, `step` or `time`.
        """
        numbers = to_numbers(metrics)
        record = {"stage": self.stage, "step": int(step), "time": time.time()}
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with files.disk_errors(self._path):
            _write_all(self._lines, json.dumps(record, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Returns when all lines are where they belong, which on a local disk they are already.

        Raises:
          UserError: the disk is full, or the object store does not answer.
        """
        with files.disk_errors(self._path):
            self._lines.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with files.disk_errors(self.folder):
            self._lines.close()

    def __enter__(self) -> "JSONLLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def to_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python numbers.

    Raises:
      ValueError: a metric is not one number, or is called `stage`, `step` or `time`.
    """
    # One fetch for all: a transfer per metric would wait for the device as many times.
    values = jax.device_get(list(metrics.values()))
    return {name: _to_number(name, value) for name, value in zip(metrics, values, strict=True)}


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl` in order; none if there is no file.

    A last line cut off by a kill is left out.

    Args:
      folder: of the run, or a file of another name.

    Raises:
      UserError: another line is not a JSON object.
    """
    path = files.as_path(folder)
    path = path if files.is_file(path) else path / METRICS_FILE
    try:
        content = files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Split on the newline byte only: str.splitlines also splits at U+2028.
    *lines, _torn = content.split(b"\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: not a JSON object; remove the line or give another run folder")
    step = record.get("step", 0)
    if not isinstance(step, int) or not 0 <= step < _MOST_STEPS:
        raise UserError(f"{path}:{number}: the step is {shown(step)}, not a number of steps; mend the line")
    return record


def _to_number(name: str, value: Any) -> bool | int | float:
    if name in _OWN_FIELDS:
        raise ValueError(f"metric {name!r}: the name is taken by the writer itself")
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"metric {name!r} has shape {array.shape}; reduce it to one number")
    kind: type[bool] | type[int] | type[float] = {"b": bool, "i": int, "u": int}.get(array.dtype.kind, float)
    return kind(array[()])


def _drop_lines(path: Path, stage: str, resume_step: int | None) -> bytes:
    """Drops a torn last line, and lines of `stage` after `resume_step`, in one atomic replacement.

    Returns:
      the lines that are left.
    """
    try:
        before = files.read_bytes(path)
    except FileNotFoundError:
        return b""
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
    if after != before:
        files.write_whole(path, after)
    return after


def _open_lines(path: Path, kept: bytes) -> Any:
    """What lines are appended to."""
    if not isinstance(path, pathlib.Path):
        return _UploadedLines(path, kept)
    return files.open_lines(path)


class _UploadedLines:
    """A file of an object store that grows: it is sent anew as a whole, now and then."""

    def __init__(self, path: Path, kept: bytes) -> None:
        self._path, self._content, self._sent = path, bytearray(kept), len(kept)
        self._sent_at = time.monotonic()

    def write(self, data: bytes) -> int:
        self._content += data
        if time.monotonic() - self._sent_at > SECONDS_BETWEEN_UPLOADS:
            self.flush()
        return len(data)

    def flush(self) -> None:
        if self._sent < len(self._content):
            files.write_whole(self._path, bytes(self._content))
            self._sent, self._sent_at = len(self._content), time.monotonic()

    def close(self) -> None:
        self.flush()


def _write_all(file: Any, data: bytes) -> None:
    """Unbuffered files may take only a part of what they are given, as on a disk that is just filling up."""
    while data:
        data = data[file.write(data) :]
