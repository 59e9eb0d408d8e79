"""What an AXLearn trainer config says: its text (`trainer_config` beside each run's checkpoints).

A line is a path and a literal, as `model.decoder.dim: 4096`. Nothing in it is run: values are
literals, and patterns (of instance types, of names that are saved) are matched here by a small
subset of regular expressions that cannot take long.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import FileError, shown
from shardsim.machine import Machine

_MOST_LINES = 20_000
_LINE = re.compile(r"([A-Za-z_]\w*(?:\.\w+|\[[^\]]*\])*): (.*)")
_SPEC = "PartitionSpec"
_KLASS = "axlearn.common.trainer.SpmdTrainer"
_LONGEST = 400
_STARS = 3  # of one alternative: its match takes a time of length^3 at most
# What AXLearn's launcher calls chips, where it is another name than the compiler's.
_TYPES: Mapping[str, str] = {"v5e": "v5litepod", "tpu7x": "7x"}


def read_text_config(text: str) -> dict[str, Any]:
    """Return the values of a trainer config by path; refuse a file of another kind."""
    values: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None or number > _MOST_LINES:
            raise FileError(f"line {number}: no line of an AXLearn trainer config, PATH: VALUE")
        values[match[1]] = _literal(match[2])
    if values.get("klass") != _KLASS:
        raise FileError(
            f"klass: {shown(values.get('klass'))} is no {_KLASS}; give a run's trainer_config, or "
            "the name of an experiment such as fuji-7B-v2-flash"
        )
    return values


def _literal(text: str) -> Any:
    """Return a literal; a PartitionSpec is the tuple of its axes, and what is none its text."""
    try:
        return ast.literal_eval(text.removeprefix(_SPEC) if text.startswith(_SPEC) else text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def listed(values: Mapping[str, Any], key: str) -> Any:
    """Return a value, or the list of those at `key[0]`, `key[1]`, each perhaps a list itself.

    >>> listed({"a[0][0]": "x", "a[0][1]": "y", "a[1]": None}, "a")
    [['x', 'y'], None]
    """
    if key in values:
        found = values[key]
        return list(found) if isinstance(found, tuple) else found
    items: list[Any] = []
    while (inner := f"{key}[{len(items)}]") in values or f"{inner}[0]" in values:
        items.append(listed(values, inner))
    return items or None


def under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what stands behind a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}


def selector(machine: Machine) -> str:
    """Return the launcher's name of a slice, which `mesh_rules` are matched with.

    Source: axlearn/cloud/gcp/system_characteristics.py; several slices are `-2` behind it.
    """
    chip = machine.chip
    each = chip.cores_per_chip if chip.names_count == "cores" else 1
    name = f"tpu-{_TYPES.get(chip.name, chip.name)}-{machine.chips_per_slice * each}"
    return name if machine.slices == 1 else f"{name}-{machine.slices}"


def matches(pattern: str, text: str) -> bool:
    """Return whether a pattern of a config matches all of a text.

    >>> matches("tpu-v6e-256-(4|8)", "tpu-v6e-256-8"), matches(".*[kqv]_proj", "x.o_proj")
    (True, False)
    """
    problem = len(pattern) > _LONGEST or re.search(r"\)\s*[*+{]|\(\?|\\[^.\-\w]|\\\d", pattern)
    if problem or any(len(re.findall(r"[*+{]", one)) > _STARS for one in pattern.split("|")):
        raise FileError(f"{shown(pattern)}: a pattern that is not read")
    try:
        return re.fullmatch(pattern, text) is not None
    except (re.error, RecursionError, OverflowError):
        raise FileError(f"{shown(pattern)}: no pattern") from None
