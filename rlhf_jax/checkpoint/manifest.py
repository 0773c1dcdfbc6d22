"""What a checkpoint is meant to hold, so that a damaged one cannot pass for a whole one.

Array files carry no checksum of their own: a flipped bit loads without a word. So beside the arrays
of each step stands `manifest.json`: the SHA-256 of every file, name, shape and dtype of every leaf,
the versions and the configuration of the run, and a digest of the manifest itself.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.core.errors import UserError

MANIFEST_NAME = "manifest.json"
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
    """

    step: int
    leaves: dict[str, Leaf]
    files: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any] | None
    extra: dict[str, Any] | None


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

    While a step is saved again, its older copy stands aside as `step_N.replaced`; that copy counts only
    where a kill left nothing else of the step.

    Raises:
      UserError: the folder is there but cannot be read.
    """
    found: dict[int, Path] = {}
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"`{folder}` cannot be read ({error.strerror}): mend its permissions") from None
    for path in entries:  # in sorted order `step_N` comes before `step_N.replaced`
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items()))


def seal(step_folder: Path, manifest: Manifest) -> None:
    """Hashes every file below `step_folder`, flushes them to the disk and writes the manifest.

    Args:
      manifest: its `files` are replaced by the hashes.
    """
    paths = sorted(step_folder.rglob("*"))
    files = {path.relative_to(step_folder).as_posix(): path for path in paths if path.is_file()}
    with concurrent.futures.ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter's lock
        hashes = dict(
            zip(files, threads.map(lambda path: _sha256(path, flush=True), files.values()), strict=True)
        )
    for path in paths:
        if path.is_dir():
            _flush(path)
    body = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(manifest, files=hashes))))
    path = step_folder / MANIFEST_NAME
    with path.open("w", encoding="ascii") as file:
        json.dump({"digest": _digest(body), **body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush(step_folder)


def load_manifest(step_folder: Path) -> Manifest:
    """Reads the manifest of one step and checks its own digest.

    Raises:
      DamagedError: it is missing, unreadable, changed, or belongs to another step.
    """
    try:
        body = json.loads((step_folder / MANIFEST_NAME).read_text(encoding="ascii"))
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


def verify(step_folder: Path) -> Manifest:
    """The manifest of a step of which every file has been hashed anew.

    Raises:
      DamagedError: names the first file that is missing or differs.
    """
    manifest = load_manifest(step_folder)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        problems = threads.map(lambda item: _problem(step_folder, *item), manifest.files.items())
        problem = next(filter(None, problems), None)
    if problem:
        raise DamagedError(problem)
    return manifest


def _problem(step_folder: Path, name: str, expected: str) -> str | None:
    try:
        return None if _sha256(step_folder / name) == expected else f"{name} has changed since it was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def find_whole(folder: Path, step: int | None, warn: Warn) -> tuple[Path, Manifest]:
    """The step to restore: `step`, or the newest whole one, each damaged one before it named by `warn`.

    Raises:
      UserError: `step` is not there or damaged, or no step is whole.
    """
    steps = list_steps(folder)
    if step is not None:
        if step not in steps:
            raise UserError(f"`{folder}` holds no step {step}: choose one of {_enumerate(steps)}")
        try:
            return steps[step], verify(steps[step])
        except DamagedError as error:
            raise UserError(
                f"step {step} in `{folder}` is damaged ({error}): name another, or none for the newest whole"
            ) from None
    for number in reversed(steps):
        try:
            return steps[number], verify(steps[number])
        except DamagedError as error:
            warn(f"step {number} in `{folder}` is damaged ({error}) and is skipped")
    if steps:
        raise UserError(
            f"every step in `{folder}` ({_enumerate(steps)}) is damaged: start again or copy it anew"
        )
    raise UserError(f"`{folder}` holds no checkpoint: name the folder that a run saved to")


def read_manifest(folder: str | os.PathLike[str], step: int | None = None) -> Manifest:
    """The manifest of `step`, or of the newest step whose manifest is whole. Array files are not hashed.

    Raises:
      UserError: there is none.
    """
    steps = list_steps(Path(folder))
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


def _sha256(path: Path, *, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
