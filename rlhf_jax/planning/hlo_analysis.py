"""Analysis of programs: floating-point operations as traced; as compiled, what runs how often, and bytes of
memory that it reads and writes.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(pred|bf16|f8\w+|[a-z]\d+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|condition|called_computations)=\{?%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")


class Array(NamedTuple):
    """One array as the text spells it: shape, bytes, and whether it lies in the device's main memory."""

    shape: tuple[int, ...]
    nbytes: float
    in_memory: bool


class Instruction(NamedTuple):
    """One instruction that runs `times` in one call of the program.

    Attributes:
      line: its text.
      scope: the computation in which it stands; that of the caller where it was fused.
      fused: whether it is part of another instruction.
    """

    line: str
    scope: str
    fused: bool
    times: int


class HloModule:
    """The text of a compiled program (`compiled.as_text()`), and a walk over what it runs."""

    def __init__(self, text: str) -> None:
        self.bodies: dict[str, list[str]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            start = _COMPUTATION.match(line)
            if start:
                name = start[2]
                self.bodies[name] = []
                self.entry = name if start[1] else self.entry
            elif name:
                self.bodies[name].append(line)

    def walk(self, unknown_trips: int = 1) -> Iterator[Instruction]:
        """Every instruction, those of loops as often as the loops go round.

        Args:
          unknown_trips: rounds of loops whose number the text does not tell.
        """
        yield from self._walk(self.entry, self.entry, False, 1, unknown_trips)

    def _walk(self, name: str, scope: str, fused: bool, times: int, unknown: int) -> Iterator[Instruction]:
        for line in self.bodies.get(name, ()):
            yield Instruction(line, scope, fused, times)
            inner = times * self._trips(line, unknown)
            inside = fused or " fusion(" in line or " custom-call(" in line
            for called in called_by(line):
                yield from self._walk(called, scope if inside else called, inside, inner, unknown)

    def _trips(self, line: str, unknown: int) -> int:
        if " while(" not in line:
            return 1
        if said := _TRIPS.search(line):
            return int(said[1])
        condition = _CONDITION.search(line)
        lines = self.bodies.get(condition[1], []) if condition else []
        # Scans count from 0 to a constant; what stops for another reason has more in its condition.
        limits = [found[1] for found in map(_LIMIT.search, lines) if found]
        counts = any("ROOT" in line and "direction=LT" in line for line in lines)
        return int(limits[0]) if counts and len(limits) == 1 else unknown


def called_by(line: str) -> list[str]:
    """Names of the computations that an instruction runs."""
    names: list[str] = []
    for single, several in _CALLED.findall(line):
        names += [single] if single else [name.strip().lstrip("%") for name in several.split(",")]
    return names


def arrays_of(text: str) -> list[Array]:
    """The arrays that a type names: `(bf16[2,4]{1,0}, s32[])`."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in dims.split(",") if size)
        # S(1) and above are on the chip itself, S(5) is the host's.
        found.append(Array(shape, _item_bytes(dtype) * math.prod(shape), "S(" not in layout))
    return found


def _item_bytes(dtype: str) -> float:
    if dtype == "pred" or dtype.startswith("f8"):
        return 1
    return 2 if dtype == "bf16" else int(re.sub(r"\D.*", "", dtype[1:])) / 8


# Operations ----------------------------------------------------------------------------------------


def matmul_flops(jaxpr: Any, *, while_trips: int = 1) -> float:
    """Floating-point operations of all matrix products of a traced program (`jit(...).trace(...).jaxpr`), on
    all devices together, what the backward pass computes again included.

    Kernels count every block of their grid, also those that they skip; of branches, the dearest counts.

    Args:
      while_trips: rounds of `while` loops, whose number the trace does not tell.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = [matmul_flops(sub, while_trips=while_trips) for sub in _inner(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                contracted = equation.params["dimension_numbers"][0][0]
                shape = equation.invars[0].aval.shape
                total += (
                    2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[a] for a in contracted)
                )
            case "scan":
                total += equation.params["length"] * sum(inner)
            case "while":
                total += while_trips * sum(inner)
            case "cond":
                total += max(inner, default=0.0)
            case "pallas_call":
                total += math.prod(equation.params["grid_mapping"].grid) * sum(inner)
            case "shard_map":
                total += equation.params["mesh"].size * sum(inner)
            case _:
                total += sum(inner)
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs within an equation."""
    nested = [
        item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])
    ]
    return [item for item in nested if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns")]


# Memory traffic ------------------------------------------------------------------------------------

# What moves nothing by itself.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "iota", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update"),
)


def memory_traffic(program: HloModule, unknown_trips: int = 1) -> float:
    """Bytes of main memory that a device reads and writes in one call: operands and results of every
    instruction that is not fused. Of an array that is only sliced, or updated in place, the slice counts.
    """
    parsed = {name: [_parse(line) for line in lines] for name, lines in program.bodies.items()}
    types = {name: {p[0]: p[1] for p in lines if p} for name, lines in parsed.items()}
    total = 0.0
    for instruction in program.walk(unknown_trips):
        if instruction.fused:
            continue
        found = _parse(instruction.line)
        if found is None or found[2] in _FREE or found[2].endswith("-done"):
            continue
        total += instruction.times * _moved(found, types[instruction.scope], parsed, instruction.line)
    return total


Parsed = tuple[str, str, str, list[str]]


def _parse(line: str) -> Parsed | None:
    """(name, type, operation, operands) of an instruction's line."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest, depth, end = match[2], 0, 0
    for end, letter in enumerate(rest):  # noqa: B007
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            break
    operation, _, behind = rest[end + 1 :].partition("(")
    inside = behind.partition(")")[0]
    operands = [inside] if operation == "parameter" else re.findall(r"%([\w.\-]+)", inside)
    return match[1], rest[:end], operation, operands


def _moved(found: Parsed, types: dict[str, str], parsed: dict[str, list[Parsed | None]], line: str) -> float:
    _, result, operation, operands = found
    sizes = [_memory_bytes(types.get(name, "")) for name in operands]
    written = _memory_bytes(result)
    if operation in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if operation in ("dynamic-update-slice", "scatter"):
        return 2 * (sizes[1] if operation == "dynamic-update-slice" else sizes[-1])
    if operation in ("copy-start", "slice-start"):  # their results hold what they read beside what they write
        return 2 * min(array.nbytes for array in arrays_of(result)[:2])
    if operation == "fusion":
        for called in called_by(line):
            return _fused_moved(sizes, written, [p for p in parsed.get(called, []) if p])
    return sum(sizes) + written


def _fused_moved(sizes: list[float], written: float, body: list[Parsed]) -> float:
    """Traffic of a fusion: parameters only sliced count as their slices, updates in place as the updates."""
    by_name = {line[0]: line for line in body}
    views = ("bitcast", "copy", "reshape")

    def origin(name: str) -> str:
        while name in by_name and by_name[name][2] in views:
            name = by_name[name][3][0]
        return name

    def whole(name: str) -> float:
        return sum(array.nbytes for array in arrays_of(by_name[name][1])) if name in by_name else 0.0

    used: dict[str, float] = {}
    in_place = 0.0
    for name, _, operation, operands in body:
        for place, operand in enumerate(operands if operation not in (*views, "parameter") else ()):
            source = origin(operand)
            part = whole(source)
            if operation in ("dynamic-slice", "gather", "slice") and place == 0:
                part = min(part, whole(name))
            elif operation == "dynamic-update-slice" and place == 0:
                part = whole(operands[1])
                if by_name.get(source, ("", "", ""))[2] == "parameter":
                    in_place += whole(source) - part
            used[source] = used.get(source, 0.0) + part
    read = sum(
        min(sizes[int(operands[0])], used.get(name, 0.0))
        for name, _, operation, operands in body
        if operation == "parameter" and int(operands[0]) < len(sizes)
    )
    return read + max(written - in_place, 0.0)


def _memory_bytes(text: str) -> float:
    return sum(array.nbytes for array in arrays_of(text) if array.in_memory)
