"""Paths and bytes on local disks and in object stores (`gs://`, `s3://`, `az://`).

Local paths are `pathlib.Path`, addresses of object stores `etils.epath.Path`; `as_path` makes either. What a
run writes goes through `write_whole`: a reader, and whoever comes after a kill, finds the old file or the new
one. Object stores have no folders to make or to rename; a file is seen in them when all of it has arrived.

Whatever a store's client raises comes out as an `OSError` with a `strerror`, as from a disk.
"""

import contextlib
import errno
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from etils import epath

from rlhf_jax.core.errors import UserError

Path: TypeAlias = pathlib.Path | epath.Path
PathLike: TypeAlias = str | os.PathLike[str]

STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Scheme of an object store -> the package that speaks to it."""

# `pathlib.Path` makes `s3:/a` of `s3://a`, and `s3:` of `s3://`: addresses are known by that, too.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?:/{1,2}(?P<rest>.*))?", re.DOTALL)


def as_path(path: PathLike) -> Path:
    """A local path, with `~` for a home folder as shells have it, or that of an object store.

    Raises:
      UserError: it is empty; the address is of another kind, names no bucket, or its store's package is not
        installed.
    """
    text = os.fspath(path)
    if not text:  # for pathlib, the folder that one happens to be in
        raise UserError("the path is empty: name a file or a folder")
    match = _ADDRESS.fullmatch(text)
    if match is None:
        # Where there is no such user, it is a name, as for shells.
        if text.startswith("~"):
            return pathlib.Path(os.path.expanduser(text))
        return path if isinstance(path, pathlib.Path) else pathlib.Path(text)
    scheme, rest = match["scheme"].lower(), (match["rest"] or "").strip("/")
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise UserError(
            f"{text}: addresses of this kind are not read or written: give a local path, or {known}"
        )
    if not rest:
        raise UserError(f"{text}: the address names no bucket: write {scheme}://BUCKET/FOLDER")
    if importlib.util.find_spec(STORES[scheme]) is None:
        raise UserError(f"{text}: {scheme}:// needs a package that is not here: pip install {STORES[scheme]}")
    # Where TensorFlow is installed, epath would ask it, whose builds for pip know nothing of s3://.
    os.environ.setdefault("EPATH_USE_TF", "false")
    return epath.Path(f"{scheme}://{rest}")


def is_remote(path: PathLike) -> bool:
    """True if the path is in an object store."""
    return _ADDRESS.fullmatch(os.fspath(path)) is not None


def as_local(path: PathLike, what: str) -> pathlib.Path:
    """A local path, where only such will do.

    Args:
      what: stands there, as the subject of a sentence.

    Raises:
      UserError: it is the address of an object store.
    """
    local = as_path(path)
    if not isinstance(local, pathlib.Path):
        raise UserError(f"{path}: {what} on a local disk alone: give a local path")
    return local


def resolved(path: Path) -> Path:
    """The absolute path, without links; links that lead in a circle stay, where pathlib's own raises."""
    return pathlib.Path(os.path.realpath(path)) if isinstance(path, pathlib.Path) else path.resolve()


def relative(folder: Path, other: Path) -> str:
    """Path from one folder to another: relative, so that both may be moved together."""
    if isinstance(folder, pathlib.Path) and isinstance(other, pathlib.Path):
        return os.path.relpath(resolved(other), resolved(folder))
    if is_remote(folder) and is_remote(other) and folder.parts[:3] == other.parts[:3]:
        return os.path.relpath("/".join(other.parts[3:]), "/".join(folder.parts[3:]))
    return str(resolved(other))


def follow(folder: Path, way: str) -> Path:
    """The folder that `relative` leads to."""
    if is_remote(way) or os.path.isabs(way):
        return as_path(way)
    if isinstance(folder, pathlib.Path):
        return pathlib.Path(os.path.normpath(folder / way))
    scheme, _, rest = str(folder).partition("://")
    return as_path(f"{scheme}://{os.path.normpath(f'{rest}/{way}')}")


# Writing --------------------------------------------------------------------------------------------


def write_whole(path: PathLike, data: bytes | str) -> None:
    """Writes a file whole or not at all, and durably; folders above it are made.

    Locally it is written under another name, synced and renamed. An object store shows a file once all of it
    has arrived.

    Raises:
      OSError: the disk is full, a permission is missing, the store does not answer; the old file stays.
    """
    path, content = as_path(path), data.encode("utf-8") if isinstance(data, str) else data
    if isinstance(path, pathlib.Path):
        _write_local(path, content)
        return
    with _store_errors(path):
        _store(path).pipe_file(str(path), content)


def _write_local(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def publish(part: pathlib.Path, path: Path) -> None:
    """Makes a local file that is whole the file at `path`, durably."""
    if not isinstance(path, pathlib.Path):
        write_whole(path, part.read_bytes())
        return
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    _replace(part, path)


def _replace(part: pathlib.Path, path: pathlib.Path) -> None:
    os.replace(part, path)
    sync_folder(path.parent)


def open_lines(path: pathlib.Path) -> Any:
    """A local file to which lines are appended.

    It is not buffered: nothing is left in the process for a kill to lose or for `close` to fail on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab", buffering=0)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a local folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def upload(local: pathlib.Path, folder: Path, names: Iterable[str]) -> None:
    """Copies files of a local folder, by their paths within it, into a folder of an object store."""
    names = list(names)
    if not names:
        return
    with _store_errors(folder):
        _store(folder).put([str(local / name) for name in names], [f"{folder}/{name}" for name in names])


def download(folder: Path, local: pathlib.Path, names: Iterable[str]) -> None:
    """Copies files of a folder of an object store into a local one."""
    names = list(names)
    for name in names:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
    with _store_errors(folder):
        _store(folder).get([f"{folder}/{name}" for name in names], [str(local / name) for name in names])


def remove_file(path: Path) -> None:
    """Removes a file, if it is there."""
    if isinstance(path, pathlib.Path):
        path.unlink(missing_ok=True)
        return
    with _store_errors(path), contextlib.suppress(FileNotFoundError):
        _store(path).rm_file(str(path))


def remove_tree(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    if isinstance(path, pathlib.Path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    with _store_errors(path), contextlib.suppress(FileNotFoundError):
        _store(path).rm(str(path), recursive=True)


# Reading --------------------------------------------------------------------------------------------


def read_bytes(path: PathLike) -> bytes:
    """The content of a file.

    Raises:
      OSError: it is not there (FileNotFoundError), or cannot be read.
    """
    path = as_path(path)
    if isinstance(path, pathlib.Path):
        return path.read_bytes()
    with _store_errors(path):
        return _store(path).cat_file(str(path))


def read_text(path: PathLike) -> str:
    """The content of a file in UTF-8.

    Raises:
      OSError: as `read_bytes`.
      UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path).decode("utf-8")


def exists(path: PathLike) -> bool:
    """True if there is such a file or folder. Raises: OSError where the store does not say."""
    path = as_path(path)
    if isinstance(path, pathlib.Path):
        return _has_name(path) and path.exists()
    with _store_errors(path):
        return _store(path).exists(str(path))


def is_file(path: PathLike) -> bool:
    """True if there is such a file. Raises: OSError where the store does not say."""
    path = as_path(path)
    if isinstance(path, pathlib.Path):
        return _has_name(path) and path.is_file()
    with _store_errors(path):
        return _store(path).isfile(str(path))


def is_folder(path: PathLike) -> bool:
    """True if there is such a folder; one without files does not exist in an object store."""
    path = as_path(path)
    if isinstance(path, pathlib.Path):
        return _has_name(path) and path.is_dir()
    with _store_errors(path):
        return _store(path).isdir(str(path))


def _has_name(path: pathlib.Path) -> bool:
    """False for a name longer than any file's, which the system answers with an error, not with a no."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:  # a zero byte
        return False
    return True


def list_folder(folder: Path) -> list[Path]:
    """Entries of a folder, in order of names; nothing where there is no folder."""
    if isinstance(folder, pathlib.Path):
        return sorted(folder.iterdir()) if folder.is_dir() else []
    with _store_errors(folder):
        try:
            found = _store(folder).ls(str(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [folder / name for name in sorted({path.rstrip("/").rpartition("/")[2] for path in found})]


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, in order."""
    if isinstance(folder, pathlib.Path):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    prefix = str(folder).partition("://")[2] + "/"
    with _store_errors(folder):
        return sorted(path.partition(prefix)[2] for path in _store(folder).find(str(folder)))


# Object stores --------------------------------------------------------------------------------------


def _store(path: Path) -> Any:
    """The client of a path's store, which then sees what others have written since."""
    import fsspec

    store = fsspec.filesystem(str(path).partition("://")[0])
    store.invalidate_cache()
    return store


@contextlib.contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except Exception as error:  # each client, and the HTTP library below it, has exceptions of its own
        if isinstance(error, OSError) and error.strerror is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(code, reason, str(path)) from error
