"""Text, JSON, lines and arrays of a run: written whole, with a digest; read back by name.

What can't be written is a `UserError` that says where there is no room. What can't be read back is a
`DamagedFile` that names the file and says what becomes of it.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import digests, stores
from rlhf_jax.core.files.digests import DamagedFile
from rlhf_jax.core.files.stores import Path, PathLike, as_path

MADE_AGAIN = "remove it, and the same command makes it again"
_REQUIRED: Any = object()
_SUM = "sha256"  # the array that holds the digest of the others


@contextlib.contextmanager
def disk_errors(path: PathLike, name: str = "folder") -> Iterator[None]:
    """Turns errors of the file system into a `UserError` that names `path`.

    Args:
      name: of the parameter or option that says where.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            place = stores.as_path(path)
            file = next((part for part in (place, *place.parents) if part.is_file()), place)
            raise UserError(
                f"{path}: cannot be written, as {file} is a file where a folder is meant: choose another "
                f"{name}"
            ) from error
        misplaced = error.errno in (errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG)
        remedy = "choose" if misplaced else "free or unlock the disk, or choose"
        raise UserError(f"{path}: cannot be written ({reason}): {remedy} another {name}") from error


# Writing --------------------------------------------------------------------------------------------


def write_text(path: PathLike, text: str) -> None:
    """Writes a text that people may edit, and that therefore has no digest.

    Raises:
      UserError: the disk is full or read-only, or the object store does not answer.
    """
    with disk_errors(path):
        stores.write_whole(path, text)


def write_json(path: PathLike, data: Any) -> None:
    """Writes JSON, with a digest.

    Raises:
      UserError: as `write_text`.
    """
    _write(path, (json.dumps(data, indent=2, default=str) + "\n").encode())


def write_lines(path: PathLike, rows: Iterable[Any]) -> None:
    """Writes JSON Lines, with a digest.

    Raises:
      UserError: as `write_text`.
    """
    _write(path, _lines(rows))


def append_lines(path: PathLike, rows: Iterable[Any]) -> None:
    """Appends JSON Lines, durably; what a kill leaves of them is cut off by `read_lines`.

    Raises:
      UserError: as `write_text`.
      DamagedFile: what is there was changed since it was written.
    """
    path, new = as_path(path), _lines(rows)
    with _damage(path, MADE_AGAIN):
        found = stores.read_bytes(path) if stores.is_file(path) else b""
        before = digests.checked(path, found)
    with disk_errors(path):
        digests.note_growth(path, before, before + new)
        if isinstance(path, pathlib.Path) and len(before) == len(found):
            _append(path, new)
        else:
            stores.write_whole(path, before + new)


def _append(path: pathlib.Path, new: bytes) -> None:
    with open(path, "ab") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())


def write_arrays(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name as .npz. They are waited for before the file is begun.

    Raises:
      UserError: as `write_text`.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **{_SUM: np.array(_sum(arrays))}, **arrays)
    with disk_errors(path):
        stores.write_whole(path, buffer.getvalue())


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[pathlib.Path]:
    """A local file for libraries that write files themselves, such as pictures; it becomes `path` at the end.

    Raises:
      UserError: as `write_text`.
    """
    path = as_path(path)
    with disk_errors(path), contextlib.ExitStack() as stack:
        if isinstance(path, pathlib.Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
        else:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            part = pathlib.Path(scratch) / path.name
        stack.callback(part.unlink, missing_ok=True)
        yield part
        stores.publish(part, path)


def _lines(rows: Iterable[Any]) -> bytes:
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    try:
        return "".join(f"{text}\n" for text in texts).encode()
    except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot hold
        return "".join(json.dumps(json.loads(text)) + "\n" for text in texts).encode()


def _write(path: PathLike, content: bytes) -> None:
    path = as_path(path)
    with disk_errors(path):
        digests.note_digests(path.parent, {path.name: content})
        stores.write_whole(path, content)


# Reading --------------------------------------------------------------------------------------------


def read_json(
    path: PathLike, *, otherwise: Any = _REQUIRED, keys: Iterable[str] = (), remedy: str = MADE_AGAIN
) -> Any:
    """JSON that `write_json` wrote.

    Args:
      otherwise: where there is no such file; that is an error by default.
      keys: an object has at least these.
      remedy: what to do about a damaged file, as the end of a sentence.

    Raises:
      DamagedFile: there is no such file, or it is not what was written.
    """
    path = as_path(path)
    with _damage(path, remedy):
        if otherwise is not _REQUIRED and not stores.exists(path):
            return otherwise
        content = stores.read_bytes(path)
        data = json.loads(content)  # first: it says more than a digest does
        digests.checked(path, content)
        _check_keys(data, keys)
        return data


def read_lines(path: PathLike, *, keys: Iterable[str] = (), remedy: str = MADE_AGAIN) -> list[Any]:
    """Lines that `append_lines` or `write_lines` wrote, none if there is no such file.

    What a kill left of a line is cut off the file.

    Args:
      keys: every line is an object that has at least these.
      remedy: what to do about a damaged file, as the end of a sentence.

    Raises:
      DamagedFile: it is not what was written.
    """
    path, where = as_path(path), str(path)
    with _damage(path, remedy, lambda: where):
        if not stores.exists(path):
            return []
        content = found = stores.read_bytes(path)
        changed = None
        try:
            content = digests.checked(path, content)
        except digests.ChangedError as error:
            changed = error
        rows = []
        # Not splitlines, which splits within texts, too.
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            rows.append(json.loads(line))
            _check_keys(rows[-1], keys)
        where = str(path)
        if changed is not None:
            raise changed
        if torn or len(content) < len(found):
            stores.write_whole(path, content[: len(content) - len(torn)])
        return rows


def read_arrays(
    path: PathLike, *, keys: Iterable[str] = (), remedy: str = MADE_AGAIN
) -> dict[str, np.ndarray]:
    """Arrays that `write_arrays` wrote.

    Args:
      keys: names that must be among them.
      remedy: what to do about a damaged file, as the end of a sentence.

    Raises:
      DamagedFile: there is no such file, or it is not what was written.
    """
    path = as_path(path)
    with _damage(path, remedy):
        with np.load(io.BytesIO(stores.read_bytes(path)), allow_pickle=False) as held:
            arrays = dict(held)
        if _SUM in arrays and arrays.pop(_SUM).item() != _sum(arrays):
            raise ValueError("its digest is another")
        _check_keys(arrays, keys)
        return arrays


def made_again(error: DamagedFile) -> None:
    """Says, on standard error, that a damaged file is made again."""
    print(f"warning: {error}", file=sys.stderr)


def _check_keys(data: Any, keys: Iterable[str]) -> None:
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise ValueError(f"it has no {key!r}")


def _sum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.kind}{array.dtype.itemsize} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _damage(path: Path, remedy: str, where: Callable[[], str] | None = None) -> Iterator[None]:
    """Whatever comes of reading a damaged file as one `DamagedFile`."""
    try:
        yield
    except DamagedFile:  # of the digests, which has been named
        raise
    except digests.ChangedError as error:
        raise DamagedFile(f"{path}: {error}: {remedy} (or {digests.TAKE_AS_IT_IS})") from error
    except FileNotFoundError as error:
        raise DamagedFile(f"{path}: no such file: {remedy}") from error
    # Where bits are wrong, NumPy and zipfile raise a dozen kinds of exceptions, and JSON a RecursionError.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = (reason or str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "not JSON" if isinstance(error, json.JSONDecodeError) else "damaged"
        raise DamagedFile(f"{where() if where else path}: {kind} ({reason}): {remedy}") from error
