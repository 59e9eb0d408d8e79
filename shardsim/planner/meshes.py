"""Every way to give the torus axes of machines to roles, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from shardsim.machine import Machine, TorusAxis
from shardsim.plan.layout import ROLES, AxisLayout

Array = np.ndarray[Any, Any]

SLICE_ROLES = ("data", "fsdp", "pipeline")


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Meshes of machines, and the forms that they have: of which machine they are, how large each
    role is, and which of them lie over slices. Meshes of one form differ only in where roles lie.
    """

    factors: Array  # [meshes, torus axes, roles]
    slices: Array  # [meshes, roles]
    machine: Array  # [meshes]: the number of the machine of each

    @cached_property
    def sizes(self) -> Array:
        """Sizes of roles: [meshes, roles]."""
        return np.asarray(self.factors.prod(axis=1) * self.slices)

    @cached_property
    def form(self) -> Array:
        """The number of each mesh's form: [meshes]."""
        number: Array = np.zeros(len(self.slices), dtype=np.int64)
        for column in (self.machine, *self.sizes.T, *self.slices.T):
            values, place = np.unique(column, return_inverse=True)
            _, number = np.unique(number * len(values) + place, return_inverse=True)
        return number

    @cached_property
    def by_form(self) -> Array:
        """Meshes sorted by form, those of one form in order."""
        return np.argsort(self.form, kind="stable")

    @cached_property
    def many(self) -> Array:
        """How many meshes have a form: [forms]."""
        return np.bincount(self.form)

    @cached_property
    def starts(self) -> Array:
        """Where the meshes of a form start in `by_form`: [forms]."""
        return np.cumsum(self.many) - self.many

    def take(self, index: Any) -> Meshes:
        """Return some of them."""
        return Meshes(
            factors=self.factors[index], slices=self.slices[index], machine=self.machine[index]
        )

    def axes(self, index: Any = slice(None)) -> dict[str, AxisLayout]:
        """Return the roles of some meshes, as arrays of shape [meshes, 1, 1]."""
        factors, slices = self.factors[index], self.slices[index]
        found: dict[str, AxisLayout] = {}
        reached, passed = np.ones_like(factors[..., 0]), np.ones_like(slices[..., 0])
        for number in reversed(range(len(ROLES))):
            own = factors[..., number]
            strides = np.where(own > 1, reached, 1)
            found[ROLES[number]] = AxisLayout(
                factors=tuple(column[:, None, None] for column in own.T),
                strides=tuple(column[:, None, None] for column in strides.T),
                slices=slices[:, number, None, None],
                slice_stride=np.where(slices[:, number] > 1, passed, 1)[:, None, None],
            )
            reached, passed = reached * own, passed * slices[:, number]
        return found


def axis_options(axis: TorusAxis, experts: bool) -> Array:
    """Return the ways to give one torus axis to roles: [ways, roles], factors of each role; one is
    only there for models with `experts`."""
    ways = []
    roles = [number for number, role in enumerate(ROLES) if experts or role != "expert"]
    for role in roles:
        row = [1] * len(ROLES)
        row[role] = axis.length
        ways.append(row)
    splits = [size for size in range(2, axis.length) if axis.length % size == 0]
    for outer, inner in combinations(roles, 2):
        for size in splits:
            row = [1] * len(ROLES)
            row[inner] = size
            row[outer] = axis.length // size
            ways.append(row)
    return np.array(ways if axis.length > 1 else [[1] * len(ROLES)])


def meshes(machine: Machine, max_axes: int, experts: bool = False) -> Meshes:
    """Return every mesh, for a model with `experts` or without.

    Inside a slice at most `max_axes` roles have a size above one.
    """
    factors: Array = np.zeros((1, 0, len(ROLES)), dtype=np.int64)
    last: Array = np.zeros(1, dtype=np.int64)
    before: TorusAxis | None = None
    for axis in machine.axes:
        ways = axis_options(axis, experts)
        count = len(ways)
        old = np.repeat(np.arange(len(factors)), count)
        new = np.tile(np.arange(count), len(factors))
        alike = (
            before is not None and before.length == axis.length and before.wrapped == axis.wrapped
        )
        if alike:
            keep = new >= last[old]
            old, new = old[keep], new[keep]
        factors = np.concatenate([factors[old], ways[new][:, None, :]], axis=1)
        # Only few roles at a time: cut as early as possible.
        few = (factors.prod(axis=1) > 1).sum(axis=1) <= max_axes
        factors, last = factors[few], new[few]
        before = axis
    slices = np.ones((1, len(ROLES)), dtype=np.int64)
    if machine.slices > 1:
        slices = np.ones((len(SLICE_ROLES), len(ROLES)), dtype=np.int64)
        for row, role in enumerate(SLICE_ROLES):
            slices[row, ROLES.index(role)] = machine.slices
    many = len(factors)
    factors = np.repeat(factors, len(slices), axis=0)
    slices = np.tile(slices, (many, 1))
    return Meshes(factors=factors, slices=slices, machine=np.zeros(len(slices), dtype=np.int64))


def of_all(machines: Sequence[Machine], max_axes: int, experts: bool) -> Meshes:
    """Return the meshes of machines whose chips have equally many torus axes."""
    found = [meshes(machine, max_axes, experts) for machine in machines]
    return Meshes(
        factors=np.concatenate([one.factors for one in found]),
        slices=np.concatenate([one.slices for one in found]),
        machine=np.repeat(np.arange(len(found)), [len(one.slices) for one in found]),
    )
