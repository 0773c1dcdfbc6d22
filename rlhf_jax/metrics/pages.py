"""What results have in common: lines and cells that are not made twice, and a section that is written by hand
and outlives every rewriting.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.core.errors import UserError

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
    path = folder / PLAN
    if not path.exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    for name, value in planned.items():
        if held.get(name) != value and not (name == growing and held[name] < value):
            raise UserError(
                f"{folder} holds this cell with {name} {held.get(name)}, not {value}: remove the folder, or "
                "choose another --out"
            )
    done = folder / SUMMARY
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else None


def whole_lines(path: Path) -> list[Any]:
    """What a JSONL file holds, none if there is no such file; a line torn by a stop is cut off it."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # not splitlines, which splits within texts
    if lines.pop():
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    return [json.loads(line) for line in lines]


def made(folder: Path) -> dict[str, Any]:
    """How a cell was made, from what `describe_run` left: command, start, versions, commit."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: described[name] for name in ("command", "started", "versions", "commit")}


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
    if not page.exists():
        return REMARKS
    _, found, rest = page.read_text(encoding="utf-8").partition(REMARKS)
    return f"{REMARKS}{rest.partition(chr(10) + '## ')[0]}".strip() if found else REMARKS
