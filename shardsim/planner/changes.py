"""A plan with some of its keys changed: `KEY=VALUE` as people write it, and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardsim.errors import HardwareError, PlanError, nearest
from shardsim.files import parse_yaml
from shardsim.machine import Chip, Machine, override_chip, parse_machine
from shardsim.machine.chip import TIMES
from shardsim.model import load_model, override_model
from shardsim.plan.io import KEYS, plan_from_data, plan_to_data
from shardsim.plan.plan import Plan

ROOTS = (*KEYS, "chip")
FARTHEST = 1e6  # a figure of the chip may be so many times larger or smaller than it is
LONGEST_TIME_S = 1.0  # of a chip's latencies and overheads


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read `key=value`; the value is a YAML scalar or list.

    >>> parse_assignment("overlap.matmul=off")
    ('overlap.matmul', 'off')
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise PlanError(f"'{text[:80]}': expected key=value, such as microbatches=4")
    return key.strip(), parse_value(key.strip(), value)


def parse_value(key: str, text: str) -> Any:
    """Read the value of one key."""
    if key == "overlap.matmul":
        return text.strip()
    return parse_yaml(text, key)


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Read `key=a,b,c` into the key and its values."""
    key, equals, values = text.partition("=")
    parts = [part for part in _split(values) if part.strip()]
    if not equals or not key.strip() or not parts:
        raise PlanError(f"'{text[:80]}': expected key=a,b,c, such as microbatches=1,2,4")
    return key.strip(), [parse_value(key.strip(), part) for part in parts]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets: `full,{save: [qkv, context]}` has two parts."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def changed(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """Return `plan` with some keys changed.

    Keys are those of a plan file, with dots into it (`overlap.weights`, `rules.activations.seq`);
    `model.*` are the model's options, `chip.*` the chip's figures. `mesh.NAME` takes a size: the
    mesh is laid on the torus anew, and the largest axis that was not named takes up what is left.
    So it is on another slice.
    """
    data = plan_to_data(plan)
    model, machine = plan.model, plan.machine
    options: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for key, value in changes.items():
        root, _, rest = key.partition(".")
        check_root(key)
        if root == "model" and rest:
            options[rest] = value
        elif root == "chip":
            figures[rest] = value
        elif root == "mesh" and rest and "." not in rest:
            sizes[rest] = value
        elif key == "machine":
            machine = parse_machine(_word(value, key))
        elif root == "model":
            model = load_model(value)
        else:
            _assign(data, key, value)
    if figures:
        machine = replace(machine, chip=_other_chip(machine.chip, figures))
    if options:
        model = override_model(model, options)
    another = machine.shape != plan.machine.shape or machine.slices != plan.machine.slices
    given = [key for key in changes if key.partition(".")[0] == "mesh" and key[5:] not in sizes]
    if sizes and given:
        raise PlanError(f"{given[0]}: cannot be combined with mesh.{min(sizes)}, a new layout")
    if sizes or (another and not given):
        data["mesh"] = _resized({axis.name: axis.size for axis in plan.mesh}, sizes, machine)
    data["machine"] = machine.name
    unknown = machine.chip.compiler is None and data.get("op_costs") == "compiler"
    if unknown and "op_costs" not in changes:
        data.pop("op_costs")  # of a compiler that nobody has asked
    if not model.parallel_block and "fused_projections" not in changes:
        data["fused_projections"] = False
    if model != plan.model and "sequence" not in changes and plan.sequence == plan.model.sequence:
        data["sequence"] = model.sequence
    return plan_from_data(data, plan.name, machine=machine, model=model)


def check_root(key: str) -> None:
    root, dot, rest = key.partition(".")
    if root not in ROOTS:
        raise PlanError(f"{key}: unknown key{nearest(root, ROOTS)}")
    if (dot and not rest) or (root == "chip" and not rest):
        example = {"chip": "link_bytes_per_s", "model": "layers"}.get(root, "KEY")
        raise PlanError(f"{key}: name what of it to change, as in {root}.{example}")


def _other_chip(chip: Chip, figures: Mapping[str, Any]) -> Chip:
    """Return `chip` with figures changed, within what the formulas can be asked about."""
    try:
        changed = override_chip(chip, figures)
    except HardwareError as error:
        raise HardwareError(f"chip: {str(error).removeprefix('override: ')}") from None
    for key, value in figures.items():
        root, _, dtype = key.partition(".")
        now = getattr(chip, root)
        now = now[dtype] if dtype else now
        if root in TIMES and value > LONGEST_TIME_S:
            raise HardwareError(f"chip.{key}: {value:g} s is longer than {LONGEST_TIME_S:g} s")
        if root not in TIMES and now and not now / FARTHEST <= value <= now * FARTHEST:
            raise HardwareError(
                f"chip.{key}: {value:g} is more than {FARTHEST:g} times away from {now:g}"
            )
    return changed


def _word(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{key}: expected a name, found {value!r}")
    return value


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings."""
    *path, last = key.split(".")
    place: Any = data
    for step in path:
        if not isinstance(place.get(step), dict):
            place[step] = {}
        place = place[step]
    place[last] = value


def _resized(mesh: Mapping[str, int], sizes: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """Return mesh sizes without their places on the torus, the largest other axis adjusted."""
    new = dict(mesh)
    for name, size in sizes.items():
        if name not in new:
            raise PlanError(f"mesh.{name}: no such mesh axis{nearest(name, new)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise PlanError(f"mesh.{name}: must be a positive whole number, not {size!r}")
        new[name] = size
    others = [name for name in new if name not in sizes]
    total = 1
    for size in new.values():
        total *= size
    if others and total != machine.devices:
        taker = max(others, key=lambda name: new[name])
        rest = total // new[taker]
        if machine.devices % rest == 0:
            new[taker] = machine.devices // rest
    return new
