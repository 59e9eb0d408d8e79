"""The chip and the slices of a row, whether it gives counts, shapes or vendors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from shardsim.errors import FileError, HardwareError
from shardsim.machine import Chip, Machine, default_slice, load_chip, parse_machine
from shardsim.machine.catalog import find_name
from shardsim.validate.words import ROW, find, whole

# A chip's name somewhere in a text, with what may follow it: `v5p-1024`, `2*v5e:16x16`.
_NAMED = re.compile(
    r"(?:(?P<slices>\d{1,4})\s*[*x\u00d7]\s*)?(?:tpu[\s_-]*)?"
    r"(?P<chip>v5litepod|v5lite|v\d{1,3}[ep]?|tpu7x|v7x|ironwood|trillium|[ah]\d{3})\b"
    r"(?:(?P<rest>[-:]\d+(?:x\d+)*))?"
)
_SHAPE = re.compile(r"(?<![\dx.])\d+x\d+(?:x\d+)?(?![\dx])")


def chip_of(row: Mapping[str, Any]) -> tuple[Chip, str]:
    """Return the chip and the text that names it, which may name a slice too."""
    said = find(row, "chip", ROW)
    if said is None:
        topology = str(find(row, "topology", ROW) or "").lower()
        if not _NAMED.search(topology):
            raise FileError("missing key 'chip'")
        said = topology
    text = str(said)[:200]
    if find_name(text) is None:
        for match in _NAMED.finditer(text.lower()):
            if find_name(match["chip"]) is not None:
                return load_chip(match["chip"]), text.lower()
    return load_chip(text), ""


def machine_of(
    row: Mapping[str, Any], chip: Chip, word: str, outside: Mapping[str, int]
) -> tuple[Machine | None, str]:
    """Return the slices of a row and a remark on them; None if it does not say how many chips."""
    text = str(find(row, "topology", ROW) or "")[:200].lower()
    said = find(row, "slices", ROW)
    slices = None if said in (None, 0) else whole(said, "slices")
    named = _named(text, chip) or _named(word, chip)
    if slices is None and named is None and prod(outside.values()) > 1:
        slices = prod(outside.values())
    chips = _chips(row, chip)
    if chips is not None and named is not None and chips == named.chips * chip.cores_per_chip:
        chips = named.chips  # the row counts the cores that a name such as v3-2048 counts
    shape = _shape(text, chip)
    if chips is None:
        if named is not None:
            several = slices if slices and named.slices == 1 else named.slices
            return _times(named, several), ""
        if shape is not None:
            return parse_machine(f"{slices or 1}*{chip.name}:{shape}"), ""
        return None, ""
    if chip.interconnect == "switch":
        return default_slice(chip, chips), ""
    if slices is None:
        slices = _least_slices(chip, chips, named, shape)
    if chips % slices:
        raise FileError(f"chips: {chips} do not divide into {slices} slices")
    if named is not None and named.chips_per_slice == chips // slices:
        return _times(named, slices), ""
    if shape is not None and prod(map(int, shape.split("x"))) == chips // slices:
        return parse_machine(f"{slices}*{chip.name}:{shape}"), ""
    remark = ""
    if named is not None or shape is not None:
        remark = f"topology: not one of {chips // slices} chips; the default slice is taken"
    return _times(default_slice(chip, chips // slices), slices), remark


def _chips(row: Mapping[str, Any], chip: Chip) -> int | None:
    """Return how many chips a row states, which may count devices or cores instead."""
    for key, each in (
        ("chips", 1),
        ("devices", chip.devices_per_chip),
        ("cores", chip.cores_per_chip),
    ):
        said = find(row, key, ROW)
        if said in (None, 0):
            continue
        if isinstance(said, str) and (product := re.fullmatch(r"\s*(\d+)\s*[x*]\s*(\d+)\s*", said)):
            said = int(product[1]) * int(product[2])
        count = whole(said, key)
        if count % each:
            raise FileError(f"{key}: {count} do not divide by the {each} of a {chip.name}")
        return count // each
    return None


def _named(text: str, chip: Chip) -> Machine | None:
    """Return the slices that a vendor's or the compiler's name in `text` stands for."""
    for match in _NAMED.finditer(text):
        if match["rest"] and find_name(match["chip"]) == chip.name:
            try:
                one = parse_machine(f"{match['chip']}{match['rest']}")
            except HardwareError:
                continue
            return _times(one, int(match["slices"] or 1) * one.slices)
    return None


def _shape(text: str, chip: Chip) -> str | None:
    """Return a shape such as 4x4x8 in `text` with as many axes as the chip's torus."""
    for match in _SHAPE.finditer(text):
        if len(match.group().split("x")) == chip.torus_dims:
            return match.group()
    return None


def _least_slices(chip: Chip, chips: int, named: Machine | None, shape: str | None) -> int:
    """Return how many slices a number of chips is, where the row does not say."""
    each = named.chips_per_slice if named else prod(map(int, shape.split("x"))) if shape else 0
    pod = prod(chip.max_slice)
    if each and chips % each == 0:
        return chips // each
    return chips // pod if chips > pod and chips % pod == 0 else 1


def _times(machine: Machine, slices: int) -> Machine:
    return Machine(chip=machine.chip, shape=machine.shape, slices=slices, twisted=machine.twisted)
