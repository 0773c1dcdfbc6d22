"""Collectives of a compiled program, read from its text: kinds, bytes, how often."""

import dataclasses
import math
import re

from rlhf_jax.planning.hlo_analysis import HloModule, arrays_of

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(?:-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
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


def collectives(program: str, unknown_trips: int = 1) -> list[Collective]:
    """Every collective in the text of a compiled program (`compiled.as_text()`), in its order.

    Args:
      unknown_trips: rounds of loops whose number the text does not tell, such as those of generation.
    """
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for instruction in HloModule(program).walk(unknown_trips):
        operation = _COLLECTIVE.search(instruction.line)
        if operation is None:
            continue
        # One that is hidden behind other work stands in the text where it starts and where it ends.
        channel = _CHANNEL.search(instruction.line)
        if channel and instruction.fused and (instruction.scope, channel[1]) in seen:
            continue
        if channel:
            seen.add((instruction.scope, channel[1]))
        found.append(_collective(instruction.line, operation, instruction.times))
    return found


def by_kind(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """Number of collectives of each kind in one call, and the bytes that each device receives by it."""
    kinds = {c.kind: [other for other in found if other.kind == c.kind] for c in found}
    return {
        kind: (sum(c.times for c in some), sum(c.moved_bytes for c in some)) for kind, some in kinds.items()
    }


def _collective(line: str, operation: re.Match[str], times: int) -> Collective:
    arrays = arrays_of(operation[1])
    if f"{operation[2]}-start(" in line:  # which gives what goes in beside what comes out
        results = arrays[len(arrays) // 2 :]
        arrays = {
            "all-gather": results,
            "reduce-scatter": results,
            "all-to-all": results,
            "collective-permute": arrays[1:2],
        }.get(operation[2], arrays)  # of an all-reduce the results alone
    total = int(sum(array.nbytes for array in arrays))
    return Collective(operation[2], tuple(array.shape for array in arrays), total, _group(line), times)


def _group(line: str) -> int:
    if listed := _LISTED.search(line):
        return len(listed[1].split(","))
    if counted := _COUNTED.search(line):
        return int(counted[1])
    if named := _NAMED.search(line):
        sizes = dict(pair.split("=") for pair in named[1].split(","))
        return math.prod(int(sizes[axis.split(":")[0].strip()]) for axis in named[2].split(","))
    return 2  # a permutation has pairs instead
