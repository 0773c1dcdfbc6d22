"""What a compiled program communicates, read from its text: kinds, bytes, how often."""

import dataclasses
import math
import re

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(pred|bf16|[a-z]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# Who takes part together, in three spellings: {{0,1},{2,3}}, [2,2]<=[4] and mesh['a'=2,'b'=2] {'b'}.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
      shapes: of its results, on one device.
      result_bytes: of those.
      group: devices that take part together.
      times: how often it runs in one call, loops included; 1 a pass of a loop of unknown length.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    result_bytes: int
    group: int
    times: int

    @property
    def moved_bytes(self) -> float:
        """Bytes that each device receives in one call, by the ring algorithms' count."""
        share = (self.group - 1) / self.group
        factor = {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1,  # the result is one share of what comes in
            "all-to-all": share,
            "collective-permute": 1.0,
        }[self.kind]
        return factor * self.result_bytes * self.times


def collectives(program: str) -> list[Collective]:
    """Every collective in the text of a compiled program (`compiled.as_text()`), in its order."""
    bodies, entry = _computations(program)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            operation = _COLLECTIVE.search(line)
            if operation:
                found.append(_collective(line, operation, times))
            trips = _TRIPS.search(line)
            for called in _called(line):
                visit(called, times * int(trips[1]) if trips else times)

    visit(entry, 1)
    return found


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _called(line: str) -> list[str]:
    names: list[str] = []
    for single, several in _CALLED.findall(line):
        names += [single] if single else [name.strip().lstrip("%") for name in several.split(",")]
    return names


def _collective(line: str, operation: re.Match[str], times: int) -> Collective:
    arrays = _ARRAY.findall(operation[1])
    shapes = tuple(tuple(int(size) for size in dims.split(",") if size) for _, dims in arrays)
    sizes = [_item_bytes(dtype) * math.prod(shape) for (dtype, _), shape in zip(arrays, shapes, strict=True)]
    return Collective(operation[2], shapes, int(sum(sizes)), _group(line), times)


def _group(line: str) -> int:
    if listed := _LISTED.search(line):
        return len(listed[1].split(","))
    if counted := _COUNTED.search(line):
        return int(counted[1])
    if named := _NAMED.search(line):
        sizes = dict(pair.split("=") for pair in named[1].split(","))
        return math.prod(int(sizes[axis.split(":")[0].strip()]) for axis in named[2].split(","))
    return 2  # a permutation has pairs instead


def _item_bytes(dtype: str) -> float:
    return 1 if dtype == "pred" else 2 if dtype == "bf16" else int(re.sub(r"\D.*", "", dtype[1:])) / 8
