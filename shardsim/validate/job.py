"""How large the job of a row in the words of its source was: its slices, its sequences a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from shardsim.errors import FileError, HardwareError
from shardsim.machine import Chip, Machine, default_slice, parse_machine
from shardsim.validate.words import IN_WORDS, UNSAID, number, shown, whole


def machine_of(
    row: Mapping[str, Any], chip: Chip, outside: int, notes: list[str]
) -> Machine | None:
    """Return the slices of a row; None if it does not say how many chips."""
    text = str(row.get("topology") or "")[:200].lower()
    one = _named_slice(text, chip)
    slices = whole(row["slices"], "slices") if row.get("slices") else _slices_in(text)
    said = row.get("chips")
    if str(said).lower().startswith(UNSAID):
        said = None
    chips = whole(said, "chips") if said else None
    if chips is None and chip.kind == "gpu" and (nodes := row.get("nodes") or row.get("hosts")):
        chips = whole(nodes, "nodes") * prod(chip.max_slice)
    if chips is None:
        return one and replace(one, slices=slices or outside)
    if chip.interconnect == "switch":
        return default_slice(chip, chips)
    if slices is None:
        pod = one.chips if one else prod(chip.max_slice)
        slices = outside if outside > 1 else chips // pod if chips % pod == 0 else 1
    if chips % slices:
        raise FileError(f"chips: {chips} do not divide into {slices} slices")
    if one is None or one.chips != chips // slices:
        if one is not None:
            notes.append(
                f"topology: not one of {chips // slices} chips; the default slice is taken"
            )
        one = default_slice(chip, chips // slices)
    return replace(one, slices=slices)


def _named_slice(text: str, chip: Chip) -> Machine | None:
    """Return the slice of `chip` that a name (v5p-1024) or a shape (4x4x8) in a text stands for."""
    for match in re.finditer(r"(?<![\dx.])\d+x\d+(?:x\d+)?(?![\dx])", text):
        if match.group().count("x") == chip.torus_dims - 1:
            return parse_machine(f"{chip.name}:{match.group()}")
    for match in re.finditer(rf"{chip.name}-\d+", text):
        try:
            return parse_machine(match.group())
        except HardwareError:
            continue
    return None


def says_a_slice(text: str, chip: Chip) -> bool:
    """Return whether a topology says which slice of a chip it is, how many, or what is usual."""
    text = text[:200].lower()
    usual = re.search(r"default|torus|mesh|cube|dcn|twist|unknown|not (stated|published)", text)
    return bool(
        usual
        or chip.interconnect == "switch"
        or _slices_in(text) is not None
        or _named_slice(text, chip) is not None
    )


def _slices_in(text: str) -> int | None:
    """Return how many slices a topology says, as "two slices of v5p-128" or "4 x v5e-256"."""
    many = "|".join(IN_WORDS)
    found = re.search(rf"\b({many}|\d+) (?:slices|pods)\b|\b(\d+) ?[x*] ?v\d", text)
    if found is None:
        return None
    said = found[1] or found[2]
    return IN_WORDS.get(said) or whole(said, "topology")


def batch_of(
    row: Mapping[str, Any], machine: Machine | None, steps: int, sequence: int
) -> int | None:
    """Return sequences per step over all chips; per-device sizes may be fractions."""
    said = row.get("global_batch")
    if said is not None:
        found = whole(said, "global_batch")
        if "token" not in str(said).lower():
            if re.search(r"\d\s*[mbt]\b", str(said).lower()):
                raise FileError(f"global_batch: {shown(said)}: of tokens or of sequences?")
            return found
        millions = re.match(r"\s*(\d+) ?m", str(said).lower())  # "4M tokens" are 2^22
        found = int(millions[1]) * 2**20 if millions else found
        return max(1, round(found / sequence))
    if machine is None or row.get("per_device_batch") is None:
        return None
    each = number(row["per_device_batch"], "per_device_batch")
    return max(1, round(each * machine.devices * steps))
