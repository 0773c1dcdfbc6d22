"""What pages of results have in common: a section that is written by hand and outlives every rewriting."""

from pathlib import Path

REMARKS = "## What it shows"


def kept_remarks(page: Path) -> str:
    """The section of the page that is written by hand; a new page has only its title."""
    if not page.exists():
        return REMARKS
    _, found, rest = page.read_text(encoding="utf-8").partition(REMARKS)
    return f"{REMARKS}{rest.partition(chr(10) + '## ')[0]}".strip() if found else REMARKS
