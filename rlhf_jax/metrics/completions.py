"""Completions tables: what a policy wrote at a step and what it was worth, as Parquet, and on the console."""

import dataclasses
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from rlhf_jax.core import files
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.progress import format_number

COMPLETIONS = "completions"
"""The folder of the tables in a run folder."""

Row = Mapping[str, Any]
"""One completion: what there is of `prompt`, `completion`, `reward`, `reward/NAME` of each term, `advantage`,
`length`, `logp`, `kl`, and the other fields of its prompt's row; of its tokens the lists `token/text`,
`token/advantage`, `token/logp` and `token/kl`."""

NUMBERS = ("reward", "advantage", "length", "logp", "kl")
"""Columns of numbers, beside those of the single rewards."""
TOKEN = "token/"
"""Before the names of columns that hold something for each token of a completion."""
TOKEN_NUMBERS = ("advantage", "kl", "logp")
_TERM = "reward/"
_BETWEEN = 3  # characters between two columns on the console
_NARROW_HEADER = 9
_WIDE_TEXTS, _NARROW_TEXTS = 48, 20  # characters of prompt and completion together
_MOST_SHOWN = 240  # characters of a text on the console


def write_completions(folder: str | os.PathLike[str], step: int, rows: Sequence[Row]) -> Path:
    """Writes the table of one step as `folder/completions/STEP.parquet`, whole; an older one is replaced.

    Texts and fields that are no numbers are strings; lists and objects among them are JSON. Only what belongs
    to single tokens stands there as lists.

    Raises:
      UserError: the disk is full or read-only.
    """
    columns = {"step": [step] * len(rows)}
    columns |= {name: _column([row.get(name) for row in rows]) for name in column_names(rows)}
    of_tokens = dict.fromkeys(name for row in rows for name in row if name.startswith(TOKEN))
    columns |= {name: [row.get(name) for row in rows] for name in of_tokens}
    path = files.as_path(folder) / COMPLETIONS / f"{step:08d}.parquet"
    files.write_table(path, columns)
    return path


def read_completions(folder: str | os.PathLike[str]) -> dict[int, list[dict[str, Any]]]:
    """The tables of a run by step, in order; none where it wrote none.

    Raises:
      UserError: a file is damaged.
    """
    place = files.as_path(folder) / COMPLETIONS
    names = [name for name in files.list_files(place) if re.fullmatch(r"\d+\.parquet", name)]
    tables = {}
    for name in sorted(names):
        rows = files.read_table(place / name, what="a table of completions", remedy="remove the file")
        tables[int(name.partition(".")[0])] = list(rows)
    return tables


def column_names(rows: Sequence[Row]) -> list[str]:
    """Columns of a table: prompt and completion, rewards, other numbers, then what else the rows have; not
    those of single tokens.
    """
    found = dict.fromkeys(name for row in rows for name in row if not name.startswith(TOKEN))
    terms = [name for name in found if name.startswith(_TERM)]
    first = ["prompt", "completion", "reward", *terms, *NUMBERS[1:]]
    return [name for name in dict.fromkeys([*first, *found]) if name in found]


def _column(values: Sequence[Any]) -> list[Any]:
    present = [value for value in values if value is not None]
    if all(isinstance(value, int | float) for value in present):
        return [None if value is None else float(value) for value in values]
    return [value if isinstance(value, str | None) else json.dumps(value, default=str) for value in values]


@dataclasses.dataclass(frozen=True)
class CompletionsTable:
    """A table of the first rows for the console: prompt, completion, each reward, and other numbers.

    Numbers are never broken: texts become narrow instead, then headers fold, and then the last columns are
    left out and named below.

    Attributes:
      rows: of one step.
      step: of the run.
      count: how many rows; those of one prompt stand together, so that a group can be compared.
    """

    rows: Sequence[Row]
    step: int
    count: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """The table at the width of the console."""
        names = [name for name in column_names(self.rows) if name.startswith(_TERM) or name in NUMBERS]
        cells = {name: [_number(row.get(name)) for row in self.rows[: self.count]] for name in names}
        columns = _columns(cells, options.max_width - 2 * _BETWEEN - 1)
        left_out = [name.removeprefix(_TERM) for name in names if name not in columns]
        room = options.max_width - 1 - _BETWEEN * (2 + len(columns)) - sum(map(_width, columns.values()))
        table = Table(
            title=f"Completions at step {self.step}",
            title_justify="left",
            caption=f"not shown in this width: {', '.join(left_out)}" if left_out else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_lines=True,
        )
        for name, width in (("prompt", 2 * room // 5), ("completion", room - 2 * room // 5)):
            table.add_column(name, max_width=max(width, 1), overflow="fold")
        for header, *_ in columns.values():
            table.add_column(header, justify="right", no_wrap=True)
        for place, row in enumerate(self.rows[: self.count]):
            # As Text, because words of models may look like console markup.
            texts = [Text(_short(row.get(name, ""))) for name in ("prompt", "completion")]
            table.add_row(*texts, *(Text(column[1 + place]) for column in columns.values()))
        yield table


def _columns(cells: Mapping[str, Sequence[str]], room: int) -> dict[str, list[str]]:
    """Header and cells of as many columns of numbers as have room, with what they leave to texts."""
    columns: dict[str, list[str]] = {}
    for longest, for_texts in ((room, _WIDE_TEXTS), (_NARROW_HEADER, _NARROW_TEXTS)):
        columns, left = {}, room - for_texts
        for name, numbers in cells.items():
            column = [_folded(name.removeprefix(_TERM), max(longest, 1, *map(len, numbers))), *numbers]
            left -= _BETWEEN + _width(column)
            if left < 0:
                break
            columns[name] = column
        if len(columns) == len(cells):
            break
    return columns


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n"))


def _folded(header: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken behind its underscores where that is enough."""
    return "\n".join(line.replace(" ", "") for line in textwrap.wrap(header.replace("_", "_ "), width))


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} …"


def _number(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else format_number(float(value))
