"""Chips that play the tape of a compiled Program.

A chip runs ahead of the engine's clock through all that needs no other chip, and lets the clock
catch up where it meets its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from shardsim.cost.replay import Trip
from shardsim.cost.task_times import TaskTimes, Transfers
from shardsim.machine import Machine
from shardsim.program.tasks import Program
from shardsim.simulate.chip import Chip, Flight
from shardsim.simulate.clock import Mark, Steps
from shardsim.simulate.collective import Span
from shardsim.simulate.engine import Engine
from shardsim.simulate.operations import Spec, Start, Sync
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.tape import Copy, End, HostCopy, Run, TapeOp, TapeWriter

State = tuple[int, frozenset[str]]  # a block, and what has ended but was not awaited yet


class TapeEngine(Engine):
    """One run of a compiled step."""

    def __init__(
        self,
        machine: Machine,
        times: TaskTimes,
        program: Program,
        wanted: Perturbation,
        unfold: bool,
        watch: Callable[[Span], None] | None,
    ) -> None:
        super().__init__(machine, wanted, watch)
        self.program = program
        self.tape = TapeWriter(self.topology, times).tape(program)
        kinds = np.zeros(self.topology.devices, dtype=np.int64)
        self.lay(self.tape.groups, self.tape.legs, kinds, unfold)
        self.trips = [Trip() for _ in program.blocks]  # means over all chips
        self.known: dict[State, tuple[float, list[dict[Any, float]]]] = {}

    def run(self) -> None:
        """Simulate the step; who ends before the last chip waits for it."""
        players = [Player(self, number) for number in range(len(self.folded.devices))]
        self.play(players)
        for player in players:
            left = self.step_time_s - player.ended_s
            self.trips[self.tape.order[-1]].parts["exposed_comm_s"] += left * player.weight

    def where(self, role: str) -> str:
        """Return the mesh axes of a role's groups in words."""
        return role

    def layers(self) -> tuple[str, ...]:
        """Return the names of the blocks that take longest, forward and backward."""
        found = []
        for phase in ("forward", "backward"):
            blocks = zip(self.program.blocks, self.trips, strict=True)
            times = {b.name: sum(trip.parts.values()) for b, trip in blocks if b.phase == phase}
            if times:
                found.append(max(times, key=lambda name: times[name]))
        return tuple(found)

    def alike(self) -> bool:
        """Return whether a trip that begins with nothing under way is like every other such trip:
        there is one class of chips, whose speed never changes, and nobody wants to watch."""
        return len(self.folded.devices) == 1 and self.wanted.jitter == 0 and self.watch is None

    def sums(self, number: int) -> Iterable[dict[Any, float]]:
        """Return all that a trip through a block adds to."""
        trip = self.trips[number]
        return (trip.parts, trip.exposed, self.waited, self.flown, self.counts, *self.links.sums)


class Player(Chip):
    """The compute stream and the transfers of one class of chips."""

    engine: TapeEngine

    def __init__(self, engine: TapeEngine, number: int) -> None:
        super().__init__(engine, number)
        self.ahead_s = 0.0  # of the engine's clock
        self.flights: dict[str, Flight] = {}
        self.host: dict[str, float] = {}  # transfers to or from the host: when they end
        self.host_free_s = 0.0
        self.transfers = Transfers()
        self.trip = Trip()

    @property
    def now(self) -> float:
        """Seconds on the chip's own clock."""
        return self.clock.now + self.ahead_s

    def run(self) -> Steps:
        """Play the whole tape."""
        engine = self.engine
        order = engine.tape.order
        draws = engine.wanted.draws(self.device, len(order))
        alike = engine.alike()
        for number, draw in zip(order, draws, strict=True):
            began = self.now
            if alike:
                yield from self._remembered(number)
            else:
                yield from self._block(number, self.speed * draw)
            self.note("unit", engine.tape.names[number], began, self.now)
        yield from self._catch_up()
        self.ended_s = self.clock.now

    def _remembered(self, number: int) -> Steps:
        """Play a block, or add what an equal trip through it took."""
        engine = self.engine
        yield from self._catch_up()
        before = self._idle()
        known = None if before is None else engine.known.get((number, before))
        if known is not None:
            passed, added = known
            yield passed
            for total, more in zip(engine.sums(number), added, strict=True):
                for key, value in more.items():
                    total[key] += value
            return
        began = self.clock.now
        totals = [dict(total) for total in engine.sums(number)]
        yield from self._block(number, self.speed)
        yield from self._catch_up()
        if before is not None and self._idle() == before:
            added = [
                {key: value - old.get(key, 0.0) for key, value in new.items()}
                for old, new in zip(totals, engine.sums(number), strict=True)
            ]
            engine.known[number, before] = (self.clock.now - began, added)

    def _idle(self) -> frozenset[str] | None:
        """Return what has ended but was not awaited, if nothing is under way; else None."""
        busy = self.engine.traveller.running or self.transfers.queue
        if busy or any(not done.happened for _, done in self.flights.values()):
            return None
        if any(end > self.now for end in self.host.values()):
            return None
        return frozenset(self.flights) | frozenset(self.host) | self.transfers.moved

    def _block(self, number: int, slow: float) -> Steps:
        """Play one trip through a block; operations take `slow` times their time."""
        self.trip = trip = self.engine.trips[number]
        trip.work(self.engine.tape.fixed[number], slow * self.weight)
        for op in self.engine.tape.blocks[number]:
            if isinstance(op, Run):
                self._work(op, slow)
            elif isinstance(op, Copy):
                self.transfers.add(op.name, op.hbm_s)
            elif isinstance(op, HostCopy):
                begin = max(self.now, self.host_free_s)
                self.host_free_s = self.host[op.name] = begin + op.host_s
            else:
                yield from self._meet(op)

    def _work(self, op: Run, slow: float) -> None:
        """Compute; what the operations leave of HBM is for transfers."""
        if self.engine.watch is not None:
            begin = self.now
            for name, seconds in op.parts:
                self.note("compute", name, begin, begin + seconds * slow)
                begin += seconds * slow
        self.ahead_s += op.time.total_s * slow
        self.transfers.drain(op.time.spare_s * slow)

    def _meet(self, op: TapeOp) -> Steps:
        """Start a collective, or wait for what was started."""
        if isinstance(op, Sync | Start):
            yield from self._catch_up()
            flight = self.start(op.spec)
            if isinstance(op, Sync):
                yield from self.wait(*flight)
            else:
                self.flights[op.spec.name] = flight
        elif isinstance(op, End):
            if op.name in self.flights:
                yield from self._catch_up()
                yield from self.wait(*self.flights.pop(op.name))
            elif op.name in self.host:
                self._waited(op.name, max(self.host.pop(op.name) - self.now, 0.0))
            else:
                self._moved(op.name)

    def _catch_up(self) -> Steps:
        """Let the engine's clock reach the chip's."""
        ahead, self.ahead_s = self.ahead_s, 0.0
        if ahead > 0:
            yield ahead

    def wait(self, spec: Spec | str, done: Mark, flown_s: float | None = None) -> Steps:
        """Wait for a collective."""
        before, trip = self.clock.now, self.trip
        yield from super().wait(spec, done, flown_s)
        assert isinstance(spec, Spec)
        passed = self.clock.now - before
        trip.wait(spec.name, passed * self.weight)
        self.transfers.drain(passed)

    def _waited(self, name: str, seconds: float) -> None:
        """Let a wait for the host pass."""
        self.trip.wait(name, seconds * self.weight)
        self.ahead_s += seconds
        self.transfers.drain(seconds)

    def _moved(self, name: str) -> None:
        """Wait for a transfer between memories."""
        left = self.transfers.finish(name)
        self.trip.parts["hbm_bound_s"] += left * self.weight
        self.ahead_s += left
        self.transfers.moved.remove(name)
