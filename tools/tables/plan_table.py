"""The README's table of plans: models x algorithms x slices, by the TPU compiler or by formula.

    python tools/tables/plan_table.py                            # by formula, in a minute
    python tools/tables/plan_table.py --compile --out runs/plans

With --compile, each cell is a run of rlhf_jax/stages/plan.py, kept in --out, so that an interrupted table
goes on; it needs the compilers (pip install 'rlhf_jax[tpu-plan,gpu-plan]'). Cells without a compiled plan
are by formula (`planning/analytic.py`) and begin with ~. A cell says what the fullest moment takes on each
chip, and the roofline of a step: if computing, memory and links all overlap, and if none do.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import tyro
from rich.progress import track

from rlhf_jax import distributed
from rlhf_jax.core.axes import GATHERED_SAMPLING, axis_rules
from rlhf_jax.distributed.accelerator_specs import CHIPS, roofline
from rlhf_jax.models import Preset, preset_config
from rlhf_jax.planning.analytic import analytic_plan
from rlhf_jax.planning.compiled import Plan
from rlhf_jax.planning.steps import Algorithm, Workload

# What a column is called: its topology, for the compiler, its chip, and how many of them.
SLICES = {
    "v5e-64": ("v5e:8x8", "TPU v5e", 64),
    "v5p-128": ("v5p:4x4x4", "TPU v5p", 64),
    "v6e-256": ("v6e:16x16", "TPU v6e", 256),
    "H100 x 8": ("h100:8", "H100 SXM", 8),
    "H200 x 8": ("h200:8", "H200 SXM", 8),
    "H100 x 64": ("h100:64", "H100 SXM", 64),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      out: where compiled plans are kept, one JSON file a cell.
      models: rows.
      algorithms: in each row.
      slices: columns.
      rows_a_chip: of a step: conversations, pairs, or answers.
      length: tokens a row; of answers with their prompts.
      new_tokens: of an answer.
      compile: compile the cells that are missing in `out`.
    """

    out: Path = Path("runs/plans")
    models: tuple[Preset, ...] = ("llama-1b", "llama-8b", "llama-70b")
    algorithms: tuple[Algorithm, ...] = ("sft", "dpo", "grpo", "ppo")
    slices: tuple[str, ...] = tuple(SLICES)
    rows_a_chip: int = 1
    length: int = 2048
    new_tokens: int = 512
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A place in the table.

    Attributes:
      gathered: sample with parameters that are whole along fsdp.
    """

    model: Preset
    algorithm: Algorithm
    gathered: bool
    slice: str

    def path(self, out: Path) -> Path:
        """Where the compiled plan is kept."""
        return out / f"{self.model}_{self.algorithm}{'_gathered' * self.gathered}_{self.slice}.json"


def ways(algorithm: Algorithm) -> tuple[bool, ...]:
    """Whether parameters are gathered for sampling: the rows of an algorithm."""
    return (False, True) if algorithm in ("grpo", "ppo") else (False,)


def mesh_of(model: str, chips: int) -> str:
    """Everything over fsdp, and the largest model four ways over tensor as well."""
    return f"fsdp={chips // 4},tensor=4" if model == "llama-70b" else f"fsdp={chips}"


def compile_cell(options: Options, cell: Cell) -> None:
    """Runs rlhf_jax/stages/plan.py for one cell, unless that was done."""
    topology, _, chips = SLICES[cell.slice]
    path = cell.path(options.out)
    if path.exists():
        return
    mesh = mesh_of(cell.model, chips)
    flags = {"--model": cell.model, "--algo": cell.algorithm, "--topology": topology, "--mesh": mesh}
    flags |= {"--batch": options.rows_a_chip * chips, "--length": options.length, "--json": path}
    flags |= {"--new-tokens": options.new_tokens, "--hlo": path.with_suffix("")}
    words = [str(word) for flag in flags.items() for word in flag]
    words += ["--all-gather-params"] if cell.gathered else []
    command = [sys.executable, "-m", "rlhf_jax", "plan", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{path.stem}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}", file=sys.stderr)


def predicted_by_formula(options: Options, cell: Cell) -> Plan:
    """What is said of a cell that was not compiled."""
    chips = SLICES[cell.slice][2]
    config = preset_config(cell.model, scan_layers=True, remat="full", compute_dtype="bfloat16")
    rows, sizes = options.rows_a_chip * chips, (options.length, options.new_tokens)
    with axis_rules(GATHERED_SAMPLING if cell.gathered else {}):
        return analytic_plan(
            Workload(cell.algorithm, config, rows, *sizes),
            distributed.abstract_mesh(mesh_of(cell.model, chips)),
        )


def text(options: Options, cell: Cell) -> str:
    """What the table says of one cell."""
    [chip] = [chip for chip in CHIPS if chip.name == SLICES[cell.slice][1]]
    path = cell.path(options.out)
    if path.exists():
        mark, plan = "", json.loads(path.read_text(encoding="utf-8"))
        need = plan["peak_bytes"]
        times = [list(program["roofline_seconds"].values()) for program in plan["programs"].values()]
    else:
        by_formula = predicted_by_formula(options, cell)
        mark, need = "~", by_formula.peak_bytes
        times = [
            list(
                roofline(chip, flops=p.flops, memory_bytes=p.traffic_bytes, sent_bytes=p.sent_bytes).values()
            )
            for p in by_formula.programs.values()
        ]
    if math.isnan(need):
        return f"{mark}no room, the compiler says"
    excess = (need - chip.memory_bytes) / 2**30
    if excess > 0:
        return f"{mark}no: {need / 2**30:.0f} GiB, {excess:.1f} too much"
    least, most = (
        f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (sum(map(max, times)), sum(map(sum, times)))
    )
    return f"{mark}{need / 2**30:.1f} GiB, {least} to {most} s"


def main() -> None:
    """Compiles what is missing, if asked to, and prints the table."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    rows: list[tuple[Preset, Algorithm, bool]]
    rows = [(m, a, way) for m in options.models for a in options.algorithms for way in ways(a)]
    if options.compile:
        options.out.mkdir(parents=True, exist_ok=True)
        cells = [Cell(*row, name) for row in rows for name in options.slices]
        for cell in track(cells, description="compiling", transient=True):
            compile_cell(options, cell)
    print("| | | " + " | ".join(options.slices) + " |\n|---|---|" + "---|" * len(options.slices))
    for model, algorithm, gathered in rows:
        said = " | ".join(text(options, Cell(model, algorithm, gathered, name)) for name in options.slices)
        print(f"| {model} | {algorithm.upper()}{', gathered' * gathered} | {said} |", flush=True)


if __name__ == "__main__":
    main()
