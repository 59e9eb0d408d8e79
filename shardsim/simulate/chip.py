"""One class of chips: how it meets its groups, waits, and tells who watches."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from shardsim.simulate.clock import Mark, Steps
from shardsim.simulate.collective import Span
from shardsim.simulate.operations import Spec

if TYPE_CHECKING:
    from shardsim.simulate.engine import Engine

Flight = tuple[Spec, Mark]  # a collective under way, and its end


class Chip:
    """One class of chips that do everything at the same time."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.clock = engine.clock
        self.number = number
        self.device = int(engine.folded.devices[number])
        self.speed = float(engine.speed[self.device])
        self.weight = float(engine.folded.device_counts[number]) / engine.topology.devices
        self.met: Counter[str] = Counter()  # by role: stages differ in what else they do
        self.group = {role: engine.folded.group_of(role, number) for role in engine.groups}
        self.ended_s = 0.0

    def run(self) -> Steps:
        """Run the whole step."""
        raise NotImplementedError

    def start(self, spec: Spec) -> Flight:
        """Meet the group for a collective."""
        traveller, group = self.engine.traveller, self.group[spec.role]
        done = traveller.meet(
            spec.role, group, self._key(spec.role), self.engine.course(spec, group)
        )
        self._count(spec, done, spec.repeat)
        return spec, done

    def _count(self, spec: Spec, done: Mark, repeat: int) -> None:
        """Count a collective, and the time from now until it has landed."""
        self.engine.counts[spec] += self.weight * repeat
        done.then(partial(self._landed, spec, self.clock.now))

    def _landed(self, spec: Spec, began_s: float) -> None:
        self.engine.flown[spec] += (self.clock.now - began_s) * self.weight

    def wait(self, spec: Spec | str, done: Mark, flown_s: float | None = None) -> Steps:
        """Wait for what was started."""
        before = self.clock.now
        yield done
        self.engine.waited[spec] += (self.clock.now - before) * self.weight
        if flown_s is not None:
            self.engine.flown[spec] += flown_s * self.weight
            self.engine.counts[spec] += self.weight

    def _key(self, role: str) -> int:
        self.met[role] += 1
        return self.met[role]

    def note(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Tell who watches."""
        if self.engine.watch is not None and end_s > start_s:
            self.engine.watch(
                Span(
                    name=name, role=role, group=self.number, start_s=start_s, end_s=end_s, bytes=0.0
                )
            )
