"""Will it fit, and how fast can it be at best? The real update and generation, compiled ahead of time.

    rlhf plan --model llama-8b --algo grpo --mesh fsdp=64 --topology v5e:8x8 --batch 64
    rlhf plan --model ~/Llama-3.1-8B --algo sft --mesh fsdp=8 --batch 16    # for the devices here
    rlhf plan --model llama-8b --algo grpo --mesh fsdp=8 --topology h100:8 --batch 64
    rlhf plan --model llama-8b --algo dpo --mesh fsdp=8 --chip h100 --batch 64    # on paper

With --topology the compiler of TPUs or of NVIDIA GPUs (pip install 'rlhf_jax[tpu-plan]' or
'rlhf_jax[gpu-plan]', Linux) compiles for devices that are not there; without it the program is compiled for
the devices at hand; with --chip nothing is compiled, and memory and traffic are counted on paper
(`planning.analytic`). No weight is read or made. cuDNN's attention needs a GPU at hand: plans for GPUs have
attention in blocks, which takes more memory and time.

Everything printed is predicted, not measured.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from rich.console import Console
from rich.table import Table

from rlhf_jax import distributed, models
from rlhf_jax.core import files
from rlhf_jax.core.axes import GATHERED_SAMPLING, axis_rules
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Length, PositiveInt
from rlhf_jax.distributed.accelerator_specs import CHIPS, Chip, chip_of, roofline
from rlhf_jax.metrics.progress import format_seconds
from rlhf_jax.models import hf
from rlhf_jax.planning import compiled
from rlhf_jax.planning.analytic import analytic_plan
from rlhf_jax.planning.topologies import topology_devices
from rlhf_jax.stages import option_checks
from rlhf_jax.training.run_folder import read_architecture

DType = Literal["float32", "bfloat16"]
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan.

    Attributes:
      model: llama-1b, llama-8b, llama-70b (shapes of Llama 3), or a Hugging Face or run folder, of which only
        the description is read.
      algo: whose step.
      mesh: as in the scripts: fsdp=64, or data=2,fsdp=8,tensor=4.
      topology: the slice of TPUs, its shape in chips: v5e:8x8, v5p:4x4x4; or NVIDIA GPUs and how many:
        h100:8, h200:64, b200:8; empty for the devices here.
      chip: make the plan by formula, for this kind of chip, and compile nothing.
      batch: rows a step: conversations of SFT, pairs of DPO, answers of GRPO and PPO.
      length: tokens a row; of GRPO and PPO, prompt and answer together.
      new_tokens: of an answer, where answers are sampled.
      group_size: answers to each prompt of GRPO.
      micro_batches: parts in which a mini-batch is computed.
      num_minibatches: optimizer steps of GRPO and PPO in each pass over a batch.
      num_ppo_epochs: passes of GRPO and PPO over each batch.
      all_gather_params: sample with parameters made whole along fsdp once a batch of answers, as the scripts
        do with --all-gather-params.
      remat: what the backward pass computes again.
      param_dtype: of parameters and of the optimizer's moments.
      compute_dtype: of matrix products and activations.
      json: write the plan as JSON to this file; - for standard output, and nothing else.
      hlo: write the compiled programs' texts into this folder.
    """

    model: str = "llama-1b"
    algo: compiled.Algorithm = "sft"
    mesh: str = "auto"
    topology: str = ""
    chip: Literal["", "v4", "v5e", "v5p", "v6e", "a100", "h100", "h200"] = ""
    batch: PositiveInt = 64
    length: Length = 2048
    new_tokens: Length = 512
    group_size: PositiveInt = 8
    micro_batches: PositiveInt = 1
    num_minibatches: PositiveInt = 1
    num_ppo_epochs: PositiveInt = 1
    all_gather_params: bool = False
    remat: models.Remat = "full"
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    json: str = ""
    hlo: str = ""


def read_config(options: Options) -> models.ModelConfig:
    """The architecture, its layers stacked: a deep model compiles as fast as a shallow one.

    Raises:
      UserError: there is no such preset or folder.
    """
    chosen = {
        "param_dtype": options.param_dtype,
        "compute_dtype": options.compute_dtype,
        "remat": options.remat,
        "scan_layers": True,
    }
    if options.model in get_args(models.Preset):
        return models.preset_config(options.model, **chosen)  # pyright: ignore[reportArgumentType]
    folder = files.as_path(options.model)
    if not files.is_folder(folder):
        presets = ", ".join(get_args(models.Preset))
        raise UserError(f"--model {options.model}: no such folder, and no preset: give one, or {presets}")
    if files.is_file(folder / "model.json"):
        config = read_architecture(folder)
    else:
        config = hf.load_config(folder)
    return dataclasses.replace(config, **chosen)


def workload(options: Options) -> compiled.Workload:
    """What a step does.

    Raises:
      UserError: numbers that do not fit each other.
    """
    option_checks.check_numbers(options)
    parts = options.micro_batches * (options.num_minibatches if options.algo in ("grpo", "ppo") else 1)
    if options.batch % parts:
        raise UserError(
            f"--batch {options.batch} cannot be computed in {parts} equal parts: change one of them"
        )
    if options.algo in ("grpo", "ppo") and options.new_tokens >= options.length:
        raise UserError(
            f"--new-tokens {options.new_tokens} leaves nothing of --length {options.length} for the prompt: "
            "lower it, or raise the length"
        )
    if options.algo == "grpo" and options.batch % options.group_size:
        raise UserError(f"--batch {options.batch} is no multiple of --group-size {options.group_size}")
    return compiled.Workload(
        options.algo,
        read_config(options),
        options.batch,
        options.length,
        options.new_tokens,
        options.group_size,
        options.micro_batches,
        options.num_minibatches,
        options.num_ppo_epochs,
    )


def chosen_chip(options: Options) -> Chip | None:
    """The chip that is named; None where none is."""
    words = ((chip, chip.name.lower().split()) for chip in CHIPS)
    return next((chip for chip, names in words if options.chip in names), None)


def mesh_of(options: Options) -> jax.sharding.Mesh:
    """The mesh, of devices that are here or of a slice that is not.

    Raises:
      UserError: the mesh does not use the whole slice.
    """
    if not options.topology:
        return distributed.make_mesh(options.mesh)
    devices = topology_devices(options.topology)
    mesh = distributed.make_mesh(options.mesh, devices=devices)
    if mesh.size != len(devices):
        raise UserError(
            f"--mesh {options.mesh} uses {mesh.size} of the {len(devices)} devices of --topology "
            f"{options.topology}: give sizes whose product is {len(devices)}, or a smaller slice"
        )
    return mesh


def make_plan(options: Options) -> tuple[compiled.Plan, Mesh, Chip | None]:
    """By formula or by the compiler; also where, and for which chip.

    Raises:
      UserError: what was asked for does not go together.
    """
    step, chip = workload(options), chosen_chip(options)
    if chip is None:
        devices = mesh_of(options)
        plan = compiled.make_plan(step, devices, Path(options.hlo) if options.hlo else None)
        return plan, devices, chip_of(devices.devices.flat[0].device_kind)
    if options.topology:
        raise UserError("--chip goes by formula and excludes --topology: give one of them")
    mesh = distributed.abstract_mesh(options.mesh)
    return analytic_plan(step, mesh), mesh, chip


# What is said --------------------------------------------------------------------------------------


def verdict(plan: compiled.Plan, chip: Chip | None) -> str:
    """Whether it fits, and by how much."""
    need = plan.peak_bytes
    if chip is None:
        return f"Needs {gib(need)} on each device, whose memory is not known here."
    free = chip.memory_bytes - need
    of = f"{gib(need)} of {gib(chip.memory_bytes)} on each device"
    return f"Fits: {of}, {gib(free)} free." if free >= 0 else f"Does not fit: {of}, {gib(-free)} too much."


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB"


def memory_table(plan: compiled.Plan) -> Table:
    """Memory by part."""
    table = Table("on each device", "GiB", title="Memory, predicted")
    for name, count in plan.resident.items():
        table.add_row(name, f"{count / 2**30:.3f}")
    for name, program in plan.programs.items():
        extra = program.temporary_bytes + program.output_bytes
        what = "activations, gradients, buffers" if name == "update" else "buffers"
        cache = f", of which about {plan.kv_cache_bytes / 2**30:.3f} KV cache" if name == "generation" else ""
        table.add_row(f"{name}: {what}{cache}", f"{extra / 2**30:.3f}")
    table.add_row("the most at a time", f"{plan.peak_bytes / 2**30:.3f}", style="bold")
    return table


def work_table(plan: compiled.Plan, chip: Chip | None) -> Table:
    """What each program computes and moves, and the least time that takes."""
    names = list(plan.programs)
    table = Table("each device, one step", *names, title="Work, predicted")
    parts = plan.programs.values()
    table.add_row("matrix products, TFLOP", *(f"{p.flops / 1e12:,.2f}" for p in parts))
    table.add_row("memory read and written, GB", *(f"{p.traffic_bytes / 1e9:,.2f}" for p in parts))
    for kind in sorted({kind for p in parts for kind in p.collectives}):
        counts = (p.collectives.get(kind, (0, 0.0)) for p in parts)
        table.add_row(kind, *(f"{count:,} x, {sent / 1e9:,.3f} GB" for count, sent in counts))
    table.add_row("compiled in", *(format_seconds(p.compile_seconds) for p in parts))
    if chip is not None:
        for kind in ("compute", "memory", "communication"):
            table.add_row(
                f"least time for {kind}", *(format_seconds(least_seconds(p, chip)[kind]) for p in parts)
            )
        bounds = [least_seconds(p, chip).values() for p in parts]
        table.add_row(
            "roofline: all overlap - none do",
            *(f"{format_seconds(max(b))} - {format_seconds(sum(b))}" for b in bounds),
            style="bold",
        )
    return table


def devices_of(mesh: Mesh, chip: Chip | None) -> str:
    """What the devices are called."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0].device_kind
    return chip.name if chip else "none"


def least_seconds(program: compiled.Prediction, chip: Chip) -> dict[str, float]:
    """The roofline of one program."""
    return roofline(
        chip, flops=program.flops, memory_bytes=program.traffic_bytes, sent_bytes=program.sent_bytes
    )


def to_json(options: Options, plan: compiled.Plan, mesh: Mesh, chip: Chip | None) -> dict[str, Any]:
    """All of it as JSON types."""
    return {
        "predicted": True,
        "options": dataclasses.asdict(options),
        "devices": mesh.size,
        "device_kind": devices_of(mesh, chip),
        "by_formula": bool(options.chip),
        "chip": chip and dataclasses.asdict(chip),
        "fits": None if chip is None or math.isnan(plan.peak_bytes) else plan.peak_bytes <= chip.memory_bytes,
        "peak_bytes": plan.peak_bytes,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "resident_bytes": plan.resident,
        "programs": {
            name: {
                **dataclasses.asdict(program),
                "roofline_seconds": chip and least_seconds(program, chip),
            }
            for name, program in plan.programs.items()
        },
        "jax": jax.__version__,
    }


def show(options: Options, plan: compiled.Plan, mesh: Mesh, chip: Chip | None) -> None:
    """Prints the plan."""
    console = Console()
    console.print(
        f"{options.model}, {options.algo}: {options.batch:,} rows x {options.length:,} tokens a step on "
        f"{distributed.describe_mesh(mesh)}\nPredicted, not measured{', by formula' * bool(options.chip)}.",
        highlight=False,
    )
    console.print(verdict(plan, chip), style="bold", highlight=False)
    if plan.too_big:
        console.print(f"({plan.too_big}; it says no more of such a program)", highlight=False)
    console.print(memory_table(plan))
    console.print(work_table(plan, chip))
    if chip is not None:
        console.print(f"Peaks of {chip.name}: {chip.source}", highlight=False)
    for name, program in plan.programs.items():
        for line in program.complaints:
            console.print(f"warning, {name}: {line}", highlight=False)


def run(options: Options) -> None:
    """Compiles, and prints the plan."""
    if options.topology:  # whatever is here is not asked for
        jax.config.update("jax_platforms", "cpu")
    with axis_rules(GATHERED_SAMPLING if options.all_gather_params else {}):
        plan, mesh, chip = make_plan(options)
    if options.json:
        text = json.dumps(to_json(options, plan, mesh, chip), indent=2)
        if options.json == "-":
            print(text)
            return
        files.write_text(options.json, text + "\n")
    show(options, plan, mesh, chip)
