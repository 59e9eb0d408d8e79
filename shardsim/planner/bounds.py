"""A lower bound on the step time of all plans that differ only in where roles lie.

What operations take and what is sent depends on the sizes of roles. So a plan is never faster than
one with the same sizes whose every role has the best links that any of the meshes gives it, all at
once, and shares them only with those that it shares them with everywhere
(`cost.price.least_step_s`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shardsim.cost.lines import LayoutLines, Line, Wires, line_key
from shardsim.machine import Machine
from shardsim.plan.layout import Layout, Number
from shardsim.planner.meshes import Array, Meshes
from shardsim.program.schedule import Move


class BestLines:
    """The least that moves take on any mesh of a form: arrays of shape [forms, 1, 1]."""

    def __init__(self, machines: Sequence[Machine], meshes: Meshes) -> None:
        self._meshes = meshes
        self._many = np.bincount(meshes.machine, minlength=len(machines))
        own = np.split(np.arange(len(meshes.machine)), np.cumsum(self._many)[:-1])
        axes: list[dict[str, Any]] = [meshes.axes(index) for index in own]
        pairs = zip(machines, axes, strict=True)
        self._lines = [LayoutLines(machine, Layout(**of)) for machine, of in pairs]
        self._known: dict[Any, Line] = {}

    def line(self, task: Move) -> Line:
        """Return the least seconds of a byte, and of a message, of moves like `task`."""
        key = line_key(task)
        if key not in self._known:
            byte, message = zip(*(lines.line(task) for lines in self._lines), strict=True)
            self._known[key] = self._least(byte), self._least(message)
        return self._known[key]

    def shared(self, one: Wires, other: Wires) -> Number:
        """Return whether links carry traffic of both on all meshes of a form."""
        key = one, other
        if key not in self._known:
            self._known[key] = self._least([it.shared(one, other) for it in self._lines]), 0
        return self._known[key][0]

    def _least(self, values: Sequence[Number]) -> Number:
        """Return the least of each form, of a value for each machine's meshes."""
        if all(np.ndim(value) == 0 for value in values) and len(set(values)) == 1:
            return values[0]
        each = [
            np.broadcast_to(value, (many, 1, 1))
            for value, many in zip(values, self._many, strict=True)
        ]
        meshes = self._meshes
        return np.minimum.reduceat(np.concatenate(each)[meshes.by_form], meshes.starts)


class FormLines:
    """The best lines of some forms, in the order in which a part of the space has them."""

    def __init__(self, best: BestLines, forms: Array) -> None:
        self._best = best
        self._forms = forms

    def line(self, task: Move) -> Line:
        """Return the least seconds of a byte, and of a message, of moves like `task`."""
        byte, message = self._best.line(task)
        return self._of(byte), self._of(message)

    def shared(self, one: Wires, other: Wires) -> Number:
        """Return whether links carry traffic of both on all meshes of a form."""
        return self._of(self._best.shared(one, other))

    def _of(self, value: Number) -> Number:
        return value if np.ndim(value) == 0 else value[self._forms]
