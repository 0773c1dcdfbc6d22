"""The table of plans: models x algorithms x slices, each cell the plan of a run by its own command.

    python tools/tables/plan_table.py                            # what is compiled, the rest by formula
    python tools/tables/plan_table.py --compile --slices v5e-64 "H100 x 8" --workers 2

With --compile, each cell that is missing in docs/results/plans.json is compiled by
`rlhf sft|dpo|grpo|ppo ... --plan SLICE` and written there, so that an interrupted table goes on; it needs
the compilers (pip install 'rlhf_jax[tpu-plan,gpu-plan]'), and one to three minutes a cell on one core,
whatever the depth. Cells of full training that are not compiled are by formula (`planning/analytic.py`)
and begin with >=, since compiled programs need more. A cell says what the fullest moment takes on each
chip, and the roofline of a step: if computing, memory and links all overlap, and if none do. --commands
prints the command of each cell instead.
"""

import dataclasses
import datetime
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from rich.progress import track

from rlhf_jax import distributed, models
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.axes import GATHERED_SAMPLING, axis_rules
from rlhf_jax.data.chat import encode_conversation, encode_prompt
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer
from rlhf_jax.distributed.accelerator_specs import CHIPS, roofline
from rlhf_jax.models import Preset, preset_config
from rlhf_jax.planning.analytic import analytic_plan
from rlhf_jax.planning.compiled import Plan
from rlhf_jax.planning.steps import Algorithm, Workload
from rlhf_jax.training.run_folder import write_model_files

# What a column is called: its topology, for the compiler, its chip, and how many of them.
SLICES = {
    "v5e-64": ("v5e:8x8", "TPU v5e", 64),
    "v5p-128": ("v5p:4x4x4", "TPU v5p", 64),
    "v6e-256": ("v6e:16x16", "TPU v6e", 256),
    "H100 x 8": ("h100:8", "H100 SXM", 8),
    "H200 x 8": ("h200:8", "H200 SXM", 8),
    "H100 x 64": ("h100:64", "H100 SXM", 64),
}
Way = Literal["full", "gathered", "LoRA"]
FLAGS: dict[Way, str] = {
    "full": "",
    "gathered": "--all-gather-params",
    "LoRA": "--adapter.kind lora --adapter.rank 16",
}
SAMPLING = ("grpo", "ppo")
GROUP_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      out: where cells are compiled, a run folder each.
      cells: what was compiled; these are not compiled again.
      models: rows.
      algorithms: of each model.
      ways: of each algorithm: full training, the same with parameters gathered for sampling, LoRA.
      slices: columns.
      rows_a_chip: of a step: conversations, pairs, or answers.
      length: tokens a row; of answers with their prompts.
      new_tokens: of an answer.
      compile: compile the cells that are missing.
      workers: cells at once.
      commands: print the command of each cell.
    """

    out: Path = Path("runs/plans")
    cells: Path = Path("docs/results/plans.json")
    models: tuple[Preset, ...] = ("llama-1b", "llama-8b", "llama-70b")
    algorithms: tuple[Algorithm, ...] = ("sft", "dpo", "grpo", "ppo")
    ways: tuple[Way, ...] = get_args(Way)
    slices: tuple[str, ...] = tuple(SLICES)
    rows_a_chip: int = 1
    length: int = 2048
    new_tokens: int = 512
    compile: bool = False
    workers: int = 1
    commands: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table."""

    model: Preset
    algorithm: Algorithm
    way: Way


def rows_of(options: Options) -> list[Row]:
    """All rows; parameters are gathered where something is sampled."""
    return [
        Row(model, algorithm, way)
        for model in options.models
        for algorithm in options.algorithms
        for way in options.ways
        if way != "gathered" or algorithm in SAMPLING
    ]


def mesh_of(model: str, chips: int) -> str:
    """Everything over fsdp, and the largest model four ways over tensor as well."""
    return f"fsdp={chips // 4},tensor=4" if model == "llama-70b" else f"fsdp={chips}"


def config_of(model: Preset) -> models.ModelConfig:
    """The preset as it is trained."""
    return preset_config(model, scan_layers=True, remat="full", compute_dtype="bfloat16")


def write_folders(options: Options) -> None:
    """Folders of the models, without weights, and rows that they are planned on."""
    tokenizer = byte_tokenizer()
    for name in options.models:
        policy = models.make_policy(config_of(name), None, tokenizer)
        write_model_files(options.out / name, policy, "policy")
        write_model_files(options.out / f"{name}_reward", policy, "reward_model")
    files.write_text(options.out / "rows.jsonl", 256 * (json.dumps(full_row(options, tokenizer)) + "\n"))


def full_row(options: Options, tokenizer: Tokenizer) -> dict[str, str]:
    """A prompt with an answer that fill their tokens, one for a character."""
    empty = {"role": "user", "content": ""}, {"role": "assistant", "content": ""}
    begin = len(encode_prompt(tokenizer, ""))
    end = sum(encode_conversation(tokenizer, empty).mask)  # the token that ends the turn
    answer = (options.new_tokens - end) * "2"
    prompt = (options.length - options.new_tokens - begin) * "1"
    return {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": answer.replace("2", "3")}


def folder_of(options: Options, row: Row, slice_name: str) -> Path:
    """The run folder of a cell."""
    return options.out / f"{row.model}_{row.algorithm}_{row.way}_{slice_name.replace(' ', '')}"


def command(options: Options, row: Row, slice_name: str) -> list[str]:
    """The words of a cell, behind `rlhf`."""
    topology, _, chips = SLICES[slice_name]
    rows, answers = options.rows_a_chip * chips, f"--max-new-tokens {options.new_tokens}"
    of_algorithm = {
        "sft": f"--batch-size {rows}",
        "dpo": f"--batch-size {rows}",
        "grpo": f"--batch-size {rows // GROUP_SIZE} --group-size {GROUP_SIZE} {answers} "
        "--rewards rlhf_jax.rewards.verifiers:exact_answer_reward",
        "ppo": f"--batch-size {rows} {answers} --reward-model {options.out / f'{row.model}_reward'}",
    }
    flags = [
        f"{row.algorithm} --plan {topology} --mesh {mesh_of(row.model, chips)}",
        f"--model {options.out / row.model} --data {options.out / 'rows.jsonl'}",
        f"--out {folder_of(options, row, slice_name)} --quiet",
        of_algorithm[row.algorithm],
        FLAGS[row.way],
    ]
    return shlex.split(" ".join(flags))


def read_cells(options: Options) -> dict[str, Any]:
    """What was compiled, by the names of the cells' folders."""
    return files.read_json(options.cells, otherwise={}, keys=())


def compile_cell(options: Options, row: Row, slice_name: str, lock: threading.Lock) -> None:
    """Plans the run of a cell, unless that was done, and writes down what it needs."""
    folder = folder_of(options, row, slice_name)
    with lock:
        if folder.name in read_cells(options):
            return
    words = [sys.executable, "-m", "rlhf_jax", *command(options, row, slice_name)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        print(f"{folder.name}: {reason}", file=sys.stderr)
        return
    with lock:
        cells = {**read_cells(options), folder.name: cell_of(files.read_json(folder / "plan.json"))}
        files.write_json(options.cells, dict(sorted(cells.items())))


def cell_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the table keeps of a plan."""
    return {
        "peak_bytes": plan["peak_bytes"],
        "programs": {
            name: {"seconds": program["roofline_seconds"], "complaints": len(program["complaints"])}
            for name, program in plan["programs"].items()
        },
        "jax": plan["jax"],
        "date": datetime.date.today().isoformat(),
    }


def predicted_by_formula(options: Options, row: Row, slice_name: str) -> Plan:
    """What is said of a cell of full training that was not compiled."""
    chips = SLICES[slice_name][2]
    sizes = options.rows_a_chip * chips, options.length, options.new_tokens
    with axis_rules(GATHERED_SAMPLING if row.way == "gathered" else {}):
        return analytic_plan(
            Workload(row.algorithm, config_of(row.model), *sizes),
            distributed.abstract_mesh(mesh_of(row.model, chips)),
        )


def text(options: Options, row: Row, slice_name: str) -> str:
    """What the table says of one cell."""
    [chip] = [chip for chip in CHIPS if chip.name == SLICES[slice_name][1]]
    cell = read_cells(options).get(folder_of(options, row, slice_name).name)
    times: list[Any]
    if cell is not None:
        mark, need = "", cell["peak_bytes"]
        times = [list(program["seconds"].values()) for program in cell["programs"].values()]
    elif row.way == "LoRA":
        return "not compiled"
    else:
        by_formula = predicted_by_formula(options, row, slice_name)
        mark, need = ">= ", by_formula.peak_bytes
        times = [
            list(
                roofline(chip, flops=p.flops, memory_bytes=p.traffic_bytes, sent_bytes=p.sent_bytes).values()
            )
            for p in by_formula.programs.values()
        ]
    if need is None:
        return f"{mark}no room, the compiler says"
    excess = (need - chip.memory_bytes) / 2**30
    if excess > 0:
        return f"no: {mark}{need / 2**30:.0f} GiB, {excess:.1f} too much"
    least, most = (
        f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (sum(map(max, times)), sum(map(sum, times)))
    )
    return f"{mark}{need / 2**30:.1f} GiB, {least} to {most} s"


def run(options: Options) -> None:
    """Compiles what is missing, if asked to, and prints the table."""
    rows = rows_of(options)
    if options.commands:
        for row in rows:
            for name in options.slices:
                print(shlex.join(["rlhf", *command(options, row, name)]))
        return
    if options.compile:
        write_folders(options)
        cells = [(row, name) for row in rows for name in options.slices]
        lock = threading.Lock()
        with ThreadPoolExecutor(options.workers) as pool:
            made = pool.map(lambda cell: compile_cell(options, cell[0], cell[1], lock), cells)
            for _ in track(made, description="compiling", total=len(cells), transient=True):
                pass
    print("| | | " + " | ".join(options.slices) + " |\n|---|---|" + "---|" * len(options.slices))
    for row in rows:
        said = " | ".join(text(options, row, name) for name in options.slices)
        way = "" if row.way == "full" else f", {row.way}"
        print(f"| {row.model} | {row.algorithm.upper()}{way} | {said} |", flush=True)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
