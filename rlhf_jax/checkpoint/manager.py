"""Checkpoints of whole training states: atomic, asynchronous, verified when they are restored.

run/checkpoints/
  step_00000100/manifest.json  what the step must hold (see `manifest`); written last, and what makes it count
  step_00000100/arrays/        the leaves, in Orbax's format; `arrays_2` and so on where it was saved again
  step_00000200/unfinished     beside the arrays of a save under way, or of one that was killed

Nothing is renamed, so the folder may be in an object store (`s3://`, `gs://`) or on a mount of one. Arrays
pass through $TMPDIR then, on their way there and back, and what a killed save has written stays behind in it.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.checkpoint import arrays, drafts
from rlhf_jax.checkpoint.drafts import Draft, commit, is_sealed
from rlhf_jax.checkpoint.manifest import (
    DamagedError,
    Manifest,
    Warn,
    bring,
    check_leaves,
    current_versions,
    find_whole,
    list_steps,
    load_manifest,
    print_warning,
    verify,
)
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.core.trees import map_named, named_leaves

T = TypeVar("T")
_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")


class CheckpointManager:
    """Saves and restores states (any pytree of arrays, scalars and typed keys) in one folder.

    One manager writes to a folder at a time; any number may read. A state is copied off the devices
    before `save` returns, so its buffers may be donated at once; files are written in a thread. A step
    counts only when it is whole. With several processes, all must call `save`, `wait` and `restore` together,
    on one shared folder or object store; the first process keeps the manifest.

    Args:
      folder: where the steps live, a local path or an address such as `s3://bucket/run/checkpoints`; made at
        the first save.
      max_to_keep: how many of the newest steps remain when a new one is whole.
      config: the run's configuration, as JSON types, for the manifest.
      warn: receives one sentence about each damaged step that is passed over.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_to_keep: int = 3,
        config: dict[str, Any] | None = None,
        warn: Warn = print_warning,
    ):
        if max_to_keep < 1:
            raise UserError(f"max_to_keep={max_to_keep} would leave no checkpoint: keep at least 1")
        self._folder = files.as_path(folder)
        self._max_to_keep = max_to_keep
        self._config = config
        self._warn = warn
        self._pending: concurrent.futures.Future[None] | None = None
        self._known_damaged: set[int] = set()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except (UserError, RuntimeError) as error:
            if kind is None:
                raise
            self._warn(str(error))  # what broke the block is the news, and must not be hidden by this

    def steps(self) -> list[int]:
        """Steps whose manifest is whole, ascending; their arrays are hashed only when restored."""
        return [step for step, path in list_steps(self._folder).items() if is_sealed(path)]

    def latest_step(self) -> int | None:
        """The newest of `steps()`; None where there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, *, extra: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Starts to save `state` as `step`, after the save before it has ended.

        A step that is already there is replaced.

        Args:
          extra: what else a resume needs, as JSON types (tuples come back as lists).
          wait: return only when the step is whole.

        Raises:
          UserError: the save before this one failed (this one has then not been started: call again), or
            this one cannot be started, or the folder holds a whole step newer than `step`.
          RuntimeError: the same, where neither disk nor permissions were the cause.
          TypeError: `state` holds a leaf, or `extra` a value, that cannot be stored.
        """
        self.wait()
        manifest = Manifest(step, arrays.describe(state), {}, current_versions(), self._config, extra)
        json.dumps([self._config, extra])  # raises here rather than in the thread
        self._refuse_older_than_whole(step)
        with self._attributed(step):
            draft = drafts.begin(self._folder, step)
        with self._attributed(step, draft):
            shared = draft.is_local or jax.process_count() == 1
            for name in ("absl", "asyncio"):
                logging.getLogger(name).addFilter(_is_not_raised_here)
            checkpointer = arrays.start_writing(draft.place, arrays.to_storage(state), shared=shared)
        self._pending = _in_thread(self._finish, manifest, draft, checkpointer)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is whole.

        Raises:
          UserError, RuntimeError: it failed; the message names its step.
        """
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])  # an interrupt here leaves the save pending
        pending, self._pending = self._pending, None
        pending.result()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("rlhf_jax.checkpoint.wait")

    def close(self) -> None:
        """Waits for the save under way. A process that exits without it may lose that save, but no other."""
        self.wait()

    def restore(self, like: T, step: int | None = None) -> tuple[int, T, dict[str, Any] | None]:
        """Reads `step`, or the newest whole step, after hashing its files. Writes nothing.

        Args:
          like: a state of the same structure: arrays or `jax.ShapeDtypeStruct`s. Each leaf comes back as the
            kind of its example (JAX, NumPy, Python), on its sharding where that is committed.

        Returns:
          (step, state, extra)

        Raises:
          UserError: no step is whole, or the step has other leaves, shapes or dtypes than `like`.
        """
        self.wait()
        with _found(self._folder, step, self._warn) as (path, manifest):
            check_leaves(
                manifest.leaves, arrays.describe(like), where=f"step {manifest.step} in `{self._folder}`"
            )
            return manifest.step, _read(path / manifest.arrays, like), manifest.extra

    def _refuse_older_than_whole(self, step: int) -> None:
        """A step saved below a newer whole one would never be resumed from, and that silently."""
        for later, path in reversed(list_steps(self._folder).items()):
            if later <= step or later in self._known_damaged:
                continue
            try:
                with tempfile.TemporaryDirectory(prefix="rlhf_jax_verify_") as scratch:
                    verify(bring(path, pathlib.Path(scratch)))
            except DamagedError:
                self._known_damaged.add(later)
                continue
            raise UserError(
                f"step {step} cannot be saved in `{self._folder}`, which holds the newer step {later}: "
                "resume from that, remove it, or name another folder"
            )

    def _finish(self, manifest: Manifest, draft: Draft, checkpointer: Any) -> None:
        with self._attributed(manifest.step, draft):
            if checkpointer is not None:
                checkpointer.close()
            commit(draft, manifest)
        if jax.process_index() == 0:
            self._known_damaged.discard(manifest.step)
            self._prune(manifest.step)

    def _prune(self, saved: int) -> None:
        """Removes all but the newest `max_to_keep` steps up to the one saved; newer ones it leaves alone."""
        steps = {step: path for step, path in list_steps(self._folder).items() if step <= saved}
        kept = [step for step, path in steps.items() if is_sealed(path)][-self._max_to_keep :]
        for step in steps.keys() - set(kept):
            try:
                drafts.remove(steps[step])
            except OSError as error:
                self._warn(f"old step {step} in `{self._folder}` could not be removed ({error.strerror})")

    @contextlib.contextmanager
    def _attributed(self, step: int, draft: Draft | None = None) -> Iterator[None]:
        """Turns a failure into a `UserError` that names the step, and removes what had been written of it."""
        try:
            with _quiet_orbax():
                yield
        except Exception as error:
            if draft is not None:
                drafts.discard(draft)
            what = f"step {step} could not be saved in `{self._folder}` (those already saved are untouched)"
            reason = _system_error(error)
            if reason is None:
                raise RuntimeError(f"{what}: {error}") from error
            raise UserError(f"{what}: {reason}; make room there or name another folder") from error


def restore_params(
    folder: str | os.PathLike[str],
    like: T,
    *,
    name: str = "params",
    step: int | None = None,
    warn: Warn = print_warning,
) -> tuple[int, T]:
    """Reads one subtree of a checkpoint, to start a stage from the parameters of another.

    Args:
      like: the subtree's structure, as in `CheckpointManager.restore`.
      name: where it stands in the saved state, such as `params` or `policy/params`.

    Returns:
      (step, subtree)

    Raises:
      UserError: no step is whole, it has no such subtree, or the subtree is of another architecture.
    """
    with _found(files.as_path(folder), step, warn) as (path, manifest):
        prefix = f"{name}/"
        saved = {
            leaf[len(prefix) :]: spec for leaf, spec in manifest.leaves.items() if leaf.startswith(prefix)
        }
        if not saved:
            present = ", ".join(dict.fromkeys(leaf.split("/")[0] for leaf in manifest.leaves))
            raise UserError(f"step {manifest.step} in `{folder}` holds no `{name}`: it holds {present}")
        where = f"`{name}` of step {manifest.step} in `{folder}`"
        check_leaves(saved, arrays.describe(like), where=where, hint="this run's model")
        return manifest.step, _read(path / manifest.arrays, like, prefix=prefix)


@contextlib.contextmanager
def _found(folder: Path, step: int | None, warn: Warn) -> Iterator[tuple[pathlib.Path, Manifest]]:
    """The step to restore on a local disk, and its manifest, for as long as it is read."""
    if isinstance(folder, pathlib.Path):
        yield _find(folder, step, warn, folder)
        return
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_restore_") as scratch:
        yield _find(folder, step, warn, pathlib.Path(scratch))


def _find(folder: Path, step: int | None, warn: Warn, scratch: pathlib.Path) -> tuple[pathlib.Path, Manifest]:
    """`find_whole`, where several processes take the word of the first: they must not choose differently."""
    if jax.process_count() == 1:
        return find_whole(folder, step, warn, scratch)
    found, failure = None, None
    if jax.process_index() == 0:
        try:
            found = find_whole(folder, step, warn, scratch)
        except UserError as error:
            failure = error
    chosen = int(multihost_utils.broadcast_one_to_all(np.int32(found[1].step if found else -1)))
    if found:
        return found
    if chosen < 0:
        raise failure or UserError(
            f"the first process found no step to restore in `{folder}`: see its message"
        )
    path = bring(list_steps(folder)[chosen], scratch)
    return path, load_manifest(path)


def _read(folder: pathlib.Path, like: T, *, prefix: str = "") -> T:
    values = arrays.read_arrays(folder.absolute(), named_leaves(like), prefix=prefix)
    return map_named(lambda name, _: values[name], like)


def _system_error(error: Exception) -> str | None:
    """The operating system's word for what failed; None where it was something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = _OS_ERROR_CODE.search(str(error))
    return os.strerror(int(code[1])) if code else None


def _in_thread(function: Callable[..., None], *args: Any) -> concurrent.futures.Future[None]:
    executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = executor.submit(function, *args)
    executor.shutdown(wait=False)
    return future


def _is_not_raised_here(record: logging.LogRecord) -> bool:
    """False of what threads and futures of Orbax's log of an error that the end of the save raises."""
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.extract_tb(error.__traceback__) if error is not None else ()
    return not any(f"{os.sep}orbax{os.sep}" in frame.filename for frame in frames)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax from logging tracebacks of errors that are raised here anyway."""

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbax)
