"""A planned Schedule on the machine: its collectives as a prediction shows them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.meshlinks import RoleLinks
from shardsim.cost.predict import CollectiveUse, Prediction, collective_uses
from shardsim.cost.task_times import TaskTimes
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.program.schedule import Copy, every
from shardsim.simulate.collective import Span
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.player import TapeEngine
from shardsim.simulate.topology import Floats


class StepEngine(TapeEngine):
    """One run of a plan's step."""

    def __init__(
        self,
        machine: Machine,
        layout: Layout,
        analytic: Prediction,
        wanted: Perturbation,
        unfold: bool,
        watch: Callable[[Span], None] | None,
    ) -> None:
        times = TaskTimes(costs_of(analytic.costs, machine.chip), RoleLinks(machine, layout))
        super().__init__(machine, times, analytic.schedule, wanted, unfold, watch)
        self.layout = layout

    def where(self, role: str) -> str:
        """Return the mesh axes of a role's groups in words."""
        return "+".join(self.layout.mesh_axes(role)) or role

    def uses(self, analytic: Prediction) -> tuple[CollectiveUse, ...]:
        """Return the collectives, summed as in the analytic prediction."""
        sums: dict[tuple[str, tuple[str, ...], str], Floats] = {}
        tasks = [task for block in self.schedule.blocks for task, _, _ in every(block.tasks)]
        copied = {task.name: task.moves for task in tasks if isinstance(task, Copy)}
        for spec, count in self.counts.items():
            if count == 0:  # of stages that are not shown
                continue
            if isinstance(spec, str):
                key: tuple[str, tuple[str, ...], str] = ("host-transfer", (), copied[spec])
                sent = 0.0
            else:
                key = (spec.kind, self.layout.mesh_axes(spec.role), spec.moves)
                sent = spec.sent_bytes
            row = np.array([sent * count, count, self.flown[spec], self.waited[spec]])
            sums[key] = sums.get(key, np.zeros(4)) + row
        for use in analytic.collectives:
            key = (use.kind, use.mesh_axes, use.purpose)
            if use.kind == "host-transfer" and key in sums:
                sums[key][0] = use.bytes_per_chip
        return collective_uses(sums)
