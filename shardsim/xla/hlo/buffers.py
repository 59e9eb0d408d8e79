"""What a compiled program has in HBM: the compiler's buffer assignment, as XLA dumps it.

`XLA_FLAGS=--xla_dump_to=FOLDER --xla_dump_hlo_as_text` leaves, of every program, the assignment
(each value's allocation, size and offset) and the live ranges (each value's first and last place in
the schedule). In use at a place is the union of what is live there, as values share bytes; what is
reserved is larger by the gaps between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from shardsim.xla.hlo.errors import HloError

HOST = "5"  # the compiler's number ("color") of the host's memory

_ALLOCATION = re.compile(r"allocation \d+: size (\d+),(?: color (\d+),)?(.*)")
_VALUE = re.compile(r" value: <\d+ ([^ ]+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"    (.+):(\d+)-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A value in an allocation, and the places of the schedule at which it is live."""

    name: str  # of the instruction, without the index into a tuple
    shape: str
    size_bytes: int
    offset_bytes: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where a program's values lie in HBM, and for how long."""

    arguments_bytes: int  # parameters of the program: what its caller holds
    constants_bytes: int
    reserved_bytes: int  # for everything else, gaps included
    host_bytes: int
    buffers: tuple[Buffer, ...] = field(repr=False)  # of what is reserved
    arguments: tuple[Buffer, ...] = field(repr=False)

    @property
    def allocated_bytes(self) -> int:
        """What has to fit into a device's HBM."""
        return self.arguments_bytes + self.constants_bytes + self.reserved_bytes

    @cached_property
    def fullest(self) -> tuple[int, int]:
        """The place at which most is in use, and the bytes in use there beside the arguments."""
        places = {buffer.first for buffer in self.buffers}
        return max(
            ((place, sum(b.size_bytes for b in self.at(place))) for place in sorted(places)),
            key=lambda found: found[1],
            default=(0, 0),
        )

    @property
    def peak_bytes(self) -> int:
        """The most that is in use at one place."""
        return self.arguments_bytes + self.constants_bytes + self.fullest[1]

    def at(self, place: int) -> list[Buffer]:
        """Return what is live at a place; of values that share bytes each byte counts once."""
        live = [b for b in self.buffers if b.first <= place <= b.last]
        found, end = [], 0
        for buffer in sorted(live, key=lambda b: (b.offset_bytes, -b.size_bytes)):
            beyond = buffer.offset_bytes + buffer.size_bytes - max(end, buffer.offset_bytes)
            if beyond > 0:
                found.append(
                    Buffer(**{**vars(buffer), "size_bytes": beyond})
                    if beyond < buffer.size_bytes
                    else buffer
                )
                end = buffer.offset_bytes + buffer.size_bytes
        return found


def read_assignment(assignment: str, live_ranges: str) -> Assignment:
    """Return what the two dumps of a program say.

    Raises `HloError` for text that is something else, or cut off.
    """
    spans = {name: (first, last) for name, first, last in _spans(live_ranges)}
    if not spans or not assignment.startswith("BufferAssignment:"):
        raise HloError("not a buffer assignment and its live ranges")
    sums = {"arguments": 0, "constants": 0, "reserved": 0, "host": 0}
    buffers: list[Buffer] = []
    arguments: list[Buffer] = []
    into: list[Buffer] | None = None
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            size, color, rest = int(found[1]), found[2], found[3]
            kind, into = _kind(rest, color), None
            if kind:
                sums[kind] += size
                into = {"arguments": arguments, "reserved": buffers}.get(kind)
        elif into is not None and (found := _VALUE.match(line)):
            name = found[1] if "{" in found[1] else f"{found[1]}{{}}"
            first, last = spans.get(name, (0, -1))
            buffer = Buffer(
                name=name.partition("{")[0],
                shape=found[4],
                size_bytes=int(found[2]),
                offset_bytes=int(found[3]),
                first=first,
                last=last,
            )
            into.append(buffer)
    return Assignment(
        arguments_bytes=sums["arguments"],
        constants_bytes=sums["constants"],
        reserved_bytes=sums["reserved"],
        host_bytes=sums["host"],
        buffers=tuple(buffers),
        arguments=tuple(arguments),
    )


def _kind(rest: str, color: str | None) -> str:
    """Return which sum an allocation adds to; none for on-chip memories."""
    if color == HOST:
        return "host"
    if color is not None or "thread-local" in rest:
        return ""
    if "parameter" in rest:
        return "arguments"
    return "constants" if "constant" in rest else "reserved"


def _spans(text: str) -> Iterator[tuple[str, int, int]]:
    inside = False
    for line in text.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            inside = line.strip() == "BufferLiveRange:"
        elif inside and (found := _RANGE.match(line)):
            yield found[1], int(found[2]), int(found[3])
