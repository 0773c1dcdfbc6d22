"""Verifiers against verdicts that others have published: how often they agree, and where they do not.

    python tools/tables/check_verifiers.py --data gsm8k/model_solutions.jsonl
    python tools/tables/check_verifiers.py --data gsm8k/model_solutions.jsonl --rewards my_rewards:exact

Rows hold a reference (`ground_truth`) and, in other fields, objects with `solution` and `is_correct`, as
OpenAI's file of model solutions to GSM8K does. No accelerator and no model is needed.
"""

import dataclasses
import sys
import time

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import read_rows
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.rewards.functions import load_reward, score_rows


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
      data: rows with `ground_truth` and objects of `solution` and `is_correct`.
      rewards: reward functions by path, each 1 for right and 0 for wrong.
      shown: disagreements that are listed of each.
    """

    data: str
    rewards: tuple[str, ...] = (
        "rlhf_jax.rewards.verifiers:gsm8k_reward",
        "rlhf_jax.rewards.verifiers:symbolic_reward",
    )
    shown: int = 20


@dataclasses.dataclass(frozen=True)
class Judged:
    """A solution with the verdict that others gave it."""

    solution: str
    reference: str
    is_correct: bool
    where: str


def read_judged(spec: str) -> list[Judged]:
    """Every judged solution in the file.

    Raises:
      UserError: a row without a reference, or none with a judged solution.
    """
    judged = []
    for row in read_rows(spec):
        reference = row.fields.get("ground_truth")
        if not isinstance(reference, str):
            raise UserError(f"{row.where}: field 'ground_truth' is not a text; give the reference solution")
        for name, value in row.fields.items():
            if isinstance(value, dict) and {"solution", "is_correct"} <= value.keys():
                where = f"{row.where}, {name}"
                judged.append(Judged(value["solution"], reference, bool(value["is_correct"]), where))
    if not judged:
        raise UserError(f"{spec}: no field holds an object with 'solution' and 'is_correct'")
    return judged


def compare(path: str, judged: list[Judged], shown: int, console: Console) -> list[str]:
    """Lists where the reward function disagrees, and returns its row of the table."""
    start = time.perf_counter()
    texts = [each.solution for each in judged]
    fields = {"answer": [each.reference for each in judged]}
    scored = score_rows(
        load_reward(path), [""] * len(judged), texts, fields, where=[each.where for each in judged]
    )
    seconds = time.perf_counter() - start
    wrong = np.flatnonzero((scored.rewards > 0.5) != [each.is_correct for each in judged])
    for index in wrong[:shown]:
        each = judged[index]
        said = "cannot be scored" if scored.unscorable[index] else f"{scored.rewards[index]:g}"
        console.print(
            f"{path.rpartition(':')[2]} says {said}, the file {each.is_correct:d} ({each.where}): "
            f"solution ends {each.solution[-60:]!r}, reference {each.reference[-20:]!r}",
            markup=False,
        )
    agreed = len(judged) - len(wrong)
    interval = wilson_interval(agreed, len(judged))
    name, counts = path.rpartition(":")[2], f"{agreed:,} of {len(judged):,}"
    bounds = f"{100 * interval.low:.2f} % to {100 * interval.high:.2f} %"
    unscorable, time_each = str(scored.unscorable.sum()), f"{1e6 * seconds / len(judged):.0f}"
    return [name, counts, f"{100 * agreed / len(judged):.2f} %", bounds, unscorable, time_each]


def main() -> None:
    """Parses the command line and prints the table."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    console = Console(soft_wrap=True)
    try:
        judged = read_judged(options.data)
        columns = ("verifier", "agrees", "share", "95 % interval", "unscorable", "us each")
        table = Table(*columns, title=options.data)
        for path in options.rewards:
            table.add_row(*compare(path, judged, options.shown, console))
        console.print(table)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
