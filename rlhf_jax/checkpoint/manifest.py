"""Manifest of a checkpoint: what it is meant to hold, so that no torn or damaged one passes for a whole one.

Array files carry no checksum of their own: a flipped bit loads without a word. So beside the arrays
of each step stands `manifest.json`: the SHA-256 of every file, name, shape and dtype of every leaf,
the versions and the configuration of the run, and a digest of the manifest itself. It is written last, whole
and at once, and makes a checkpoint of the folder: nothing is renamed but that file, if at all.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path

MANIFEST_NAME = "manifest.json"
UNFINISHED_NAME = "unfinished"
"""A file that stands in a step's folder from the first moment of a save until its manifest does."""

_STEP_NAME = re.compile(r"step_(\d+)(\.replaced)?")
_PACKAGES = ("rlhf_jax", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")

Warn = Callable[[str], None]


class DamagedError(Exception):
    """A step folder that is not what was saved; the message says which file and how."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and dtype of one leaf; typed keys have dtypes such as `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record kept beside a step.

    Attributes:
      step: the step the state was saved at.
      leaves: name (`params/layers/kernel`) -> shape and dtype, in tree order.
      files: path relative to the step folder -> SHA-256 in hex.
      versions: package -> version at the time of saving, Python and platform among them.
      config: the run's configuration as JSON, or None.
      extra: what the caller gave at that step as JSON (data fingerprint, iterator state), or None.
      arrays: the folder within the step's that holds the leaves.
    """

    step: int
    leaves: dict[str, Leaf]
    files: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any] | None
    extra: dict[str, Any] | None
    arrays: str = "arrays"


def print_warning(message: str) -> None:
    """Writes one line to standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def current_versions() -> dict[str, str]:
    """Versions of Python, of the platform and of the packages that decide what a checkpoint means."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def list_steps(folder: Path) -> dict[int, Path]:
    """Step folders by step, ascending, whole or not.

    Earlier versions set the older copy of a step aside as `step_N.replaced` while it was saved again; that
    copy counts where nothing whole of the step stands beside it.

    Raises:
      UserError: the folder is there but cannot be read.
    """
    found: dict[int, Path] = {}
    try:
        for path in files.list_folder(folder):  # in order of names `step_N` comes before `step_N.replaced`
            match = _STEP_NAME.fullmatch(path.name)
            if match and (files.is_remote(path) or path.is_dir()):
                if (
                    match[2]
                    and int(match[1]) in found
                    and files.is_file(found[int(match[1])] / MANIFEST_NAME)
                ):
                    continue
                found[int(match[1])] = path
    except OSError as error:
        raise UserError(f"`{folder}` cannot be read ({error.strerror}): mend its permissions") from None
    return dict(sorted(found.items()))


def hash_files(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a local folder, by relative path; the files are flushed to the disk."""
    names = files.list_files(folder)
    with concurrent.futures.ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter's lock
        hashes = list(threads.map(lambda name: _sha256(folder / name, flush=True), names))
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            files.sync_folder(path)
    return dict(zip(names, hashes, strict=True))


def seal(step_folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes a checkpoint of what has been written."""
    body = json.loads(json.dumps(dataclasses.asdict(manifest)))
    text = json.dumps({"digest": _digest(body), **body}, indent=1)
    files.write_whole(step_folder / MANIFEST_NAME, text)


def load_manifest(step_folder: Path) -> Manifest:
    """Reads the manifest of one step and checks its own digest.

    Raises:
      DamagedError: it is missing, unreadable, changed, or belongs to another step.
    """
    try:
        body = json.loads(files.read_bytes(step_folder / MANIFEST_NAME).decode("ascii"))
        digest = body.pop("digest")
        if digest != _digest(body):
            raise DamagedError(f"{MANIFEST_NAME} has changed since it was saved")
        leaves = {name: Leaf(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in body["leaves"].items()}
        manifest = Manifest(**{**body, "leaves": leaves})
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST_NAME} is missing") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST_NAME} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedError(f"{MANIFEST_NAME} is not a manifest") from None
    match = _STEP_NAME.fullmatch(step_folder.name)
    if match and int(match[1]) != manifest.step:
        raise DamagedError(f"{MANIFEST_NAME} belongs to step {manifest.step}")
    return manifest


def verify(step_folder: pathlib.Path) -> Manifest:
    """The manifest of a step of which every file has been hashed anew.

    Raises:
      DamagedError: names the first file that is missing, differs, or does not belong to the step.
    """
    manifest = load_manifest(step_folder)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        problems = threads.map(lambda item: _problem(step_folder, *item), manifest.files.items())
        problem = next(filter(None, problems), None)
    if problem:
        raise DamagedError(problem)
    arrays = step_folder / manifest.arrays
    for name in files.list_files(arrays) if arrays.is_dir() else []:
        if f"{manifest.arrays}/{name}" not in manifest.files and not name.rpartition("/")[2].startswith("."):
            raise DamagedError(f"{manifest.arrays}/{name} is not of this step")
    return manifest


def _problem(step_folder: pathlib.Path, name: str, expected: str) -> str | None:
    try:
        return None if _sha256(step_folder / name) == expected else f"{name} has changed since it was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def bring(step_folder: Path, scratch: pathlib.Path) -> pathlib.Path:
    """The step's folder itself, or a copy in `scratch` where it is in an object store.

    Raises:
      DamagedError: the manifest, or a file that it names, cannot be had.
    """
    if isinstance(step_folder, pathlib.Path):
        return step_folder
    manifest, local = load_manifest(step_folder), scratch / step_folder.name
    try:
        missing = sorted(manifest.files.keys() - set(files.list_files(step_folder)))
        if missing:
            raise DamagedError(f"{missing[0]} is missing")
        files.download(step_folder, local, [*manifest.files, MANIFEST_NAME])
    except OSError as error:
        raise DamagedError(f"its files cannot be read ({error.strerror})") from None
    return local


def find_whole(
    folder: Path, step: int | None, warn: Warn, scratch: pathlib.Path
) -> tuple[pathlib.Path, Manifest]:
    """The step to restore: `step`, or the newest whole one, each damaged one before it named by `warn`.

    A step whose save was killed is passed over silently: it never was a checkpoint.

    Args:
      scratch: a local folder for copies from an object store.

    Returns:
      (its folder on a local disk, its manifest)

    Raises:
      UserError: `step` is not there or damaged, or no step is whole.
    """
    steps = {number: path for number, path in list_steps(folder).items() if not is_unfinished(path)}
    if step is not None:
        if step not in steps:
            raise UserError(f"`{folder}` holds no step {step}: choose one of {_enumerate(steps)}")
        try:
            return _verified(steps[step], scratch)
        except DamagedError as error:
            raise UserError(
                f"step {step} in `{folder}` is damaged ({error}): name another, or none for the newest whole"
            ) from None
    for number in reversed(steps):
        try:
            return _verified(steps[number], scratch)
        except DamagedError as error:
            warn(f"step {number} in `{folder}` is damaged ({error}) and is skipped")
    if steps:
        raise UserError(
            f"every step in `{folder}` ({_enumerate(steps)}) is damaged: start again or copy it anew"
        )
    raise UserError(f"`{folder}` holds no checkpoint: name the folder that a run saved to")


def is_unfinished(step_folder: Path) -> bool:
    """True if the folder is what a save left that is under way or was killed, even while it was marked."""
    names = {path.name for path in files.list_folder(step_folder)}
    is_marked = any(name.startswith(UNFINISHED_NAME) for name in names)
    return not names or (is_marked and MANIFEST_NAME not in names)


def _verified(step_folder: Path, scratch: pathlib.Path) -> tuple[pathlib.Path, Manifest]:
    local = bring(step_folder, scratch)
    return local, verify(local)


def read_manifest(folder: str | os.PathLike[str], step: int | None = None) -> Manifest:
    """The manifest of `step`, or of the newest step whose manifest is whole. Array files are not hashed.

    Raises:
      UserError: there is none.
    """
    steps = list_steps(files.as_path(folder))
    for number in [step] if step is not None else reversed(steps):
        try:
            return load_manifest(steps[number])
        except (DamagedError, KeyError):
            continue
    which = "" if step is None else f" of step {step}"
    raise UserError(f"`{folder}` holds no readable manifest{which}: it has steps {_enumerate(steps)}")


def check_leaves(
    saved: dict[str, Leaf],
    wanted: dict[str, Leaf],
    *,
    where: str,
    hint: str = "this run's model and optimizer",
) -> None:
    """Compares the leaves of a checkpoint with those of a run.

    Args:
      where: the checkpoint, and `hint`: what it must fit, for the message.

    Raises:
      UserError: names the first leaf that differs, with both shapes and dtypes.
    """
    problems = [
        f"leaf `{name}` is {saved[name]} in the checkpoint but {leaf} in this run"
        for name, leaf in wanted.items()
        if name in saved and saved[name] != leaf
    ]
    problems += [
        f"leaf `{name}` ({leaf}) is not in the checkpoint"
        for name, leaf in wanted.items()
        if name not in saved
    ]
    problems += [
        f"leaf `{name}` ({leaf}) is only in the checkpoint"
        for name, leaf in saved.items()
        if name not in wanted
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{where} does not fit {hint}: {problems[0]}{more}; use the configuration in its "
            f"{MANIFEST_NAME}, or another checkpoint folder"
        )


def _enumerate(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps)) or "(none)"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: pathlib.Path, *, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
