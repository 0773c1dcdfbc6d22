"""Plans for people and as JSON: memory by part, work by program, rooflines, and whether it fits."""

import dataclasses
import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from rlhf_jax import distributed
from rlhf_jax.distributed.accelerator_specs import Chip, roofline
from rlhf_jax.metrics.progress import format_seconds
from rlhf_jax.planning import compiled
from rlhf_jax.stages import option_checks

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def verdict(plan: compiled.Plan, chip: Chip | None) -> str:
    """Verdict on memory: whether it fits, and by how much."""
    need = plan.peak_bytes
    if math.isnan(need):
        return "Does not fit: the compiler found no room, and did not say how much it wants."
    if chip is None:
        return f"Needs {gib(need)} on each device, whose memory is not known here."
    free = chip.memory_bytes - need
    of = f"{'at least ' * plan.by_formula}{gib(need)} of {gib(chip.memory_bytes)} on each device"
    if plan.by_formula and free >= 0:
        return f"May fit: {of}; compiled programs need more, and --topology says how much."
    return f"Fits: {of}, {gib(free)} free." if free >= 0 else f"Does not fit: {of}, {gib(-free)} too much."


def gib(count: float) -> str:
    """Bytes of memory for people: GiB, or MiB and KiB for less than a tenth; a dash where not known."""
    if math.isnan(count):
        return "-"
    unit, size = next(
        ((unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20)) if count >= size / 10),
        ("KiB", 2**10),
    )
    return f"{count / size:,.2f} {unit}"


def amount(count: float, unit: str) -> str:
    """A number of `unit`, such as FLOP, by thousands: `1.20 TFLOP`; a dash where it is not known."""
    if math.isnan(count):
        return "-"
    power = next((n for n in (4, 3, 2, 1) if count >= 1000**n), 0)
    return f"{count / 1000**power:,.2f} {' kMGT'[power].strip()}{unit}"


def memory_table(plan: compiled.Plan) -> Table:
    """Memory by part."""
    table = Table("on each device", "memory", title="Memory, predicted")
    for name, count in plan.resident.items():
        table.add_row(name, gib(count))
    for name, program in plan.programs.items():
        extra = program.temporary_bytes + program.output_bytes
        what = "activations, gradients, buffers" if name == "update" else "buffers"
        cache = f", of which about {gib(plan.kv_cache_bytes)} KV cache" if name == "generation" else ""
        table.add_row(f"{name}: {what}{cache}", gib(extra))
    table.add_row("the most at a time", gib(plan.peak_bytes), style="bold")
    return table


def work_table(plan: compiled.Plan, chip: Chip | None) -> Table:
    """Roofline table: what each program computes and moves, and the least time that takes."""
    names = list(plan.programs)
    table = Table("each device, one step", *names, title="Work, predicted")
    parts = plan.programs.values()
    table.add_row("matrix products", *(amount(p.flops, "FLOP") for p in parts))
    table.add_row("memory read and written", *(amount(p.traffic_bytes, "B") for p in parts))
    for kind in sorted({kind for p in parts for kind in p.collectives}):
        counts = (p.collectives.get(kind, (0, math.nan)) for p in parts)
        table.add_row(kind, *(f"{count:,} x, " * (count > 0) + amount(sent, "B") for count, sent in counts))
    if not plan.by_formula:
        table.add_row("compiled in", *(format_seconds(p.compile_seconds) for p in parts))
    if chip is not None:
        for kind in ("compute", "memory", "communication"):
            least = (least_seconds(p, chip)[kind] for p in parts)
            table.add_row(f"least time for {kind}", *(_seconds(one) for one in least))
        bounds = [least_seconds(p, chip).values() for p in parts]
        table.add_row(
            "roofline: all overlap - none do",
            *("-" if math.isnan(sum(b)) else f"{_seconds(max(b))} - {_seconds(sum(b))}" for b in bounds),
            style="bold",
        )
    return table


def _seconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else format_seconds(seconds)


def devices_of(mesh: Mesh, chip: Chip | None) -> str:
    """Name of the devices."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0].device_kind
    return chip.name if chip else "none"


def least_seconds(program: compiled.Prediction, chip: Chip) -> dict[str, float]:
    """The roofline of one program."""
    return roofline(
        chip, flops=program.flops, memory_bytes=program.traffic_bytes, sent_bytes=program.sent_bytes
    )


def to_json(options: Any, plan: compiled.Plan, mesh: Mesh, chip: Chip | None) -> dict[str, Any]:
    """All of it as JSON types; None for what the compiler did not say.

    Args:
      options: what was planned, as a dataclass.
    """
    fits = False if math.isnan(plan.peak_bytes) else None  # refused, without a number
    if chip is not None and fits is None:
        fits = plan.peak_bytes <= chip.memory_bytes
        fits = None if plan.by_formula and fits else fits  # the formula is a lower bound
    said = {
        "predicted": True,
        "options": option_checks.to_json(options),
        "devices": mesh.size,
        "device_kind": devices_of(mesh, chip),
        "by_formula": plan.by_formula,
        "chip": chip and dataclasses.asdict(chip),
        "fits": fits,
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
    return jax.tree.map(lambda x: None if isinstance(x, float) and math.isnan(x) else x, said)


def show(title: str, plan: compiled.Plan, mesh: Mesh, chip: Chip | None) -> None:
    """Prints the plan of what `title` says."""
    console = Console()
    console.print(
        f"{title} on {distributed.describe_mesh(mesh, devices_of(mesh, chip))}\n"
        f"Predicted, not measured{', by formula' * plan.by_formula}.",
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
