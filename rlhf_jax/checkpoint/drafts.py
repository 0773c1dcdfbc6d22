"""A step while it is being saved: where its files go, and what is left of it when something fails.

Files are written under their last names. On a disk that is the step's folder; for an object store they are
written on the local disk ($TMPDIR) and copied from there, since array files are written in many small steps.
A step that is saved again gets another folder for its arrays, and its manifest then names that one: until
then the older copy is whole.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.checkpoint.manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    DamagedError,
    Manifest,
    hash_files,
    is_unfinished,
    list_steps,
    load_manifest,
    seal,
    step_name,
)
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path

_OLD_LEFTOVER = ".saving_"  # what earlier versions left of a killed save
_NOTE = (
    f"This step is being saved, or its save was killed: it is a checkpoint once {MANIFEST_NAME} is here.\n"
)
PARTS_TIMEOUT = 600.0
"""Seconds that the first process waits for the others' files to be in the object store."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A step that is being saved.

    Attributes:
      folder: of the step.
      arrays: name of the folder within it that the arrays are for.
      place: where this process writes them.
    """

    folder: Path
    arrays: str
    place: pathlib.Path

    @property
    def is_local(self) -> bool:
        """True if the arrays are written where they stay."""
        return isinstance(self.folder, pathlib.Path)


def begin(folder: Path, step: int) -> Draft:
    """Chooses where `step` is written, the same in all processes, and marks it as unfinished.

    Raises:
      OSError: that cannot be written to; nothing new is left there.
      UserError: it was so in the first process.
    """
    step_folder, number, failure = folder / step_name(step), -1, None
    if jax.process_index() == 0:
        try:
            number = _prepare(folder, step_folder)
        except OSError as error:
            failure = error
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if failure is not None:
        raise failure
    if number < 0:
        raise UserError("the first process could not write: see its message")
    arrays = "arrays" if number == 1 else f"arrays_{number}"
    if isinstance(step_folder, pathlib.Path):
        return Draft(step_folder, arrays, step_folder.absolute() / arrays)
    return Draft(step_folder, arrays, pathlib.Path(tempfile.mkdtemp(prefix="rlhf_jax_save_")) / arrays)


def _prepare(folder: Path, step_folder: Path) -> int:
    """Clears away what killed saves have left; the number of the folder for the arrays."""
    if isinstance(folder, pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
    for path in files.list_folder(folder):
        if path.name.startswith(_OLD_LEFTOVER):
            remove(path)
    for path in list_steps(folder).values():
        if is_unfinished(path) or (path == step_folder and not is_sealed(path)):
            remove(path)
    taken = {path.name for path in files.list_folder(step_folder)}
    try:
        files.write_whole(step_folder / UNFINISHED_NAME, _NOTE)
    except OSError:
        _clear(step_folder, "")
        raise
    return next(n for n in range(1, 10**6) if ("arrays" if n == 1 else f"arrays_{n}") not in taken)


def commit(draft: Draft, manifest: Manifest) -> None:
    """Makes a checkpoint of what has been written; only the first process writes the manifest.

    Raises:
      OSError: the disk is full, or the store does not answer.
      RuntimeError: another process has not brought its files in time.
    """
    first = jax.process_index() == 0
    if draft.is_local and not first:
        return
    draft.place.mkdir(exist_ok=True)  # a state without arrays has written nothing
    hashes = {f"{draft.arrays}/{name}": digest for name, digest in hash_files(draft.place).items()}
    if not draft.is_local:
        # All processes write descriptions of the arrays: those of the first come last, and count.
        for index in range(1, jax.process_count() if first else 1):
            hashes = _wait_for(draft, index) | hashes
        files.upload(draft.place.parent, draft.folder, files.list_files(draft.place.parent))
        shutil.rmtree(draft.place.parent)
    if not first:
        files.write_whole(_part(draft, jax.process_index()), json.dumps(hashes))
        return
    if isinstance(draft.folder, pathlib.Path):
        files.sync_folder(draft.folder.parent)
    seal(draft.folder, dataclasses.replace(manifest, files=hashes, arrays=draft.arrays))
    _tidy(draft)


def _tidy(draft: Draft) -> None:
    """Removes what the step no longer needs. It is whole by now: no failure here is one of the save."""
    with contextlib.suppress(OSError):
        for path in files.list_folder(draft.folder):
            if path.name not in (MANIFEST_NAME, draft.arrays):
                remove(path)
        if isinstance(draft.folder, pathlib.Path):
            shutil.rmtree(draft.folder.with_name(draft.folder.name + ".replaced"), ignore_errors=True)


def _part(draft: Draft, index: int) -> Path:
    return draft.folder / f"{draft.arrays}.{index}.json"


def _wait_for(draft: Draft, index: int) -> dict[str, str]:
    """Hashes of the files that another process has brought."""
    until = time.monotonic() + PARTS_TIMEOUT
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(files.read_text(_part(draft, index)))
        time.sleep(0.2)
    raise RuntimeError(f"process {index} has not brought its files within {PARTS_TIMEOUT:.0f} seconds")


def discard(draft: Draft) -> None:
    """Removes what a failed save has left; the step as it was saved before stays."""
    if not draft.is_local:
        shutil.rmtree(draft.place.parent, ignore_errors=True)
    if jax.process_index() == 0:
        _clear(draft.folder, draft.arrays)


def _clear(step_folder: Path, arrays: str) -> None:
    with contextlib.suppress(OSError):
        names = [path.name for path in files.list_folder(step_folder)]
        if MANIFEST_NAME not in names:
            remove(step_folder)
            return
        with contextlib.suppress(DamagedError):
            if load_manifest(step_folder).arrays == arrays:  # it failed after the manifest had arrived
                return
        for name in names:
            if name in (UNFINISHED_NAME, arrays) or (arrays and name.startswith(f"{arrays}.")):
                remove(step_folder / name)


def is_sealed(step_folder: Path) -> bool:
    """True if the manifest of the step is whole."""
    try:
        load_manifest(step_folder)
    except DamagedError:
        return False
    return True


def remove(path: Path) -> None:
    """Removes a file or a folder. A step loses its manifest first, so that no part of it looks whole.

    One that is killed meanwhile leaves the step as a killed save leaves it: marked as unfinished.

    Raises:
      OSError: it cannot be removed.
    """
    marker, manifest = path / UNFINISHED_NAME, path / MANIFEST_NAME
    if manifest.exists():
        with contextlib.suppress(OSError):  # a full disk is no reason to keep it
            files.write_whole(marker, _NOTE)
        files.remove_file(manifest)
    if not isinstance(path, pathlib.Path) or path.is_file():
        files.remove_tree(path)
        return
    # Writing threads of a failed save may still be at work for a moment, so it is tried again.
    for _ in range(20):
        if not path.exists():
            return
        for child in path.iterdir():
            if child != marker:
                shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1 * path.exists())
    if path.exists():
        shutil.rmtree(path)
