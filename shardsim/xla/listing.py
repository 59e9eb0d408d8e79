"""The collectives of a compiled program, read from its HLO text.

Each instruction counts as often as the loops around it run. Bytes are what one device sends:
V (n-1)/n for an all-gather or reduce-scatter of V bytes over n devices, twice that for an
all-reduce, all of it for a permute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from shardsim.xla.entries import Compiled, sent_bytes
from shardsim.xla.hlo.groups import differing_axes, parse_groups, written_groups
from shardsim.xla.hlo.opcodes import KINDS

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
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


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
            _, written = written_groups(line)
            groups = parse_groups(written, math.prod(mesh.values()))
            axes = differing_axes(groups, mesh)
            size = max(len(group) for group in groups)
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
