"""Laying mesh axes on the torus when a plan does not say how."""

from __future__ import annotations

from itertools import combinations
from math import gcd

from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.plan.plan import MeshAxis


def place(sizes: dict[str, int], machine: Machine) -> tuple[MeshAxis, ...]:
    """Assign each mesh axis (major to minor) factors of the torus axes.

    As `jax.experimental.mesh_utils.create_device_mesh` does: the last axis is placed first, on as
    many whole torus axes as possible, because more axes carry more traffic. Where no set of whole
    axes fits, this function goes on and splits them, longest first, which that one refuses. The
    axis of slices goes to the first mesh axes that divide it.

    >>> from shardsim.machine import parse_machine
    >>> [dict(axis.torus) for axis in place({"data": 128, "model": 8}, parse_machine("v4:8x8x16"))]
    [{'x': 8, 'z': 16}, {'y': 8}]
    """
    product = 1
    for size in sizes.values():
        product *= size
    if product != machine.devices:
        of = f" on {machine.chips} chips" if machine.chips != machine.devices else ""
        raise PlanError(
            f"mesh: its axes multiply to {product}, but {machine.name} has {machine.devices} "
            f"devices{of}"
        )
    slices = machine.slices
    torus: dict[str, dict[str, int]] = {name: {} for name in sizes}
    inside = dict(sizes)
    for name, size in sizes.items():
        if (part := gcd(slices, size)) > 1:
            torus[name]["dcn"] = part
            inside[name] //= part
            slices //= part
    free = {axis.name: axis.length for axis in machine.axes if axis.length > 1}
    order = list(free)
    for name in reversed(list(sizes)):
        torus[name] |= _take(inside[name], free, order, name, machine)
    return tuple(MeshAxis(name=name, size=size, torus=torus[name]) for name, size in sizes.items())


def _take(
    size: int, free: dict[str, int], order: list[str], name: str, machine: Machine
) -> dict[str, int]:
    """Take `size` devices out of what is `free` of each torus axis."""
    if size == 1:
        return {}
    lengths = {axis.name: axis.length for axis in machine.axes}
    whole = [axis for axis in reversed(order) if free[axis] == lengths[axis]]
    for count in range(len(whole), 0, -1):
        for chosen in combinations(whole, count):
            product = 1
            for axis in chosen:
                product *= free[axis]
            if product == size:
                taken = {axis: free[axis] for axis in order if axis in chosen}
                for axis in chosen:
                    free[axis] = 1
                return taken
    taken = {}
    left = size
    for axis in sorted(order, key=lambda axis: -free[axis]):
        part = gcd(left, free[axis])
        if part > 1:
            taken[axis] = part
            free[axis] //= part
            left //= part
    if left != 1:
        raise PlanError(
            f"mesh.{name}: size {size} is not a product of what is left of the torus of "
            f"{machine.name}"
        )
    return {axis: taken[axis] for axis in order if axis in taken}
