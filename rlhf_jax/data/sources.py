"""Rows of data from files people have (JSONL, JSON, Parquet) and from `tensorflow-datasets`.

Reading is strict: what Python's JSON reader lets through and breaks a run hours later (NaN, a key given
twice, half a surrogate pair) is refused here, by file and line.
"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path, PathLike
from rlhf_jax.core.importing import optional
from rlhf_jax.data import reasoning_gym
from rlhf_jax.data.images import FIELDS as IMAGE_FIELDS

_TFDS_SPEC = re.compile(r"tfds:(?P<name>[^:]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
      fields: its fields by name.
      where: `file:line`, or `file:row N` where there are no lines; rows and lines count from 1.
    """

    fields: dict[str, Any]
    where: str


class _Malformed(ValueError):
    """What is wrong with a value, as the middle of a sentence."""


def read_rows(spec: PathLike) -> list[Row]:
    """Reads all rows of a data set.

    Args:
      spec: a path, or an address such as s3://BUCKET/FILE, that ends in .jsonl, .json (an array of objects,
        or an object a line) or .parquet; or `tfds:NAME[:SPLIT]` (split `train` unless named), prepared first
        where it is not yet on disk; or `reasoning-gym:NAME[+NAME...][:COUNT[:SEED]]` (see `reasoning_gym`).

    Raises:
      UserError: a missing, unreadable or empty file, or a malformed row.
    """
    if isinstance(spec, str) and spec.startswith("tfds:"):
        rows = list(_read_tfds(spec))
    elif isinstance(spec, str) and spec.startswith(reasoning_gym.PREFIX):
        rows = [Row(fields, where) for fields, where in reasoning_gym.read(spec)]
    else:
        rows = _read_file(files.as_path(spec))
    if not rows:
        raise UserError(f"{spec}: the data set is empty; give one with at least one row")
    return rows


def as_rows(rows: Any) -> list[Row]:
    """Rows from whatever holds them: `Row`s, dicts, any iterable of them, a `datasets.Dataset`, a pandas or
    pyarrow table, or what `read_rows` reads. What a pandas table says is missing (NaN, NA) is None.

    Raises:
      UserError: there is none, one is no dict, or a number in one is not finite.
    """
    if isinstance(rows, str | os.PathLike):
        return read_rows(rows)
    if hasattr(rows, "to_pylist"):  # pyarrow
        rows = [_without_filled(row) for row in rows.to_pylist()]
    elif type(rows).__module__.split(".")[0] == "datasets":  # which stands on it
        rows = [_without_filled(row) for row in rows]
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    if isinstance(rows, dict) or not isinstance(rows, Iterable):
        raise UserError(f"rows is a {type(rows).__name__}: give a list of dicts, a table, or a path")
    found = [row if isinstance(row, Row) else _as_row(row, f"row {n}") for n, row in enumerate(rows, start=1)]
    if not found:
        raise UserError("rows is empty: give at least one row")
    return found


def _as_row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise UserError(f"{where} is a {type(fields).__name__}: give a dict of its fields")
    for name in fields:
        if not isinstance(name, str):
            raise UserError(f"{where} has a field {name!r}, which is no text: give fields by their names")
    return Row({name: _plain(value, name, where) for name, value in fields.items()}, where)


def _read_file(path: Path) -> list[Row]:
    readers = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}
    try:
        if files.is_folder(path):
            raise UserError(f"{path}: a folder, not a file; name the .jsonl, .json or .parquet file in it")
        if not files.exists(path):
            raise UserError(f"{path}: no such file; {_suggestion(path)}")
        if path.suffix.lower() not in readers:
            raise UserError(f"{path}: cannot read a file of this kind; give a .jsonl, .json or .parquet file")
        return list(readers[path.suffix.lower()](path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _suggestion(path: Path) -> str:
    names = [file.name for file in files.list_folder(path.parent) if file.name != path.name]  # a dead link
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


# Fields ---------------------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
    """The type of a field's value, in words."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def is_reference(value: object) -> bool:
    """True if a field is an answer that completions can be compared with: a text or a number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value == value


def reference_of(row: Row, field: str) -> str | int | float | None:
    """The text or number in a field; None where it is missing or null.

    Raises:
      UserError: it is something else, which would otherwise be taken for the text that Python prints of it.
    """
    value = row.fields.get(field)
    if value is not None and not is_reference(value):
        raise UserError(f"{row.where}: field {field!r} is {kind_of(value)}; give text or a number")
    return value


# JSON -----------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[Row]:
    content = files.read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".json" and content.lstrip()[:1] == b"[":
        yield from _read_array(path, content)
        return
    # Not splitlines, which also splits at U+2028 and others that JSON strings may hold.
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if text.strip(" \t\r"):
            yield Row(_parse(text.strip(" \t\r"), where), where)


def _read_array(path: Path, content: bytes) -> Iterator[Row]:
    """The objects of one JSON array, each with the line where it begins."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        _decode(line, f"{path}:{number}")
    text = content.decode("utf-8")
    place, counted, line = _skip(text, text.index("[") + 1), 0, 1
    closing = text[place : place + 1] == "]"
    while not closing:
        line, counted = line + text.count("\n", counted, place), place
        where = f"{path}:{line}"
        fields, place = _parse_at(text, place, where)
        yield Row(fields, where)
        place = _skip(text, place)
        closing = text[place : place + 1] == "]"
        if not closing and text[place : place + 1] != ",":
            raise UserError(f"{where}: a comma or ] should follow this row of the array; mend the file")
        place = place if closing else _skip(text, place + 1)
    end = _skip(text, place + 1)
    if end != len(text):
        line += text.count("\n", counted, end)
        raise UserError(f"{path}:{line}: there is text after the end of the array; remove it")


def _skip(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return space.end() if space else place


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        ) from None


def _parse(text: str, where: str) -> dict[str, Any]:
    fields, end = _parse_at(text, 0, where)
    if end != len(text):
        raise UserError(f"{where}: there is more after the row's object; write one object a line")
    return fields


def _parse_at(text: str, place: int, where: str) -> tuple[dict[str, Any], int]:
    try:
        value, end = _DECODER.raw_decode(text, place)
    except _Malformed as error:
        raise UserError(f"{where}: {error} in the row; mend the row") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend the row") from None
    except RecursionError:
        raise UserError(f"{where}: the row is nested too deeply; flatten it") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: not a value that can be read ({error}); mend the row") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: the row is not a JSON object; write {{"field": value, ...}}')
    return value, end


def _refuse_constant(name: str) -> None:
    raise _Malformed(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise _Malformed(f"the number {number[:20]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Malformed(f"the field {twice!r} stands twice")
    for name, value in pairs:
        _check_text(name, name)
        _check_text(value, name)
    return fields


def _check_text(value: Any, field: str) -> None:
    """Refuses lone surrogates in strings and lists of strings; objects within have been checked already."""
    if isinstance(value, list):
        for item in value:
            _check_text(item, field)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            character = f"{value[error.start]!a} at character {error.start}"
            raise _Malformed(f"the field {field!a} holds a lone surrogate ({character})") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)


# Parquet and tensorflow-datasets --------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Row]:
    found = files.read_table(path, what="a Parquet file that can be read", remedy="write it again")
    for number, fields in enumerate(found, start=1):
        where = f"{path}:row {number}"
        plain = {name: _plain(value, name, where) for name, value in fields.items()}
        yield Row(_without_filled(plain), where)


def _without_filled(value: Any, *, of_tools: bool = False) -> Any:
    """Without the nulls by which Arrow gives every call, and every schema, the arguments of the others."""
    if isinstance(value, list):
        return [_without_filled(item, of_tools=of_tools) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_filled(item, of_tools=of_tools or name in ("tools", "tool_calls"))
        for name, item in value.items()
        if item is not None or not of_tools
    }


def _read_tfds(spec: str) -> Iterator[Row]:
    match = _TFDS_SPEC.fullmatch(spec)
    if match is None:
        raise UserError(f"{spec}: not a data set's name; write tfds:NAME or tfds:NAME:SPLIT")
    split = match["split"] or "train"
    tfds = optional("tensorflow_datasets", extra="tfds")
    try:
        builder: Any = tfds.builder(match["name"], file_format="array_record")
        builder.download_and_prepare()
        source = builder.as_data_source(split=split)
        number_of_rows = len(source)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(
            match["name"], tfds.list_builders(with_community_datasets=False), n=1
        )
        hint = f"did you mean tfds:{near[0]}?" if near else "check the name"
        raise UserError(f"{spec}: there is no such data set; {hint}") from None
    # A builder is a stranger's program (network, disk, formats): any exception can come out of it.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{spec}: split {split!r} cannot be read ({reason}); check the split, or prepare the data set "
            'anew with file_format="array_record"'
        ) from None
    for number in range(number_of_rows):
        where = f"{spec}:row {number + 1}"
        yield Row({name: _plain(value, name, where) for name, value in source[number].items()}, where)


def _plain(value: Any, field: str, where: str) -> Any:
    """A value of NumPy or Arrow as Python's own: text for bytes, lists for arrays; images as they are."""
    if field in IMAGE_FIELDS:
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}: field {field!r} is not UTF-8 text; mend or remove it") from None
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), field, where)
    if isinstance(value, list | tuple):
        return [_plain(item, field, where) for item in value]
    if isinstance(value, dict):
        fields = {name: _plain(item, field, where) for name, item in value.items()}
        return _rows_of_columns(fields)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: field {field!r} is {value}; give a number or remove the row")
    return value


def _rows_of_columns(fields: dict[str, Any]) -> Any:
    """tfds gives a sequence of messages as one list of roles and one of contents: back to messages."""
    lists = all(isinstance(column, list) for column in fields.values())
    if not {"role", "content"} <= fields.keys() or not lists:
        return fields
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
