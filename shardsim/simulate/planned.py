"""A planned Program on the machine: every chip runs the script of its pipeline stage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shardsim.cost.costs import costs_of
from shardsim.cost.network import Links as GroupLinks
from shardsim.cost.predict import CollectiveUse, Prediction, collective_uses
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.simulate.collective import Span
from shardsim.simulate.engine import Engine
from shardsim.simulate.groups import Groups
from shardsim.simulate.operations import Schedule
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.schedule import schedule
from shardsim.simulate.stream import Stream
from shardsim.simulate.topology import Floats
from shardsim.simulate.traffic import leg_names


class StepEngine(Engine):
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
        super().__init__(machine, wanted, watch)
        self.layout = layout
        self.plan: Schedule = schedule(
            costs_of(analytic.costs, machine.chip),
            layout,
            analytic.program,
            GroupLinks(machine, layout),
        )
        groups, legs = self._groups()
        self.stage = np.zeros(self.topology.devices, dtype=np.int64)
        if len(self.plan.scripts) > 1:
            self.stage = groups["pipeline"].places()
        self.lay(groups, legs, self.stage, unfold)

    def _groups(self) -> tuple[dict[str, Groups], dict[str, tuple[str, ...]]]:
        found: dict[str, Groups] = {}
        legs: dict[str, tuple[str, ...]] = {}
        for role, wanted in self.plan.legs.items():
            item = Groups(self.topology, self.layout.role(role), role)
            names: set[str] = set()
            for entry in wanted:
                kind, at, stage = entry.partition("@")
                if at:
                    names |= leg_names(kind, item, stage)
                else:
                    names.add(entry)
            found[role] = item
            legs[role] = tuple(sorted(names))
        return found, legs

    def run(self) -> None:
        """Simulate the step."""
        self.streams = [Stream(self, number) for number in range(len(self.folded.devices))]
        self.play(self.streams)

    def where(self, role: str) -> str:
        """Return the mesh axes of a role's groups in words."""
        return "+".join(self.layout.mesh_axes(role)) or role

    def layers(self) -> tuple[str, ...]:
        """Return the names of the units that a picture of one layer shows."""
        return ("layer forward", "layer backward")

    def uses(self, analytic: Prediction) -> tuple[CollectiveUse, ...]:
        """Return the collectives, summed as in the analytic prediction."""
        sums: dict[tuple[str, tuple[str, ...], str], Floats] = {}
        for spec, count in self.counts.items():
            if isinstance(spec, str):
                key: tuple[str, tuple[str, ...], str] = ("host-transfer", (), "activations")
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

    def bubble_s(self) -> float:
        """Return the seconds in which a chip of the last stage waits for other stages."""
        last = [stream for stream in self.streams if stream.stage == len(self.plan.scripts) - 1]
        idle = sum(
            (stream.idle_s + self.step_time_s - stream.ended_s) * stream.weight for stream in last
        )
        return idle / sum(stream.weight for stream in last)
