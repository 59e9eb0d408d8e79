"""The collectives of a compiled program, read from its HLO text.

Each instruction counts as often as the loops around it run. Bytes are what one device sends:
V (n-1)/n for an all-gather or reduce-scatter of V bytes over n devices, twice that for an
all-reduce, all of it for a permute.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?->.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(\([^=]*?\)|[\w\[\],{}:()#*]+)\s+([\w\-]+)\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"\bs32\[\][^=]*constant\((\d+)\)")
_LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One collective instruction of a compiled program."""

    kind: str
    mesh_axes: tuple[str, ...]
    sent_bytes: float  # by one device, each time
    count: int  # times in one run of the program
    op_name: str  # where in the source it comes from


def sent_bytes(kind: str, array_bytes: float, devices: int) -> float:
    """Return what one device sends for a collective of a whole array of `array_bytes`.

    >>> sent_bytes("all-reduce", 1024, 4)
    1536.0
    """
    if kind in ("permute", "broadcast"):
        return float(array_bytes)
    share = (devices - 1) / devices
    return array_bytes * share * (2.0 if kind == "all-reduce" else 1.0)


def list_collectives(text: str, mesh: Mapping[str, int]) -> list[Compiled]:
    """Return the collectives in the HLO `text` of a program compiled for `mesh` (axis: size)."""
    computations, entry = _computations(text)
    runs: dict[str, int] = {}
    _count(entry, 1, computations, runs)
    found = []
    for name, times in runs.items():
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            kind = KINDS.get(match[3].removesuffix("-start")) if match else None
            if match is None or kind is None or match[3].endswith("-done"):
                continue
            groups = _groups(line, math.prod(mesh.values()))
            axes = _axes(groups, mesh, kind)
            size = 2 if kind == "permute" else max(len(group) for group in groups)
            if size == 1:
                continue
            array = _bytes(match[2], started=match[3].endswith("-start"))
            if kind == "reduce-scatter":
                array *= size
            op_name = _OP_NAME.search(line)
            found.append(
                Compiled(
                    kind=kind,
                    mesh_axes=axes,
                    sent_bytes=sent_bytes(kind, array, size),
                    count=times,
                    op_name=op_name[1] if op_name else "",
                )
            )
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in _COMMENT.sub("", text).splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            computations[current].append(line)
    return computations, entry


def _count(
    name: str, times: int, computations: Mapping[str, list[str]], runs: dict[str, int]
) -> None:
    """Add to `runs` how often each computation runs when `name` runs `times` times."""
    runs[name] = runs.get(name, 0) + times
    for line in computations[name]:
        called = [*_CALLED.findall(line)]
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        inside = times
        if " while(" in line:
            inside = times * _trips(line, computations)
        for callee in called:
            if callee in computations:
                _count(callee, inside, computations, runs)


def _trips(line: str, computations: Mapping[str, list[str]]) -> int:
    """Return how often a while loop runs: as annotated, or the constant that it counts to."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    limits = [int(value) for line in lines for value in _CONSTANT.findall(line)]
    return limits[0] if len(limits) == 1 else 1


def _bytes(shape: str, started: bool) -> float:
    """Return the bytes of a result type; of a started one (operands, results), the results'."""
    arrays = [
        math.prod(int(size) for size in sizes.split(",") if size) * _element_bits(kind) / 8
        for kind, sizes in _ARRAY.findall(shape)
    ]
    if started and shape.startswith("(") and len(arrays) > 1:
        return sum(arrays[len(arrays) // 2 :]) if len(arrays) % 2 == 0 else arrays[1]
    return sum(arrays)


def _element_bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.match(r"[a-z]+(\d+)", kind)
    return int(digits[1]) if digits else 0


def _groups(line: str, devices: int) -> list[list[int]]:
    """Return the groups of devices of a collective; for a permute its source-target pairs."""
    if pairs := _PAIRS.search(line):
        return [[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if meshed := _MESH.search(line):
        return _mesh_groups(meshed[1], meshed[2], meshed[3], meshed[4], devices)
    if iota := _IOTA.search(line):
        shape, dims = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        order = list(range(len(dims)))
        if iota[3]:
            order = [int(x) for x in iota[3].split(",")]
        return _rows(_transposed(dims, order), shape)
    if (listed := _LISTED.search(line)) and listed[1]:
        return [[int(x) for x in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [list(range(devices))]


def _mesh_groups(
    mesh: str, dims: str | None, order: str | None, axes: str, devices: int
) -> list[list[int]]:
    """Return the groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.

    The members of a group differ along the axes in braces; `'b':(2)2` is a part of an axis, of
    size 2 after 2 major ones.
    """
    ids = list(range(devices))
    if dims:
        shape = [int(x) for x in dims.split(",")]
        turned = [int(x) for x in order.split(",")] if order else list(range(len(shape)))
        ids = list(_transposed(shape, turned))
    wanted: dict[str, list[tuple[int, int]]] = {}
    sizes = {name: int(size) for name, size, _, _ in _MESH_AXIS.findall(mesh)}
    for name, _, before, size in _MESH_AXIS.findall(axes):
        part = (int(before), int(size)) if size else (1, sizes[name])
        wanted.setdefault(name, []).append(part)
    lengths: list[int] = []
    inside: list[bool] = []
    for name, size in sizes.items():
        done = 1
        for before, length in sorted(wanted.get(name, [])):
            lengths += [before // done, length]
            inside += [False, True]
            done = before * length
        lengths.append(size // done)
        inside.append(False)
    groups: dict[tuple[int, ...], list[int]] = {}
    for device, cell in zip(ids, itertools.product(*map(range, lengths)), strict=True):
        key = tuple(digit for digit, within in zip(cell, inside, strict=True) if not within)
        groups.setdefault(key, []).append(device)
    return list(groups.values())


def _transposed(dims: Sequence[int], order: Sequence[int]) -> Iterator[int]:
    """Yield 0, 1, ... laid out as `dims`, read in the transposed `order`."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    for cell in itertools.product(*(range(dims[axis]) for axis in order)):
        yield sum(digit * strides[axis] for digit, axis in zip(cell, order, strict=True))


def _rows(numbers: Iterator[int], shape: Sequence[int]) -> list[list[int]]:
    flat = list(numbers)
    width = math.prod(shape[1:])
    return [flat[i * width : (i + 1) * width] for i in range(shape[0])]


def _axes(groups: list[list[int]], mesh: Mapping[str, int], kind: str) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ."""
    differ: set[str] = set()
    for group in groups:
        places = [_place(device, mesh) for device in group]
        for axis in mesh:
            if len({place[axis] for place in places}) > 1:
                differ.add(axis)
    return tuple(axis for axis in mesh if axis in differ)


def _place(device: int, mesh: Mapping[str, int]) -> dict[str, int]:
    place: dict[str, int] = {}
    for axis in reversed(list(mesh)):
        device, place[axis] = divmod(device, mesh[axis])
    return place
