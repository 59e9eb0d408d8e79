"""The chips that shardsim knows: one file of `hardware/` each, every figure with its source.

A file holds `name`, `title`, `kind` (tpu or gpu) and the figures of `Chip`, each one as

    hbm_bytes_per_s:
      value: 1.2e12          # plain SI: bytes, seconds, FLOP/s
      source: where it was published or measured, or why it is assumed
      status: published      # measured, derived, fitted, recalled or assumed
      note: what other sources say (may be left out)

`peak_flops` holds one such figure per dtype. A figure of status `fitted` also says what it was
fitted to (`fitted_to`), and is listed in `Chip.constants`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from shardsim.errors import FileError, HardwareError, nearest
from shardsim.files import check_keys, data_folder, parse_yaml, read_yaml
from shardsim.machine.chip import (
    DTYPES,
    EFFICIENCIES,
    OPTIONAL,
    RATES,
    TIMES,
    Chip,
    Constant,
    problem_with,
)
from shardsim.machine.kernels import kernels_from_data
from shardsim.machine.op_costs import op_costs_from_data

STATUSES = ("published", "measured", "derived", "fitted", "recalled", "assumed")

# Spellings of vendors and of JAX's `device_kind`, compared without case, spaces, '-' and '_'.
# They are here and not in the files, so that finding a chip reads one file only.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "v2": ("TPU v2",),
    "v3": ("TPU v3",),
    "v4": ("TPU v4", "v4p"),
    "v5e": ("v5litepod", "v5lite", "TPU v5e", "TPU v5 lite"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("trillium", "v6lite", "TPU v6e", "TPU v6 lite"),
    "tpu7x": ("ironwood", "v7x", "TPU v7x", "7x"),
    "a100": ("NVIDIA A100-SXM4-80GB", "a100 80gb"),
    "h100": ("NVIDIA H100 80GB HBM3", "h100 80gb"),
    "h100-500w": ("NVIDIA H100 96GB HBM2e", "h100 hbm2e"),
    "h200": ("NVIDIA H200",),
    "h800": ("NVIDIA H800",),
    "rpi4": ("Raspberry Pi 4", "Raspberry Pi 4B"),
    "v100": ("Tesla V100-SXM2-32GB", "NVIDIA V100"),
}

_IDENTITY = ("name", "title", "kind")
_NOT_FIGURES = (*_IDENTITY, "aliases", "compiler", "compilers", "kernels", "constants", "figures")
_FIGURES = tuple(item.name for item in fields(Chip) if item.name not in _NOT_FIGURES)
# Figures that only some chips have and that are no field of Chip.
_EXTRA = (
    "cmem_bytes",
    "scoped_vmem_bytes",
    "async_permute_chips",
    "offloads_collectives",
    "products_apart",
    "heads_as_columns",
    "sparse_gain",
)
# A section like `compiler`: what operations take with the on-chip memory that the compiler gives
# them by itself, where the emitted step gives them `scoped_vmem_bytes`.
OWN_LIMIT = "compiler_own_limit"
OVERRIDABLE = (*RATES, *TIMES, *EFFICIENCIES)


@lru_cache(maxsize=1)
def chip_names() -> tuple[str, ...]:
    """Return the names of the chips that ship with shardsim, TPUs first, oldest first."""
    found = {path.stem for path in data_folder("hardware").glob("*.yaml")}
    known = [name for name in ALIASES if name in found]
    return (*known, *sorted(found.difference(known)))


def load_chip(name: str) -> Chip:
    """Return the chip called `name`, which may be an alias such as `v5litepod` or `Trillium`.

    Only that chip's file is read, once.

    >>> load_chip("TPU v5 lite").name
    'v5e'
    """
    found = find_name(name)
    if found is None:
        choices = chip_names()
        spellings = [*choices, *(alias for each in choices for alias in ALIASES.get(each, ()))]
        guess = nearest(_plain(name), spellings)
        hint = guess if "did you mean" in guess else nearest("", choices)
        raise HardwareError(f"unknown chip {show(name)}{hint}")
    return _load_shipped(found)


def find_name(name: str) -> str | None:
    """Return the canonical name for `name` or an alias of it; None if no chip is called so."""
    wanted = _plain(name)
    for each in chip_names():
        if wanted == _plain(each) or wanted in map(_plain, ALIASES.get(each, ())):
            return each
    return None


def show(text: object) -> str:
    """Return user's text quoted for a one-line message: no line breaks, at most 60 characters."""
    shown = repr(str(text))
    return shown if len(shown) <= 60 else shown[:56] + "...'"


def load_chip_file(path: str | os.PathLike[str]) -> Chip:
    """Return the chip that the file at `path` describes, in the form of `hardware/*.yaml`."""
    return _build(read_yaml(path), str(path), ())


def chip_from_text(text: str, where: str) -> Chip:
    """Return the chip that a hardware file's text describes; `where` names it in errors."""
    return _build(parse_yaml(text, where), where, ())


def override_chip(chip: Chip, values: Mapping[str, Any]) -> Chip:
    """Return `chip` with some figures changed, to ask "what if".

    Keys are the rates, sizes, times and efficiencies of `Chip`, `peak_flops.bf16` and the
    like. Times may be zero, other figures must be positive and finite, efficiencies in
    (0, 1]. A new `hbm_bytes` moves `hbm_usable_bytes` in proportion unless that is given too.

    >>> override_chip(load_chip("v4"), {"link_bytes_per_s": 90e9}).link_bytes_per_s
    90000000000.0
    """
    changes: dict[str, Any] = {}
    peaks = dict(chip.peak_flops)
    figures = {name: dict(figure) for name, figure in chip.figures.items()}
    choices = (*OVERRIDABLE, *(f"peak_flops.{dtype}" for dtype in chip.peak_flops))
    for key, value in values.items():
        if key not in choices:
            fixed = key != "peak_flops" and key in (*Chip.__dataclass_fields__, *_EXTRA)
            what = "cannot be overridden" if fixed else "is no figure of a chip"
            inside = [name for name in choices if name.startswith(f"{key.partition('.')[0]}.")]
            inside = inside or [name for name in choices if name.startswith(f"{key}_")]
            hint = f"; name one of {', '.join(inside)}" if inside else nearest(key, choices)
            raise HardwareError(f"override: {show(key)} {what}{hint}")
        problem = problem_with(key.partition(".")[0], value)
        if problem:
            raise HardwareError(f"override: {key} {problem}")
        if key.startswith("peak_flops."):
            peaks[key.partition(".")[2]] = float(value)
        else:
            changes[key] = float(value)
        figures[key] = {"value": float(value), "source": "override", "status": "assumed"}
    if "hbm_bytes" in changes and "hbm_usable_bytes" not in changes:
        usable = chip.hbm_usable_bytes * changes["hbm_bytes"] / chip.hbm_bytes
        changes["hbm_usable_bytes"] = usable
        source = "override of hbm_bytes, in proportion"
        figures["hbm_usable_bytes"] = {"value": usable, "source": source, "status": "assumed"}
    left = tuple(constant for constant in chip.constants if constant.name not in values)
    return replace(chip, **changes, peak_flops=peaks, figures=figures, constants=left)


def _plain(name: str) -> str:
    return "".join(letter for letter in str(name).lower() if letter not in " -_")


@lru_cache(maxsize=64)
def _load_shipped(name: str) -> Chip:
    path = data_folder("hardware") / f"{name}.yaml"
    chip = _build(read_yaml(path), f"hardware/{name}.yaml", ALIASES.get(name, ()))
    if chip.name != name:
        raise FileError(f"hardware/{name}.yaml: its name is {show(chip.name)}")
    return chip


def _build(data: Any, where: str, aliases: tuple[str, ...]) -> Chip:
    """Return the chip that `data` describes; `FileError` naming file and key if it is not one."""
    required = (*_IDENTITY, *(name for name in _FIGURES if name not in OPTIONAL))
    allowed = (*_IDENTITY, *_FIGURES, *_EXTRA, "compiler", OWN_LIMIT, "kernels")
    check_keys(data, where=where, allowed=allowed, required=required)
    words = {}
    for key in _IDENTITY:
        if not isinstance(data[key], str) or not data[key].isprintable() or not data[key]:
            raise FileError(f"{where}: {key} must be a word, not {show(data[key])}")
        words[key] = data[key]
    if not all(letter.isalnum() or letter in "-_." for letter in words["name"]):
        raise FileError(f"{where}: name may have letters, digits, '-', '_' and '.' only")
    figures: dict[str, Any] = {}
    values: dict[str, Any] = {name: None for name in OPTIONAL}
    for name in (*_FIGURES, *_EXTRA):
        if name not in data:
            continue
        if name == "peak_flops":
            check_keys(data[name], where=f"{where}: {name}", allowed=DTYPES, required=("bf16",))
            peaks = {}
            for dtype, figure in data[name].items():
                key = f"{name}.{dtype}"
                figures[key] = _figure(figure, f"{where}: {key}", name)
                peaks[dtype] = float(figures[key]["value"])
            values[name] = peaks
            continue
        figures[name] = _figure(data[name], f"{where}: {name}", name)
        if name in _FIGURES:
            values[name] = _plain_value(name, figures[name]["value"])
    if (room := figures.get("scoped_vmem_bytes")) and "onchip_bytes" in figures:
        onchip = float(figures["onchip_bytes"]["value"])
        if not 1024 <= float(room["value"]) <= onchip:
            raise FileError(
                f"{where}: scoped_vmem_bytes: value must be from 1024 to onchip_bytes, {onchip:g}, "
                f"not {room['value']:g}"
            )
    constants = tuple(
        Constant(name=name, value=float(figure["value"]), fitted_to=figure["fitted_to"])
        for name, figure in figures.items()
        if figure["status"] == "fitted"
    )
    if "compiler" in data:
        values["compiler"] = op_costs_from_data(data["compiler"], f"{where}: compiler")
    if OWN_LIMIT in data:
        if "compiler" not in data or "scoped_vmem_bytes" not in data:
            raise FileError(f"{where}: {OWN_LIMIT} goes with compiler and scoped_vmem_bytes")
        own = op_costs_from_data(data[OWN_LIMIT], f"{where}: {OWN_LIMIT}")
        values["compilers"] = (values["compiler"], own)
    if "kernels" in data:
        values["kernels"] = kernels_from_data(data["kernels"], f"{where}: kernels")
    try:
        return Chip(**words, aliases=aliases, **values, constants=constants, figures=figures)
    except HardwareError as error:
        raise FileError(f"{where}: {error}") from None


def _figure(data: Any, where: str, name: str) -> dict[str, Any]:
    """Return one figure `{value, source, status}` after checking it; `name` says what it is."""
    check_keys(
        data,
        where=where,
        allowed=("value", "source", "status", "note", "fitted_to"),
        required=("value", "source", "status"),
        example="{value: 16e9, source: where it stands, status: published}",
    )
    for key in ("source", "status", "note", "fitted_to"):
        if key in data and (not isinstance(data[key], str) or not data[key].strip()):
            raise FileError(f"{where}: {key} must be a text that is not empty")
    if data["status"] not in STATUSES:
        raise FileError(f"{where}: unknown status{nearest(data['status'], STATUSES)}")
    fitted = data["status"] == "fitted"
    if fitted and "fitted_to" not in data:
        raise FileError(f"{where}: status fitted needs fitted_to, the runs it was fitted to")
    if "fitted_to" in data and not fitted:
        raise FileError(f"{where}: fitted_to needs status fitted, not {data['status']}")
    if fitted and name not in OVERRIDABLE:
        raise FileError(f"{where}: only rates, sizes, times and efficiencies can be fitted")
    problem = problem_with(name, data["value"])
    if problem:
        raise FileError(f"{where}: value {problem}")
    return dict(data)


def _plain_value(name: str, value: Any) -> Any:
    """Return `value` as the type that the field `name` of `Chip` has."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if name in OVERRIDABLE else value
