"""Memory and compute planner: the programs of a step (`planning.steps`), compiled ahead of time.

No array is ever made: neither the devices nor the weights need be there.
"""

import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.planning import hlo_analysis, hlo_collectives
from rlhf_jax.planning.steps import Program, Step, build, cache_bytes, device_bytes


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted cost of a compiled program, on each device and in one call.

    Attributes:
      argument_bytes: what it is called with.
      output_bytes: results beyond those that take over an argument's memory.
      temporary_bytes: activations, gradients, buffers.
      flops: of matrix products, what is computed again included, if all devices share evenly.
      traffic_bytes: read from and written to the device's memory.
      collectives: kind -> (how often, bytes that a device receives).
      compile_seconds: spent here.
      complaints: what the partitioner warned of.
      too_big: what the compiler said, where it found no room; traffic and collectives are not known then.
    """

    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    flops: float
    traffic_bytes: float
    collectives: dict[str, tuple[int, float]]
    compile_seconds: float
    complaints: tuple[str, ...] = ()
    too_big: str = ""

    @property
    def sent_bytes(self) -> float:
        """By all kinds of collectives together; NaN where they are not known."""
        return math.nan if self.too_big else sum(sent for _, sent in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a run on one device of a mesh.

    Attributes:
      resident: part -> bytes that are there all the time.
      programs: name -> prediction.
      kv_cache_bytes: of all answers' keys and values; part of generation's temporary memory.
      by_formula: nothing was compiled; the memory is what is needed at least.
    """

    resident: dict[str, float]
    programs: dict[str, Prediction]
    kv_cache_bytes: float
    by_formula: bool = False

    @property
    def peak_bytes(self) -> float:
        """The most that is held at a time: what is resident, and the largest program beside it."""
        held = sum(self.resident.values())
        return held + max(p.temporary_bytes + p.output_bytes for p in self.programs.values())

    @property
    def too_big(self) -> str:
        """Out-of-memory message of the compiler; empty where there was room."""
        return next((p.too_big for p in self.programs.values() if p.too_big), "")


def predict(program: Program, mesh: Mesh, keep: Path | None = None) -> Prediction:
    """Compiles a program for the devices of the mesh and reads what came of it.

    Args:
      keep: where the compiled program's text is written.

    Raises:
      UserError: the compiler fails, for another reason than that there is no room.
    """
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            program.function, donate_argnums=program.donated, out_shardings=program.out_shardings
        )
        traced = jitted.trace(*program.arguments)
        flops = hlo_analysis.matmul_flops(traced.jaxpr, while_trips=program.trips) / mesh.size
        began = time.perf_counter()
        with _captured_errors() as said:
            try:
                compiled = traced.lower().compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    kind = mesh.devices.flat[0].device_kind
                    raise UserError(
                        f"the compiler of {kind} fails on this program, so that nothing can be said of it "
                        f"({_shorten(str(error))}): other sizes, or --dtype bfloat16, may compile"
                    ) from error
                compiled, refusal = None, str(error)
            else:
                refusal = ""
        seconds = time.perf_counter() - began
    complaints = tuple(line for line in said if "rematerialization" in line.lower())
    arguments = device_bytes(program.arguments)
    if compiled is None:
        extra = _wanted_bytes(refusal, arguments)
        return Prediction(arguments, 0, extra, flops, math.nan, {}, seconds, complaints, _shorten(refusal))
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    if keep is not None:
        files.write_text(keep, text)
    return Prediction(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=flops,
        traffic_bytes=hlo_analysis.memory_traffic(hlo_analysis.HloModule(text), program.trips),
        collectives=hlo_collectives.by_kind(hlo_collectives.collectives(text, program.trips)),
        compile_seconds=seconds,
        complaints=complaints,
    )


def make_plan(step: Step, mesh: Mesh, keep: Path | None = None) -> Plan:
    """Compiles all programs of a step; their texts go to the folder `keep`."""
    resident, found = build(step, mesh)
    predictions = {
        name: predict(program, mesh, keep and keep / f"{name}.hlo.txt") for name, program in found.items()
    }
    return Plan(resident, predictions, cache_bytes(step.generation, mesh))


_WANTED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]")
_TEMPORARY = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def _wanted_bytes(refusal: str, arguments: float) -> float:
    """Temporary bytes that a program would have used, by what the compiler said when it refused."""
    if found := _TEMPORARY.search(refusal):
        return float(found[1]) * _UNITS[found[2]]
    found = _WANTED.search(refusal)
    return float(found[1]) * _UNITS[found[2]] - arguments if found else math.nan


def _shorten(refusal: str) -> str:
    found = _TEMPORARY.search(refusal) or _WANTED.search(refusal)
    return f"the compiler found no room: {found[0]}" if found else refusal.splitlines()[0][:160]


@contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """Lines that the compiler, which is no Python, writes to standard error."""
    lines: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines += caught.read().splitlines()
