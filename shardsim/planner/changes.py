"""A plan with some of its keys changed: `KEY=VALUE` as people write it, and what it does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardsim.errors import HardwareError, PlanError, expect, nearest, shown
from shardsim.files import parse_yaml
from shardsim.machine import Chip, Machine, override_chip, parse_machine
from shardsim.machine.chip import TIMES
from shardsim.model import load_model, override_model
from shardsim.plan.io import KEYS, PlanOrPath, as_plan, plan_from_data, plan_to_data
from shardsim.plan.layout import ROLES
from shardsim.plan.plan import Plan
from shardsim.plan.resolve import AXIS_NAMES, ROLE_OF, resolve, rules_by_name
from shardsim.planner.presets import usual_residual
from shardsim.units import measure_of, read_number

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
    """Read the value of one key: YAML, or a number with a prefix and a unit.

    >>> parse_value("batch", "64k"), parse_value("chip.link_bytes_per_s", "90GB/s")
    (65536, 90000000000.0)
    """
    if key == "overlap.matmul":
        return text.strip()
    value = parse_yaml(text, key)
    if not isinstance(value, str | float):
        return value
    of_chip = key.startswith("chip.")
    units = measure_of(key)[0] if of_chip else ()
    number = read_number(text, whole=not of_chip, units=units)
    if number is None or key in ("name", "note"):
        return value
    return number if of_chip or not number.is_integer() else int(number)


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


def changed(plan: PlanOrPath, changes: Mapping[str, Any]) -> Plan:
    """Return `plan` with some keys changed.

    Keys are those of a plan file, with dots into it (`overlap.weights`, `rules.activations.seq`);
    `model.*` are the model's options, `chip.*` the chip's figures. `mesh.NAME` takes the size of an
    axis, called by its name or its role, or of one that the plan does not have yet: the mesh is
    laid on the torus anew, and the largest axis that was not named takes up what is left. So it is
    on another slice; the data axis is over what slices there are. `plan` may be a file, or the name
    of a shipped one.
    """
    expect(changes, Mapping, "changes: expected keys with their values")
    plan = as_plan(plan)
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
            sizes[axis_called(plan, rest)] = positive(value, key)
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
    given = [key for key in changes if key == "mesh" or re.match(r"mesh\..*\.", key)]
    if sizes and given:
        raise PlanError(f"{given[0]}: cannot be combined with mesh.{min(sizes)}, a new layout")
    if not sizes and not given and machine.slices != plan.machine.slices:
        sizes = _data_over_slices(plan, machine)
    if sizes or (another and not given):
        mesh = {axis.name: axis.size for axis in plan.mesh}
        for name in [name for name in sizes if name not in mesh]:
            mesh = _with_axis(plan, mesh, name)
            _add_rules(plan, data, name, sizes[name])
        data["mesh"] = _resized(mesh, sizes, machine)
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
        asked = next((key for key, value in figures.items() if isinstance(value, str)), "")
        example = measure_of(asked)[1]
        raise HardwareError(
            f"chip: {str(error).removeprefix('override: ')}"
            f"{f'; such as {example}' if asked in str(error) and example else ''}"
        ) from None
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
        raise PlanError(f"{key}: expected a name, found {shown(value)}")
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


def positive(value: Any, key: str) -> int:
    """Return a positive whole number; raise `PlanError` that names `key` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{key}: must be a positive whole number, not {shown(value)}")
    return value


def axis_called(plan: Plan, word: str) -> str:
    """Return the axis that `mesh.WORD` means: one of that name, of that role, or a new one."""
    mesh = [axis.name for axis in plan.mesh]
    if word in mesh:
        return word
    if word not in ROLE_OF:
        raise PlanError(f"mesh.{word}: no such mesh axis{nearest(word, [*mesh, *ROLE_OF])}")
    role = ROLE_OF[word]
    named = resolve(plan).names[role]
    if len(named) > 1:
        raise PlanError(f"mesh.{word}: {' and '.join(named)} have that role; name one of them")
    if not named and AXIS_NAMES[role] in mesh:
        raise PlanError(f"mesh.{word}: '{AXIS_NAMES[role]}' is an axis of another role")
    return named[0] if named else AXIS_NAMES[role]


def _data_over_slices(plan: Plan, machine: Machine) -> dict[str, int]:
    """Return the data axis over more or fewer slices; nothing where that is not so simple."""
    names = resolve(plan).names["data"]
    if len(names) > 1 or (not names and plan.machine.slices > 1):
        return {}
    name = names[0] if names else axis_called(plan, "data")
    size, rest = divmod(
        machine.slices * (plan.axis(name).size if names else 1), plan.machine.slices
    )
    return {} if rest or size < 1 else {name: size}


def _with_axis(plan: Plan, mesh: Mapping[str, int], name: str) -> dict[str, int]:
    """Return the mesh with a new axis of size 1, roles in their usual order."""
    roles = {axis: role for role, axes in resolve(plan).names.items() for axis in axes}
    inner = ROLES[ROLES.index(ROLE_OF[name]) :]
    at = next((n for n, axis in enumerate(mesh) if roles.get(axis) in inner), len(mesh))
    sizes = [*mesh.items()]
    return dict([*sizes[:at], (name, 1), *sizes[at:]])


def _add_rules(plan: Plan, data: dict[str, Any], name: str, size: int) -> None:
    """Let a new axis split what one of its role usually does; what other axes do stays."""
    residual = usual_residual(plan.model, plan.sequence, {ROLE_OF[name]: size})
    usual = rules_by_name({name}, residual=residual)
    rules = data.setdefault("rules", {})
    for kind, added in zip(("parameters", "activations"), usual[:2], strict=True):
        of_kind = rules.setdefault(kind, {}) if isinstance(rules, dict) else None
        if not isinstance(of_kind, dict):
            return  # something else was set, which is refused where the plan is read
        for logical, axes in added.items():
            before = of_kind.get(logical) or []
            of_kind[logical] = [*(before if isinstance(before, list) else [before]), *axes]


def _resized(mesh: Mapping[str, int], sizes: Mapping[str, int], machine: Machine) -> dict[str, Any]:
    """Return mesh sizes without their places on the torus, the largest other axis adjusted."""
    new = dict(mesh)
    for name, size in sizes.items():
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
