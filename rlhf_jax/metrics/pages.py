"""Shared parts of results pages: lines and cells that are not made twice, and a section that is written by
hand and outlives every rewriting.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path

PLAN, SUMMARY = "plan.json", "summary.json"
REMARKS = "## What it shows"


def held_summary(folder: Path, planned: dict[str, Any], *, growing: str = "") -> dict[str, Any] | None:
    """The summary of a cell that is done; None of one that is not, or not begun.

    Args:
      planned: what decides the cell's numbers, as JSON.
      growing: a number in it that may be larger than it was.

    Raises:
      UserError: the folder holds the cell with other settings.
    """
    again = f"remove {folder}, and the cell is made again"
    held = files.read_json(folder / PLAN, otherwise=None, keys=planned, remedy=again)
    if held is None:
        return None
    for name, value in planned.items():
        if held.get(name) != value and not (name == growing and held[name] < value):
            raise UserError(
                f"{folder} holds this cell with {name} {held.get(name)}, not {value}: remove the folder, or "
                "choose another --out"
            )
    return files.read_json(folder / SUMMARY, otherwise=None, keys=planned)


def take_kept(cells: Path | None, out: Path, planned: Iterable[str]) -> dict[str, Any]:
    """Puts the cells that one file keeps into their folders, where these lack them; what else it keeps.

    Args:
      cells: a file of `keep`; None for none, and one that is not there yet keeps nothing.
      out: folder of the cells.
      planned: names, in a summary, of what decides a cell's numbers.
    """
    if cells is None:
        return {}
    held = files.read_json(cells, otherwise={"cells": {}}, keys=("cells",))
    names = tuple(planned)
    for name, summary in held["cells"].items():
        if not files.exists(out / name / SUMMARY):
            files.write_json(out / name / PLAN, {key: summary[key] for key in names})
            files.write_json(out / name / SUMMARY, summary)
    return {name: value for name, value in held.items() if name != "cells"}


def keep(cells: Path | None, done: Mapping[str, Mapping[str, Any]], **beside: Any) -> None:
    """Writes the summaries of cells, by the names of their folders, into one file from which another machine
    goes on; beside them, what else it needs. None for no file.
    """
    if cells is not None:
        files.write_json(cells, {**beside, "cells": dict(sorted(done.items()))})


def made(folder: Path) -> dict[str, Any]:
    """Provenance of a cell, from what `describe_run` left: command, start, versions, commit."""
    names = ("command", "started", "versions", "commit")
    described = files.read_json(folder / "config.json", keys=names)
    return {name: described[name] for name in names}


def when_and_with(summaries: Iterable[Mapping[str, Any]]) -> str:
    """Dates, versions and commits of cells, in one line without a full stop."""
    cells = list(summaries)
    dates = sorted({summary["started"][:10] for summary in cells})
    versions = {", ".join(f"{k} {v}" for k, v in summary["versions"].items()) for summary in cells}
    commits = sorted({summary.get("commit") or "not noted" for summary in cells})
    made_with = "; or ".join(sorted(versions))
    return f"{' to '.join(dates[:: max(len(dates) - 1, 1)])}; {made_with}; commits: {', '.join(commits)}"


def commands(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The commands of cells, each once, as a block."""
    return "\n".join(["```bash", *sorted({summary["command"] for summary in summaries}), "```"])


def kept_remarks(page: Path) -> str:
    """The section of the page that is written by hand; a new page has only its title."""
    if not files.exists(page):
        return REMARKS
    try:
        text = files.read_text(page)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{page}: its remarks cannot be read ({error}): mend or remove it") from error
    _, found, rest = text.partition(REMARKS)
    return f"{REMARKS}{rest.partition(chr(10) + '## ')[0]}".strip() if found else REMARKS
