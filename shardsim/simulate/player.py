"""Chips that play the tape of a Schedule.

A chip runs ahead of the engine's clock through all that needs no other chip, and lets the clock
catch up where it meets its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from shardsim.cost.replay import Spent
from shardsim.cost.task_times import Copies, TaskTimes
from shardsim.machine import Machine
from shardsim.program.schedule import Schedule, Trip
from shardsim.simulate import operations
from shardsim.simulate.chip import Chip, Flight
from shardsim.simulate.clock import Mark, Steps
from shardsim.simulate.collective import Span
from shardsim.simulate.engine import Engine
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.tape import Entry, TapeWriter

State = tuple[Trip, frozenset[str]]  # of a block, and what has ended but was not awaited yet


class TapeEngine(Engine):
    """One run of a step."""

    def __init__(
        self,
        machine: Machine,
        times: TaskTimes,
        schedule: Schedule,
        wanted: Perturbation,
        unfold: bool,
        watch: Callable[[Span], None] | None,
    ) -> None:
        super().__init__(machine, wanted, watch)
        self.schedule = schedule
        self.tape = TapeWriter(self.topology, times).tape(schedule)
        self.stage = np.zeros(self.topology.devices, dtype=np.int64)
        if len(self.tape.scripts) > 1:
            self.stage = self.tape.groups["pipeline"].places()
        self.lay(self.tape.groups, self.tape.legs, self.stage, unfold)
        self.spent = [Spent() for _ in self.tape.blocks]  # means over all chips
        self.known: dict[State, tuple[float, list[dict[Any, float]]]] = {}

    def run(self) -> None:
        """Simulate the step; who ends before the last chip waits for it."""
        self.players = [Player(self, number) for number in range(len(self.folded.devices))]
        self.play(self.players)
        for player in self.players:
            left = self.step_time_s - player.ended_s
            last = self.tape.scripts[player.stage][-1].trip.block
            self.spent[last].parts["exposed_comm_s"] += left * player.weight

    def where(self, role: str) -> str:
        """Return the mesh axes of a role's groups in words."""
        return role

    def layers(self) -> tuple[str, ...]:
        """Return the names of the blocks that take longest, forward and backward."""
        found = []
        for phase in ("forward", "backward"):
            blocks = zip(self.schedule.blocks, self.spent, strict=False)
            times = {b.name: sum(spent.parts.values()) for b, spent in blocks if b.phase == phase}
            if times:
                found.append(max(times, key=lambda name: times[name]))
        return tuple(found)

    def bubble_s(self) -> float:
        """Return the seconds in which a chip, of the stages that are shown, waits for others."""
        return sum(
            (player.idle_s + self.step_time_s - player.ended_s) * player.weight
            for player in self.players
        )

    def shown(self, stage: int) -> float:
        """Return how much a chip of a stage counts for, as `cost.price` has it: the one with the
        head, of GPipe in ticks the first, stands for all, or where stages differ, each for
        itself."""
        pipeline, stages = self.schedule.pipeline, len(self.tape.scripts)
        if pipeline.shares:
            return 1.0
        first = pipeline.lockstep and not pipeline.in_turns
        return float(stages) if stage == (0 if first else stages - 1) else 0.0

    def alike(self) -> bool:
        """Return whether a trip that begins with nothing under way is like every other such trip:
        there is one class of chips, whose speed never changes, and nobody wants to watch."""
        return len(self.folded.devices) == 1 and self.wanted.jitter == 0 and self.watch is None

    def sums(self, number: int) -> Iterable[dict[Any, float]]:
        """Return all that a trip through a block adds to."""
        spent = self.spent[number]
        return (spent.parts, spent.exposed, self.waited, self.flown, self.counts, *self.links.sums)


class Player(Chip):
    """The compute stream and the copies of one class of chips."""

    engine: TapeEngine

    def __init__(self, engine: TapeEngine, number: int) -> None:
        super().__init__(engine, number)
        self.stage = int(engine.stage[self.device])
        self.weight *= engine.shown(self.stage)
        self.ahead_s = 0.0  # of the engine's clock
        self.idle_s = 0.0  # waiting for another stage's microbatches
        self.flights: dict[str, Flight] = {}
        self.host: dict[str, float] = {}  # copies to or from the host: when they end
        self.host_free_s = 0.0
        self.copies = Copies()
        self.spent = Spent()

    @property
    def now(self) -> float:
        """Seconds on the chip's own clock."""
        return self.clock.now + self.ahead_s

    def run(self) -> Steps:
        """Play the whole script."""
        engine = self.engine
        script = engine.tape.scripts[self.stage]
        draws = engine.wanted.draws(self.device, len(script))
        alike = engine.alike()
        counts_for = self.weight
        for entry, draw in zip(script, draws, strict=True):
            began, waited_s = self.now, self.idle_s
            self.weight = 0.0 if entry.idle else counts_for
            if alike:
                yield from self._remembered(entry)
            else:
                yield from self._block(entry, self.speed * draw)
            if entry.idle:
                self.idle_s = waited_s + self.now - began
            self.note("unit", engine.tape.names[entry.trip.block], began, self.now)
        self.weight = counts_for
        yield from self._catch_up()
        self.ended_s = self.clock.now

    def _remembered(self, entry: Entry) -> Steps:
        """Play a block, or add what an equal trip through it took."""
        engine, number = self.engine, entry.trip.block
        yield from self._catch_up()
        before = self._idle()
        known = None if before is None else engine.known.get((entry.trip, before))
        if known is not None:
            passed, added = known
            yield passed
            for total, more in zip(engine.sums(number), added, strict=True):
                for key, value in more.items():
                    total[key] += value
            return
        began = self.clock.now
        totals = [] if before is None else [dict(total) for total in engine.sums(number)]
        yield from self._block(entry, self.speed)
        yield from self._catch_up()
        if before is not None and self._idle() == before:
            added = [
                {key: value - old.get(key, 0.0) for key, value in new.items()}
                for old, new in zip(totals, engine.sums(number), strict=True)
            ]
            engine.known[entry.trip, before] = (self.clock.now - began, added)

    def _idle(self) -> frozenset[str] | None:
        """Return what has ended but was not awaited, if nothing is under way; else None."""
        busy = self.engine.traveller.running or self.copies.queue
        if busy or any(not done.happened for _, done in self.flights.values()):
            return None
        if any(end > self.now for end in self.host.values()):
            return None
        return frozenset(self.flights) | frozenset(self.host) | self.copies.moved

    def _block(self, entry: Entry, slow: float) -> Steps:
        """Play one trip through a block; operations take `slow` times their time."""
        number = entry.trip.block
        self.spent = spent = self.engine.spent[number]
        spent.work(self.engine.tape.fixed[number], slow * self.weight)
        yield from self._ops(self.engine.tape.blocks[number], entry, slow)

    def _ops(self, ops: Iterable[operations.Op], entry: Entry, slow: float) -> Steps:
        for op in ops:
            if isinstance(op, operations.Run):
                self._work(op, slow)
            elif isinstance(op, operations.Rounds):
                for _ in range(op.times):
                    yield from self._ops(op.ops, entry, slow)
            elif isinstance(op, operations.Sync):
                yield from self._catch_up()
                yield from self.wait(*self.start(op.spec))
            elif isinstance(op, operations.Send):
                yield from self._send(op, entry.message)
            elif isinstance(op, operations.Receive):
                yield from self._receive(op, entry.message)
            elif op.when == "each" or entry.trip.has(op.when):
                yield from self._start_or_end(op)

    def _work(self, op: operations.Run, slow: float) -> None:
        """Compute; what the operations leave of HBM is for transfers."""
        if self.engine.watch is not None:
            begin = self.now
            for name, seconds in op.parts:
                self.note("compute", name, begin, begin + seconds * slow)
                begin += seconds * slow
        self.ahead_s += op.time.total_s * slow
        self.copies.drain(op.time.spare_s * slow)

    def _start_or_end(
        self, op: operations.Launch | operations.HbmCopy | operations.HostCopy | operations.End
    ) -> Steps:
        """Start a move or a copy, or wait for what was started."""
        if isinstance(op, operations.Launch):
            yield from self._catch_up()
            self.flights[op.spec.name] = self.start(op.spec)
        elif isinstance(op, operations.HbmCopy):
            self.copies.add(op.name, op.hbm_s)
        elif isinstance(op, operations.HostCopy):
            begin = max(self.now, self.host_free_s)
            self.host_free_s = self.host[op.name] = begin + op.host_s
            self.note("host", op.name, begin, self.host_free_s)
            self.engine.counts[op.name] += self.weight
            self.engine.flown[op.name] += op.host_s * self.weight
        elif op.name in self.flights:
            yield from self._catch_up()
            yield from self.wait(*self.flights.pop(op.name))
        elif op.name in self.host:
            self._waited(op.name, max(self.host.pop(op.name) - self.now, 0.0))
        elif op.name in self.copies:
            self._moved(op.name)

    def _send(self, op: operations.Send, message: int) -> Steps:
        """Send a microbatch to the chip at the same place in another stage."""
        yield from self._catch_up()
        role = op.spec.role
        done = self.engine.traveller.mail(
            role, self.group[role], op.spec.name, op.leg, message, op.spec.bytes
        )
        self._count(op.spec, done, 1)
        yield from self.wait(op.spec, done)

    def _receive(self, op: operations.Receive, message: int) -> Steps:
        """Wait for a microbatch from another stage."""
        yield from self._catch_up()
        before = self.clock.now
        yield self.engine.traveller.mailbox("pipeline", self.group["pipeline"], op.leg, message)
        self.idle_s += self.clock.now - before

    def _catch_up(self) -> Steps:
        """Let the engine's clock reach the chip's."""
        ahead, self.ahead_s = self.ahead_s, 0.0
        if ahead > 0:
            yield ahead

    def wait(self, spec: operations.Spec | str, done: Mark, flown_s: float | None = None) -> Steps:
        """Wait for a collective."""
        before = self.clock.now
        yield from super().wait(spec, done, flown_s)
        assert isinstance(spec, operations.Spec)
        passed = self.clock.now - before
        self.spent.wait(spec.name, passed * self.weight)
        self.copies.drain(passed)

    def _waited(self, name: str, seconds: float) -> None:
        """Let a wait for the host pass."""
        self.spent.wait(name, seconds * self.weight)
        self.engine.waited[name] += seconds * self.weight
        self.ahead_s += seconds
        self.copies.drain(seconds)

    def _moved(self, name: str) -> None:
        """Wait for a transfer between memories."""
        left = self.copies.finish(name)
        self.spent.parts["hbm_bound_s"] += left * self.weight
        self.ahead_s += left
        self.copies.moved.remove(name)
