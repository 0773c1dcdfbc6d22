"""Digests of a folder's files, beside them in `digests.json`: what was changed since it was written is named.

A file and its digest can't be replaced at one instant. The digest of what is about to be written therefore
stands beside that of what is there, and a file may be either: a kill between the two leaves no contradiction.
Files without an entry, as in folders of earlier versions, are taken as they are.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import stores
from rlhf_jax.core.files.stores import Path

DIGESTS = "digests.json"


TAKE_AS_IT_IS = f"remove {DIGESTS} beside it, to take it as it is"


class DamagedFile(UserError):
    """A file of a run is not what was written."""


class ChangedError(ValueError):
    """A content is not that of its digest."""


def note_digests(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Notes what is about to be written.

    Args:
      contents: by path within the folder.

    Raises:
      OSError: the disk is full, or a permission is missing.
      DamagedFile: the digests that are there cannot be read.
    """
    held = _read(folder)
    for name, content in contents.items():
        entry = _entry(content)
        before = [old for old in held.get(name, []) if old != entry][-1:]
        held[name] = [*before, entry]
    _write(folder, held)


def note_folder(folder: Path, prefix: str) -> None:
    """Notes the files of a folder within `folder`, its path with a slash at its end, as they are."""
    names = [prefix + name for name in stores.list_files(folder / prefix.rstrip("/"))]
    note_digests(folder, {name: stores.read_bytes(folder / name) for name in names})


def forget_digests(folder: Path, prefix: str) -> None:
    """Removes the digests of files whose paths begin so: they are about to be written anew."""
    held = _read(folder)
    kept = {name: entries for name, entries in held.items() if not name.startswith(prefix)}
    if kept != held:
        _write(folder, kept)


def check_digests(folder: Path, prefix: str) -> None:
    """Compares files below a folder whose paths begin so with what was written.

    Raises:
      DamagedFile: one was changed or is gone, or one was added.
    """
    held = {name: entries for name, entries in _read(folder).items() if name.startswith(prefix)}
    for name in held:
        path = folder / name
        if not stores.is_file(path):
            raise DamagedFile(f"{path}: the file is gone: put it back, or run the stage again")
        try:
            checked(path, stores.read_bytes(path), folder, name)
        except (OSError, ChangedError) as error:
            remedy = f"put the old one back, or run the stage again (or {TAKE_AS_IT_IS})"
            raise DamagedFile(f"{path}: {error}: {remedy}") from error
    if held and prefix.endswith("/"):
        added = set(stores.list_files(folder / prefix.rstrip("/"))) - {n.removeprefix(prefix) for n in held}
        if added := sorted(name for name in added if not name.startswith(".")):
            raise DamagedFile(f"{folder / prefix / added[0]}: the run did not write this file: remove it")


def checked(path: Path, content: bytes, folder: Path | None = None, name: str = "") -> bytes:
    """The content of a file as far as it is what was written.

    Of lines that were being appended a kill may have left a part, which is cut off.

    Args:
      folder: whose digests they are; that of the file by default, where `name` is its path.

    Raises:
      ChangedError: it is something else.
      DamagedFile: the digests cannot be read.
    """
    folder = path.parent if folder is None else folder
    entries = _read(folder).get(name or path.name)
    if not entries:
        return content
    if any(_is_of(entry, content) for entry in entries):
        return content
    before, after = entries[0], entries[-1]
    part = content[: before["bytes"]]
    if before.get("grows") and len(part) < len(content) < after["bytes"] and _is_of(before, part):
        return part
    raise ChangedError("it was changed since it was written")


def note_growth(path: Path, before: bytes, after: bytes) -> None:
    """Notes that a file is about to grow from one content to another, of which a kill may leave a part."""
    held = _read(path.parent)
    held[path.name] = [_entry(before) | {"grows": True}, _entry(after) | {"grows": True}]
    _write(path.parent, held)


def _is_of(entry: Mapping[str, Any], content: bytes) -> bool:
    return entry["bytes"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    path = folder / DIGESTS
    try:
        held = json.loads(stores.read_text(path))
        for entries in held.values():
            for entry in entries:
                if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                    raise TypeError("an entry without bytes and sha256")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(
            f"{path}: no digests can be read ({error}): put the old file back (or {TAKE_AS_IT_IS})"
        ) from error
    return held


def _write(folder: Path, held: Mapping[str, Any]) -> None:
    lines = (f"  {json.dumps(name)}: {json.dumps(entries)}" for name, entries in sorted(held.items()))
    stores.write_whole(folder / DIGESTS, "{\n" + ",\n".join(lines) + "\n}\n")
