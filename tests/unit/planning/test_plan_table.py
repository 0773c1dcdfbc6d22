"""The table of plans: each cell has a command that its stage takes, for as many devices as its slice has."""

import importlib
import itertools
import subprocess
import threading
from pathlib import Path

import jax
import plan_table
import pytest
from tiers import few

from rlhf_jax import distributed
from rlhf_jax.cli.parsing import parse
from rlhf_jax.core import files
from rlhf_jax.planning import steps


def test_every_row_has_a_command_and_every_slice_its_devices():
    options = plan_table.Options()
    rows = plan_table.rows_of(options)
    assert len(rows) == 3 * (2 + 2 + 3 + 3)
    cells = [(row, "H100 x 8") for row in rows[:10]]  # those of a model: the others' differ in names alone
    cells += [(rows[-1], name) for name in plan_table.SLICES]
    for row, name in cells:
        stage = importlib.import_module(f"rlhf_jax.stages.{row.algorithm}")
        topology, _, chips = plan_table.SLICES[name]
        algorithm, *words = plan_table.command(options, row, name)
        parsed = parse(stage.Options, words)
        assert algorithm == row.algorithm
        assert parsed.run.plan == topology
        assert distributed.abstract_mesh(parsed.run.mesh).size == chips
        assert parsed.adapter.kind == ("lora" if row.way == "LoRA" else "none")
    folders = {plan_table.folder_of(options, row, name) for row in rows for name in plan_table.SLICES}
    assert len(folders) == len(rows) * len(plan_table.SLICES)


CELLS = list(itertools.product(["sft", "dpo", "grpo", "ppo"], ["full", "LoRA"]))


@pytest.mark.parametrize(("algorithm", "way"), few(CELLS, ("sft", "full"), ("grpo", "LoRA")))
def test_the_plan_of_a_cell_has_its_sizes(tmp_path, algorithm, way):
    options = plan_table.Options(out=tmp_path, models=("llama-1b",))
    plan_table.write_folders(options)
    row = plan_table.Row("llama-1b", algorithm, way)
    stage = importlib.import_module(f"rlhf_jax.stages.{algorithm}")
    _, *words = plan_table.command(options, row, "H100 x 8")
    _, step = stage.planned_step(parse(stage.Options, words))
    assert next(leaf.shape for leaf in jax.tree.leaves(step.rows) if leaf.ndim == 2) == (8, 2048)
    assert (step.generation is not None) == (algorithm in ("grpo", "ppo"))
    held, _ = steps.build(step, distributed.abstract_mesh("fsdp=8"))
    assert ("frozen base" in held) == (way == "LoRA")
    assert ("reward model" in held) == (algorithm == "ppo")


def test_cells_say_what_was_compiled_and_by_formula_what_was_not(tmp_path):
    options = plan_table.Options(out=tmp_path, cells=tmp_path / "cells.json")
    full, lora = (plan_table.Row("llama-8b", "sft", way) for way in ("full", "LoRA"))
    assert plan_table.text(options, lora, "H100 x 8") == "not compiled"
    assert plan_table.text(options, full, "H100 x 8").startswith(">= ")
    times = {"compute": 1.0, "memory": 2.0, "communication": 0.5}
    programs = {"update": {"roofline_seconds": times, "complaints": []}}
    said = {90 * 2**30: "no: 90 GiB", 2**30: "1.0 GiB, 2 to 3.5 s", None: "no room, the compiler says"}
    for peak_bytes, words in said.items():
        plan = {"peak_bytes": peak_bytes, "programs": programs, "jax": jax.__version__}
        name = plan_table.folder_of(options, lora, "H100 x 8").name
        files.write_json(options.cells, {name: plan_table.cell_of(plan)})
        assert plan_table.text(options, lora, "H100 x 8").startswith(words)


def test_what_was_compiled_needs_more_than_the_formula_says():
    options = plan_table.Options(cells=Path(__file__).parents[3] / "docs" / "results" / "plans.json")
    cells = plan_table.read_cells(options)
    compiled = 0
    for row in plan_table.rows_of(options):
        for name in plan_table.SLICES if row.way == "full" else ():
            cell = cells.get(plan_table.folder_of(options, row, name).name)
            if cell is not None and cell["peak_bytes"] is not None:
                least = plan_table.predicted_by_formula(options, row, name).peak_bytes
                assert cell["peak_bytes"] > least, (row, name)
                compiled += 1
    assert compiled == 72


def test_a_cell_is_compiled_once_and_written_down(tmp_path, monkeypatch):
    options = plan_table.Options(out=tmp_path, cells=tmp_path / "cells.json")
    row, asked = plan_table.Row("llama-1b", "sft", "full"), []

    def compiled(words, **_):
        asked.append(words)
        plan = {"peak_bytes": 1.0, "programs": {}, "jax": jax.__version__}
        files.write_json(plan_table.folder_of(options, row, "v5e-64") / "plan.json", plan)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compiled)
    for _ in range(2):
        plan_table.compile_cell(options, row, "v5e-64", threading.Lock())
    assert len(asked) == len(plan_table.read_cells(options)) == 1
