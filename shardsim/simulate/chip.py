"""One class of chips as a process: how it meets its groups, waits, and tells who watches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import simpy

from shardsim.simulate.collective import Span, Steps
from shardsim.simulate.operations import Spec
from shardsim.simulate.traffic import traffic

if TYPE_CHECKING:
    from shardsim.simulate.engine import Engine

Flight = tuple[Spec, simpy.Event]  # a collective under way, and its end


class Chip:
    """One class of chips that do everything at the same time."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.env = engine.env
        self.number = number
        self.device = int(engine.folded.devices[number])
        self.speed = float(engine.speed[self.device])
        self.weight = float(engine.folded.device_counts[number]) / engine.topology.devices
        self.met = 0
        self.group = {role: engine.folded.group_of(role, number) for role in engine.groups}
        self.ended_s = 0.0

    def run(self) -> Steps:
        """Run the whole step."""
        raise NotImplementedError

    def start(self, spec: Spec) -> Flight:
        """Meet the group for a collective."""
        engine, group = self.engine, self.group[spec.role]
        moved = engine.traffic.get(spec)
        if moved is None:
            groups = engine.groups[spec.role]
            moved = traffic(spec.kind, groups, spec.bytes, spec.stage, spec.shifts)
            engine.traffic[spec] = moved
        go = engine.traveller.collective(
            spec.role, group, spec.name, moved, spec.messages, spec.sent_bytes, spec.repeat
        )
        done = engine.traveller.meet(spec.role, group, self._key(), go)
        self._count(spec, done, spec.repeat)
        return spec, done

    def _count(self, spec: Spec, done: simpy.Event, repeat: int) -> None:
        """Count a collective, and the time from now until it has landed."""
        engine = self.engine
        began = float(self.env.now)
        engine.counts[spec] += self.weight * repeat

        def landed(_: simpy.Event) -> None:
            engine.flown[spec] += (float(self.env.now) - began) * self.weight

        assert done.callbacks is not None
        done.callbacks.append(landed)

    def wait(self, spec: Spec | str, done: simpy.Event, flown_s: float | None = None) -> Steps:
        """Wait for what was started."""
        before = float(self.env.now)
        yield done
        self.engine.waited[spec] += (float(self.env.now) - before) * self.weight
        if flown_s is not None:
            self.engine.flown[spec] += flown_s * self.weight
            self.engine.counts[spec] += self.weight

    def _key(self) -> int:
        self.met += 1
        return self.met

    def note(
        self, role: str, name: str, start_s: float, end_s: float, group: int | None = None
    ) -> None:
        """Tell who watches."""
        if self.engine.watch is not None and end_s > start_s:
            number = self.number if group is None else group
            span = Span(name=name, role=role, group=number, start_s=start_s, end_s=end_s, bytes=0.0)
            self.engine.watch(span)
