"""The mesh of a program that says no more than which devices its collectives join.

Newer texts name it in their groups (`mesh['data'=4,'fsdp'=64] {'fsdp'}`). Elsewhere the coarsest
mesh is taken on which every group is a grid: devices are numbered row-major on it, so the strides
and sizes of groups are products of its minor axes.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.plan.layout import ROLES, Layout, whole_axis
from shardsim.plan.placement import place
from shardsim.plan.plan import MeshAxis
from shardsim.plan.resolve import axis_layout
from shardsim.xla.hlo.errors import HloError, small_number
from shardsim.xla.hlo.groups import parse_groups, parse_pairs, permute_of
from shardsim.xla.hlo.module import Instruction, Module
from shardsim.xla.hlo.opcodes import KINDS

_WRITTEN = re.compile(r"mesh\[([^\]]*)\](?!, device_ids)")
_LISTED = re.compile(r"\{(?:\{\d+(?:,\d+)*\},?)+\}")
_ID = re.compile(r"\d+")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_MADE = re.compile(r"axis_\d+")  # the compiler's own names
_GIVEN = re.compile(r"([A-Za-z_]\w*)=(\d{1,9})")


def devices_of(module: Module) -> int:
    """Return how many devices run a module; raise `HloError` where partitions are replicated."""
    partitions = module.partitions or 1
    if partitions > 1 and module.replicas > 1:
        raise HloError(f"{module.replicas} replicas of {partitions} partitions are not understood")
    if module.partitions is None and module.replicas == 1:
        return _most_listed(module)
    return max(partitions, module.replicas, 1)


def _most_listed(module: Module) -> int:
    """Return how many devices the listed groups of a text are of that says nothing else."""
    most = 1
    for item in _items(module):
        for key in ("replica_groups", "source_target_pairs"):
            if _LISTED.fullmatch(text := item.attributes.get(key, "")):
                most = max(most, *(small_number(number, 0) + 1 for number in _ID.findall(text)))
    return most


def read_mesh(text: str) -> dict[str, int]:
    """Return the mesh that a person writes, major axis first.

    >>> read_mesh("data=4,fsdp=64")
    {'data': 4, 'fsdp': 64}
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _GIVEN.fullmatch(part.strip())
        if not match or match[1] in found or int(match[2]) < 1:
            raise PlanError(f"--mesh: {part[:40]!r} is no axis; write data=4,fsdp=64, major first")
        found[match[1]] = int(match[2])
    return found


def mesh_of(module: Module) -> tuple[dict[str, int], bool]:
    """Return a module's mesh, and whether its names are the program's own."""
    devices = devices_of(module)
    if written := _written(module, devices):
        return written, True
    return _of_groups(module, devices), False


def _items(module: Module) -> Iterator[Instruction]:
    for computation in module.computations.values():
        yield from computation.instructions.values()


def _written(module: Module, devices: int) -> dict[str, int]:
    """Return the mesh that a group or an argument's sharding names."""
    for item in _items(module):
        for key in ("replica_groups", "sharding"):
            match = _WRITTEN.search(item.attributes.get(key, ""))
            named = dict(_AXIS.findall(match[1])) if match else {}
            if not named or any(_MADE.fullmatch(name) for name in named):
                continue
            sizes = {name: small_number(size, 0) for name, size in named.items()}
            if math.prod(sizes.values()) == devices:
                return {name: size for name, size in sizes.items() if size > 1} or {"devices": 1}
    return {}


def _of_groups(module: Module, devices: int) -> dict[str, int]:
    """Return the coarsest mesh on which groups are grids and permutes stay on one axis."""
    texts: dict[str, dict[str, None]] = {"replica_groups": {}, "source_target_pairs": {}}
    for item in _items(module):
        if item.opcode.removesuffix("-start") in KINDS:
            for key, known in texts.items():
                known[item.attributes.get(key, "")] = None
    points: set[int] = set()
    for text in filter(None, texts["replica_groups"]):
        with contextlib.suppress(HloError):  # told with its line when it is read
            points.update(_group_points(text, devices))
    mesh = _mesh_of_points(points, devices)
    for text in filter(None, texts["source_target_pairs"]):
        with contextlib.suppress(HloError):
            if len(permute_of(text, mesh).axes) > 1:
                points.update(_pair_points(text, devices))
    return _mesh_of_points(points, devices)


def _mesh_of_points(points: set[int], devices: int) -> dict[str, int]:
    """Return the mesh whose minor axes multiply to each of `points` that divides the next."""
    chain = [1]
    for point in sorted(points | {devices}):
        if point > chain[-1] and point % chain[-1] == 0 and devices % point == 0:
            chain.append(point)
    sizes = [high // low for low, high in pairwise(chain)][::-1]
    if len(sizes) < 2:
        return {"devices": devices}
    return {f"axis{number}": size for number, size in enumerate(sizes)}


def _group_points(text: str, devices: int) -> Iterator[int]:
    """Yield stride and reach of each axis along which the members of a group differ."""
    row = np.sort(parse_groups(text, devices)[0])
    steps = row - row[0]
    while len(steps) > 1:
        stride = int(steps[1])
        lined = steps == stride * np.arange(len(steps))
        members = len(steps) if lined.all() else int(np.argmin(lined))
        if len(steps) % members:
            return
        yield stride
        yield stride * members
        steps = steps[::members]


def _pair_points(text: str, devices: int) -> Iterator[int]:
    """Yield stride and reach of a ring: its steps are the stride, and back over the whole of it."""
    pairs = parse_pairs(text, devices)
    steps = np.unique(np.abs(pairs[:, 1] - pairs[:, 0]))
    steps = steps[steps > 0]
    if len(steps) == 1:
        yield int(steps[0])
    elif len(steps) == 2 and steps[1] % steps[0] == 0:
        yield int(steps[0])
        yield int(steps[0] + steps[1])


def _devices(many: int) -> str:
    return f"{many:,} device{'s' if many != 1 else ''}"


def placed(mesh: dict[str, int], machine: Machine) -> tuple[MeshAxis, ...]:
    """Return the mesh laid on the torus as JAX's `create_device_mesh` lays it."""
    devices = math.prod(mesh.values())
    if devices != machine.devices:
        raise PlanError(
            f"the program is for {_devices(devices)}, but {machine.name} has {machine.devices:,}; "
            f"name a slice of {_devices(devices)} with --on"
        )
    return place(mesh, machine)


def layout_of(machine: Machine, axes: Sequence[MeshAxis]) -> Layout:
    """Return a layout in which each axis of a mesh is a role of its own."""
    used = [axis for axis in axes if axis.size > 1]
    if len(used) > len(ROLES):
        raise PlanError(f"mesh: {len(used)} axes; more than {len(ROLES)} are not understood")
    none = whole_axis(len(machine.axes))
    roles: dict[str, Any] = dict.fromkeys(ROLES, none)
    names: dict[str, tuple[str, ...]] = {}
    for role, axis in zip(ROLES, used, strict=False):
        roles[role] = axis_layout(machine, axes, [axis.name])
        names[role] = (axis.name,)
    return Layout(**roles, names=names)
