"""TensorBoard event files, written in the thread of the run."""

import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.core import files
from rlhf_jax.metrics.completions import column_names
from rlhf_jax.metrics.writers import SECONDS_BETWEEN_UPLOADS


class TensorBoardLogger:
    """TensorBoard logger: one event file in `folder`, opened at the first step that is logged.

    A start event at that step tells TensorBoard to hide what earlier files hold from there on, so that a
    resumed run shows each step once.

    tensorboardX's own SummaryWriter hands events to a thread through a bounded queue; when the disk is
    full that thread dies and the training loop waits for it for ever.
    """

    _seconds_between_flushes = 10.0

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = files.as_path(folder)
        # Events are written here: beside the folder's address where that is in an object store.
        self._local = self._folder if isinstance(self._folder, pathlib.Path) else None
        self._writer: Any = None
        self._flushed_at = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes the metrics of one step; those that are not finite are left out.

        Raises:
          UserError: the disk is full or cannot be written to.
        """
        values = [
            {"tag": name, "simple_value": float(number)}
            for name, number in metrics.items()
            if math.isfinite(number)
        ]
        self._write(step, _event(step, summary={"value": values}))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Writes a table under the tab for texts."""
        from tensorboardX.summary import text

        self._write(step, _event(step, summary=text(name, _markdown(rows))))

    def _write(self, step: int, event: Any) -> None:
        with files.disk_errors(self._folder):
            if self._writer is None:
                self._writer = self._open(step)
            self._writer.write_event(event)
            # A flush of this writer also syncs the disk: too slow for every step.
            remote = files.is_remote(self._folder)
            pause = SECONDS_BETWEEN_UPLOADS if remote else self._seconds_between_flushes
            if time.monotonic() - self._flushed_at > pause:
                self._flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._writer is not None:
            with files.disk_errors(self._folder):
                self._writer.close()
                self._upload()
            self._writer = None
            if files.is_remote(self._folder) and self._local is not None:
                shutil.rmtree(self._local, ignore_errors=True)

    def _open(self, step: int) -> Any:
        from tensorboardX.event_file_writer import EventsWriter

        if self._local is None:
            self._local = pathlib.Path(tempfile.mkdtemp())
        self._local.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two writers of the same second from truncating each other's file.
        self._writer = EventsWriter(str(self._local / "events"), f".{time.time_ns()}.{os.getpid()}")
        self._writer.write_event(_event(step, session_log={"status": "START"}))
        self._flush()
        return self._writer

    def _flush(self) -> None:
        self._writer.flush()
        self._upload()
        self._flushed_at = time.monotonic()

    def _upload(self) -> None:
        if files.is_remote(self._folder) and self._local is not None:
            files.upload(self._local, self._folder, files.list_files(self._local))


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Texts stand as code, so that nothing in them is taken for markup."""
    columns = column_names(rows)
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, int | float):
        return "" if value is None else f"{value:.6g}"
    text = " ".join(str(value).replace("|", "\\|").replace("`", "'").split())
    return f"`{text}`" if text else ""


def _event(step: int, **what: Any) -> Any:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    return Event(wall_time=time.time(), step=step, **what)
