"""What moves take on the links of a layout: seconds of a byte and a message, and who shares them.

The time of any move is linear in both, so all that a schedule needs to know of where roles lie on a
machine is a line for each kind of move, and which groups use the same links.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from shardsim.cost.collectives import move_s
from shardsim.cost.network import Group, Links, group_of
from shardsim.machine import Machine
from shardsim.plan.layout import AxisLayout, Layout, Number
from shardsim.program.schedule import Copy, Move

HOST = "host"
# What is an all-gather, once or twice, in time: see `cost/collectives.py`.
ONE_WAY = {"reduce-scatter": 1, "all-reduce": 2}

Line = tuple[Number, Number]  # seconds of a byte, seconds of a message


@dataclass(frozen=True)
class Wires:
    """Links that moves use: those of a role's groups, all of them or a part (`Move.stage`)."""

    role: str
    stage: str


def wires_of(task: Move | Copy) -> Wires:
    """Return what a move keeps busy."""
    if isinstance(task, Copy):
        return Wires(HOST, "")
    return Wires(task.role, task.stage if task.stage in ("torus", "dcn") else "all")


class Lines(Protocol):
    """The links of roles, as a schedule sees them."""

    def line(self, task: Move) -> Line:
        """Return the seconds of a byte and of a message of moves like `task`."""

    def shared(self, one: Wires, other: Wires) -> Number:
        """Return whether some link carries traffic of both."""


class LayoutLines:
    """The lines of a layout on a machine."""

    def __init__(self, machine: Machine, layout: Layout) -> None:
        self.layout = layout
        self.links = Links(machine, layout)
        self._lines: dict[tuple[str, str, str, int], Line] = {}
        self._shared: dict[tuple[Wires, Wires], Number] = {}

    def line(self, task: Move) -> Line:
        """Return the seconds of a byte and of a message of moves like `task`."""
        key = line_key(task)
        if key not in self._lines:
            if twice := ONE_WAY.get(task.kind):
                per_byte, per_message = self.line(replace(task, kind="all-gather"))
                self._lines[key] = twice * per_byte, twice * per_message
            else:
                group = self._inside(task.role) if inside(task) else self.links[task.role]
                byte, message = (replace(task, bytes=many, messages=1 - many) for many in (1, 0))
                self._lines[key] = move_s(group, byte), move_s(group, message)
        return self._lines[key]

    def _inside(self, role: str) -> Group:
        return group_of(self.links.machine, replace(self.layout.role(role), slices=1))

    def shared(self, one: Wires, other: Wires) -> Number:
        """Return whether some link carries traffic of both."""
        if (one, other) not in self._shared:
            self._shared[one, other] = self._sharing(one, other)
        return self._shared[one, other]

    def _sharing(self, one: Wires, other: Wires) -> Number:
        if HOST in (one.role, other.role):
            return one == other
        if one == other:
            return True
        mine, theirs = self.layout.role(one.role), self.layout.role(other.role)
        stages = {one.stage, other.stage}
        torus: Number = "dcn" not in stages and mine.shares_links_with(theirs)
        return torus | ("torus" not in stages and _several(mine) & _several(theirs))


def inside(task: Move) -> bool:
    """Return whether it goes to a neighbour in the same slice, though its group has several."""
    return task.kind == "permute" and task.stage == "torus"


def line_key(task: Move) -> tuple[str, str, str, int]:
    """Return what moves have in common that take alike long for a byte and for a message."""
    return task.role, task.kind, task.stage, task.ways


def _several(axis: AxisLayout) -> Number:
    return np.greater(axis.slices, 1)
