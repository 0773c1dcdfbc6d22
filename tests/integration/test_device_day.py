"""The script that measures an accelerator, on the machine at hand and with the smallest of everything."""

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def cells(page, title):
    """The cells of a part's table, without its head."""
    part = page.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.slow
def test_every_part_is_on_the_page(tmp_path):
    words = ["--sizes", "tiny", "--batch", "2", "--length", "64", "--new-tokens", "16", "--repeats", "1"]
    smallest = {"DEVICE_DAY_SEEDS": "1 2", "DEVICE_DAY_STEPS": "2000", "JAX_PLATFORMS": "cpu"}
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", ROOT / "tools" / "device_day.sh", tmp_path / "day" / "page.md", *words],
        check=True,
        env={**os.environ, **smallest, "PATH": path},
        timeout=600,
    )
    page = (tmp_path / "day" / "page.md").read_text(encoding="utf-8")
    assert [row[0] for row in cells(page, "Attention")] == ["plain", "blocked"]
    assert all(0 < float(error) < 0.1 for row in cells(page, "Attention") for error in row[3:])
    assert [row[:2] for row in cells(page, "Updates")] == [["tiny", "sft"], ["tiny", "grpo"]]
    for row in cells(page, "Updates") + cells(page, "Decoding"):
        assert math.isfinite(float(row[3 if len(row) > 3 else 1].replace(",", "")))
    assert len(re.findall(r"\| PPO \| [12] \|", page)) == 2
