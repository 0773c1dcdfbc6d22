"""Differences between two runs: options, versions of packages, and the commit (exit status 1 if any does).

    rlhf diff runs/grpo runs/dapo
    rlhf diff runs/seed_0/grpo runs/seed_1/grpo
    rlhf diff runs/grpo s3://BUCKET/runs/grpo

Exits with status 0 where nothing does, and 1 where something does. Where a run writes (--out), and whether it
went on with an earlier one (--resume), is not compared.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.stages.option_checks import flags

_OF_THE_FOLDER = ("--out", "--resume")
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the comparison.

    Attributes:
      first: a run folder.
      second: another.
    """

    first: tyro.conf.Positional[Path]
    second: tyro.conf.Positional[Path]


def run(options: Options) -> None:
    """Prints what differs as a table; ends with status 1 where something does."""
    rows = differences(described(options.first), described(options.second))
    if not rows:
        print(f"{options.first} and {options.second} do not differ")
        return
    _print_table(rows, str(options.first), str(options.second))
    sys.exit(1)


def described(folder: Path) -> dict[str, Any]:
    """Settings that decide a run: its options by their flags, the stage, versions and the commit.

    Raises:
      UserError: the folder describes no run.
    """
    path = files.as_path(folder) / "config.json"
    try:
        data = json.loads(files.read_text(path))
        options, versions = flags(data["config"]), dict(data["versions"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such file: give a folder that a run wrote with --out") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a run's description ({error}): give another folder") from error
    kept = {name: value for name, value in options.items() if name not in _OF_THE_FOLDER}
    return {"stage": data.get("stage"), **kept, **versions, "commit": data.get("commit")}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value in the first, value in the second) of what differs, in the order of the first."""
    names = dict.fromkeys([*first, *second])
    pairs = [(name, first.get(name, _ABSENT), second.get(name, _ABSENT)) for name in names]
    return [(name, _shown(one), _shown(other)) for name, one, other in pairs if one != other]


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return str(value) if value != "" else "(empty)"


def _print_table(rows: list[tuple[str, str, str]], *folders: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for header in ("", *folders):
        table.add_column(Text(header))
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
