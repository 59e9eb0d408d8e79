"""What one class of chips does: its script, operation by operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shardsim.simulate.chip import Chip, Flight
from shardsim.simulate.clock import Mark, Steps
from shardsim.simulate.operations import (
    Host,
    Op,
    Receive,
    Ring,
    Script,
    Send,
    Spec,
    Start,
    Sync,
    Unit,
    Work,
)

if TYPE_CHECKING:
    from shardsim.simulate.planned import StepEngine


class Stream(Chip):
    """The compute stream of one class of chips."""

    engine: StepEngine

    def __init__(self, engine: StepEngine, number: int) -> None:
        super().__init__(engine, number)
        self.stage = int(engine.stage[self.device])
        self.script: Script = engine.plan.scripts[self.stage]
        self.slow = 1.0
        self.idle_s = 0.0  # waiting for another stage's microbatches
        self.gathers: dict[int, list[Flight]] = {}  # by place in the script
        self.scatters: list[Flight] = []
        self.reductions: list[Flight] = []
        self.reduce_next: tuple[Spec, ...] = ()

    def run(self) -> Steps:
        """Run the whole script."""
        engine = self.engine
        jitter = engine.wanted.draws(self.device, len(self.script.steps))
        for place, step in enumerate(self.script.steps):
            unit = engine.plan.units[step.unit]
            began = self.clock.now
            self.slow = self.speed * jitter[place]
            yield from self._gather(place, unit)
            yield from self._finish(unit)
            yield from self._unit(unit, step.message)
            self.note("unit", unit.name, began, self.clock.now)
        self.ended_s = self.clock.now

    def _gather(self, place: int, unit: Unit) -> Steps:
        """Wait for a unit's own weights, then start on those of units to come."""
        engine, script = self.engine, self.script
        issued = script.issue.get(place, ())
        if place in issued:
            self.gathers[place] = [self.start(spec) for spec in unit.prefetch]
        yield from self.all_of(self.gathers.pop(place, ()))
        for later in issued:
            if later != place:
                ahead = engine.plan.units[script.steps[later].unit]
                self.gathers[later] = [self.start(spec) for spec in ahead.prefetch]

    def _finish(self, unit: Unit) -> Steps:
        """Wait for what must have ended before a reduction or the update."""
        if unit.phase in ("reduction", "update"):
            yield from self.all_of(self.scatters)
            self.scatters = []
            self._reduce()
        if unit.phase == "update":
            yield from self.all_of(self.reductions)

    def _reduce(self) -> None:
        """Start the reductions of gradients that are complete."""
        self.reductions += [self.start(spec) for spec in self.reduce_next]
        self.reduce_next = ()

    def _unit(self, unit: Unit, message: int) -> Steps:
        """Run a unit's operations; its scatters are awaited at the end of the next layer."""
        started: list[Flight] = []
        host: tuple[Host, Mark] | None = None
        for op in unit.ops:
            if isinstance(op, Start):
                started.append(self.start(op.spec))
            elif isinstance(op, Host):
                host = (op, self.clock.timer(op.time_s))
            else:
                yield from self._op(op, message)
        if host is not None:
            yield from self.wait(host[0].name, host[1], host[0].time_s)
        if unit.phase in ("forward", "backward"):
            yield from self.all_of(self.scatters)
            self.scatters = started
            self._reduce()
        else:
            self.scatters += started
        self.reduce_next = (*self.reduce_next, *unit.reduce)

    def _op(self, op: Op, message: int) -> Steps:
        """Run an operation to its end."""
        if isinstance(op, Work):
            yield from self.work(op)
        elif isinstance(op, Sync):
            yield from self.wait(*self.start(op.spec))
        elif isinstance(op, Ring):
            yield from self.ring(op)
        elif isinstance(op, Send):
            yield from self.send(op, message)
        elif isinstance(op, Receive):
            yield from self.receive(op, message)

    def work(self, op: Work) -> Steps:
        """Compute."""
        if self.engine.watch is not None:
            begin = self.clock.now
            for name, seconds in op.parts:
                self.note("compute", name, begin, begin + seconds * self.slow)
                begin += seconds * self.slow
        yield op.time_s * self.slow

    def all_of(self, flights: Iterable[Flight]) -> Steps:
        """Wait for collectives in turn."""
        for spec, done in flights:
            yield from self.wait(spec, done)

    def send(self, op: Send, message: int) -> Steps:
        """Send a microbatch to the chip at the same place in another stage."""
        engine, role = self.engine, op.spec.role
        done = engine.traveller.mail(
            role, self.group[role], op.spec.name, op.leg, message, op.spec.bytes
        )
        self._count(op.spec, done, 1)
        yield from self.wait(op.spec, done)

    def receive(self, op: Receive, message: int) -> Steps:
        """Wait for a microbatch from another stage."""
        before = self.clock.now
        yield self.engine.traveller.mailbox("pipeline", self.group["pipeline"], op.leg, message)
        self.idle_s += self.clock.now - before

    def ring(self, op: Ring) -> Steps:
        """Run a collective matmul: hops beside blocks."""
        engine = self.engine
        begin = self.clock.now
        role, group, name = op.spec.role, self.group[op.spec.role], op.spec.name
        beside = engine.traveller.hop(role, group, name, op.leg, op.hop_bytes)
        # The way back on a line delays the first of hops in one direction.
        closing = engine.traveller.hop(role, group, name, "closing+", op.hop_bytes)
        if op.before:
            yield engine.traveller.meet(role, group, self._key(), closing)
        blocks_s = op.block_s * op.blocks * self.slow
        for number in range(op.rounds):
            hop = None
            if op.beside_last or number < op.rounds - 1:
                first = number == 0 and op.leg == "ring+"
                go = closing if first else beside
                hop = engine.traveller.meet(role, group, self._key(), go)
            if engine.watch is not None:
                now = self.clock.now
                self.note("compute", f"{op.partners}, blocks", now, now + blocks_s)
            yield blocks_s
            if hop is not None:
                yield hop
        if op.after:
            yield engine.traveller.meet(role, group, self._key(), closing)
        passed = self.clock.now - begin
        self.note(role, name, begin, begin + passed, group)
        engine.waited[op.spec] += (passed - op.whole_s * self.slow) * self.weight
        engine.flown[op.spec] += passed * self.weight
        engine.counts[op.spec] += self.weight
