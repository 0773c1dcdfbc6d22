"""The report of a run, written anew from what its folder holds.

    rlhf report runs/grpo
    rlhf report runs/rlhf
    rlhf report s3://BUCKET/runs/grpo

It stands in report.html of that folder, and needs nothing beside it.
"""

import dataclasses
from pathlib import Path

import tyro

from rlhf_jax.metrics import write_report


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the report.

    Attributes:
      folder: the run folder, whose report.html is written.
    """

    folder: tyro.conf.Positional[Path]


def run(options: Options) -> None:
    """Writes the page, and prints where it is."""
    print(write_report(options.folder))
