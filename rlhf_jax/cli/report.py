"""The report of a run, written anew from what its folder holds; of several runs, their comparison.

    rlhf report runs/grpo
    rlhf report runs/grpo --watch
    rlhf report runs/grpo runs/dapo runs/gspo --out comparison.html
    rlhf report s3://BUCKET/runs/grpo

It stands in report.html of that folder, and needs nothing beside it. With --watch it is written again while
the run goes on, and a browser that shows it follows. Several runs are drawn over each other on one page, with
their results and what differs in their options.
"""

import dataclasses
import time
from pathlib import Path

import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt
from rlhf_jax.metrics import write_comparison, write_report


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the report.

    Attributes:
      folders: the run folder, whose report.html is written; several to compare.
      out: the page; None for report.html in the folder of one run, comparison.html here for several.
      watch: go on writing the page of a run under way, until Ctrl-C.
      every: seconds between two versions of it.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    out: Path | None = None
    watch: bool = False
    every: PositiveInt = 10


def run(options: Options) -> None:
    """Writes the page, and prints where it is."""
    if not options.folders:
        raise UserError("no run folder is given: give the folder that the run was told with --out")
    first, *others = options.folders
    for folder in map(files.as_path, options.folders):
        if not files.is_file(folder / "config.json") and not files.is_file(folder / "metrics.jsonl"):
            raise UserError(f"{folder} holds no run: give the folder that a run was told with --out")
    if others and options.watch:
        raise UserError("--watch follows one run: give one folder")
    if others:
        print(write_comparison([first, *others], options.out or Path("comparison.html")))
        return
    if options.watch:
        follow(first, options.out, options.every)
    print(write_report(first, path=options.out))


def follow(folder: Path, path: Path | None, every: int) -> None:
    """Writes the report again and again, as a page that loads itself anew, until Ctrl-C."""
    print(f"{write_report(folder, path=path, refresh=every)} is kept up to date; Ctrl-C ends it")
    try:
        while True:
            time.sleep(every)
            write_report(folder, path=path, refresh=every)
    except KeyboardInterrupt:
        return  # the last version, which the caller writes, does not load itself again
