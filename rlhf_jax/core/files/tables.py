"""Tables in Parquet. Those that are written here hold a digest of their rows."""

import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import records, stores
from rlhf_jax.core.files.stores import Path

_SUM = b"sha256"
_ROWS_AT_ONCE = 1024


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns as a Parquet file, whole, with a digest.

    Raises:
      UserError: the disk is full or read-only.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, buffer = pa.table(columns), io.BytesIO()
    # Within the file: tables of every step would make a list of digests beside them long.
    pq.write_table(table.replace_schema_metadata({_SUM: _sum(table.to_pylist())}), buffer)
    with records.disk_errors(path):
        stores.write_whole(path, buffer.getvalue())


def read_table(path: Path, *, what: str, remedy: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, whoever wrote it.

    Args:
      what: it should be, for messages.
      remedy: what to do about a damaged file, as the end of a sentence.

    Raises:
      UserError: it is damaged, or not what was written.
      OSError: it cannot be read.
    """
    import pyarrow.parquet as pq

    source = path if isinstance(path, pathlib.Path) else io.BytesIO(stores.read_bytes(path))
    try:
        table = pq.read_table(source)
        held = (table.schema.metadata or {}).get(_SUM)
        if held is not None and held != _sum(table.to_pylist()):
            raise ValueError("it was changed since it was written")
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
            yield from batch.to_pylist()
    # Where bits are wrong, Arrow raises its own exceptions, OSError, UnicodeDecodeError and OverflowError.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not {what} ({reason}); {remedy}") from error


def _sum(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest().encode()
