"""Pricing a Schedule: the analytic level. One plan or a million go through the same lines.

Work and moves run one after another. What is started runs beside them on its own links: behind
what was started there before, and in the time that moves which are waited for leave them. So what
is left of it, where it is awaited, follows from sums over the stretches of a block, and only there
something has to be compared. A loop's first trip, those in its middle and its last one differ in
what they start; those in the middle are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import ComputeTime, Costs
from shardsim.cost.stretch import Durations, Stretch, Wires, spare_s, split
from shardsim.cost.total import Total
from shardsim.machine import Machine
from shardsim.plan.layout import Layout, Number
from shardsim.program.schedule import (
    Await,
    Block,
    Copy,
    Move,
    Schedule,
    Start,
    Trip,
    Visit,
    Work,
)

LAYERS = ("forward", "backward")  # phases in which stages of a pipeline work and wait


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """One collective over a whole step, on one device."""

    task: Move | Copy
    block: str
    count: Number
    sent_bytes: Number
    time_s: Number
    exposed_s: Number


@dataclass(frozen=True, kw_only=True)
class ComputeCost:
    """One compute task over a whole step, on one device."""

    task: Work
    block: str
    count: Number
    time_s: Number
    unit_s: Number
    memory_s: Number
    overhead_s: Number
    flops: Number


@dataclass(kw_only=True)
class Price:
    """The time of a step by what it is made of; the five parts add up to `step_time_s`."""

    compute_s: Number
    hbm_bound_s: Number
    exposed_comm_s: Number
    bubble_s: Number
    overhead_s: Number
    flops: Number  # executed by one device in a step, recomputation included
    collectives: list[CollectiveCost] = field(default_factory=list)
    computes: list[ComputeCost] = field(default_factory=list)

    @property
    def step_time_s(self) -> Number:
        """Seconds of one optimizer step."""
        return (
            self.compute_s
            + self.hbm_bound_s
            + self.exposed_comm_s
            + self.bubble_s
            + self.overhead_s
        )


def step_time_s(machine: Machine, layout: Layout, schedule: Schedule, costs: Costs) -> Number:
    """Return only the seconds of a step, for many plans at once."""
    clock = _Clock(Durations(machine, layout, costs), schedule)
    clock.run()
    total = Total()
    piped = np.any(schedule.pipeline.bubble)
    for number, block in enumerate(schedule.blocks):
        layers = piped and block.phase in LAYERS
        stretched = 1.0 + schedule.pipeline.bubble if layers else 1.0
        for stretch in clock.stretches(number):
            total.add(stretch.total.value * (block.trips * stretched))
        total.add(clock.waits[number].value * stretched)
    return total.value


def price(machine: Machine, layout: Layout, schedule: Schedule, costs: Costs) -> Price:
    """Return the time of a step by what takes it, down to every task."""
    clock = _Clock(Durations(machine, layout, costs), schedule)
    clock.run()
    computes, collectives = list(_computes(clock)), list(_collectives(clock))
    bubble: Number = 0.0
    for number, block in enumerate(schedule.blocks):
        if block.phase in LAYERS:
            busy_s = sum(stretch.total.value for stretch in clock.stretches(number)) * block.trips
            bubble = bubble + (busy_s + clock.waits[number].value) * schedule.pipeline.bubble
    return Price(
        compute_s=sum(cost.unit_s for cost in computes),
        hbm_bound_s=sum(cost.memory_s for cost in computes),
        exposed_comm_s=sum(cost.exposed_s for cost in collectives),
        bubble_s=bubble,
        overhead_s=sum(cost.overhead_s for cost in computes),
        flops=sum(cost.flops for cost in computes),
        collectives=collectives,
        computes=computes,
    )


@dataclass
class _Flight:
    """What was started: seconds that its links still need for it and all before it."""

    task: Move | Copy
    wires: Wires
    left_s: Number


Flights = dict[str, _Flight]


@dataclass(frozen=True)
class _Trips:
    """Trips of a visit to a block that are alike."""

    trip: Trip
    alive: Number  # in which of the plans there are any
    many: Number  # in a step


class _Clock:
    """Runs the order of a schedule and notes what is waited for."""

    def __init__(self, durations: Durations, schedule: Schedule) -> None:
        self.durations = durations
        self.schedule = schedule
        self.waits = [Total() for _ in schedule.blocks]
        # By identity of the task: the block that waits, and the seconds over a step.
        self.waited: dict[int, list[tuple[int, Number]]] = {}
        self._parts: dict[int, list[Stretch | Start | Await]] = {}

    def parts(self, number: int) -> list[Stretch | Start | Await]:
        """Return a block as stretches between starts and awaits."""
        if number not in self._parts:
            self._parts[number] = split(self.durations, self.schedule.blocks[number].tasks)
        return self._parts[number]

    def stretches(self, number: int) -> Iterator[Stretch]:
        """Yield the stretches of a block."""
        return (part for part in self.parts(number) if isinstance(part, Stretch))

    def run(self) -> None:
        """Run all blocks in order."""
        flights: Flights = {}
        for visit in self.schedule.visits():
            parts = self.parts(visit.block)
            if not np.any(visit.many) or not (flights or any(map(_is_point, parts))):
                continue
            for trips in _alike(visit):
                if np.any(trips.alive):
                    self._trip(parts, trips, flights)

    def _trip(self, parts: list[Stretch | Start | Await], trips: _Trips, flights: Flights) -> None:
        for part in parts:
            if isinstance(part, Stretch):
                for flight in flights.values():
                    spare = spare_s(self.durations, part, flight.wires)
                    flight.left_s = flight.left_s - _where(trips.alive, spare)
                continue
            now = trips.trip.has(part.when) & trips.alive
            if isinstance(part, Start) and np.any(now):
                flights[part.name] = self._start(part.task, now, flights)
            elif part.name in flights and np.any(now):
                self._await(part.name, now, trips, flights)

    def _start(self, task: Move | Copy, now: Number, flights: Flights) -> _Flight:
        """Put something behind what is under way on its links."""
        wires = self.durations.wires(task)
        alone_s = _where(now, self.durations.alone_s(task))
        queue_s: Number = 0.0
        for flight in flights.values():
            if np.any(shared := self.durations.shared(flight.wires, wires)):
                queue_s = np.maximum(queue_s, flight.left_s * shared)
        if np.any(queue_s):
            queue_s = np.where(alone_s > 0, queue_s, 0.0)
        return _Flight(task=task, wires=wires, left_s=queue_s + alone_s)

    def _await(self, name: str, now: Number, trips: _Trips, flights: Flights) -> None:
        flight = flights.pop(name)
        waited_s = _where(now, np.maximum(flight.left_s, 0.0))
        for other in flights.values():
            other.left_s = other.left_s - waited_s
        step_s = waited_s * trips.many
        self.waits[trips.trip.block].add(step_s)
        self.waited.setdefault(id(flight.task), []).append((trips.trip.block, step_s))
        if not np.all(now):
            flights[name] = replace(flight, left_s=np.where(now, 0.0, flight.left_s))


def _alike(visit: Visit) -> Iterator[_Trips]:
    """Yield the first trip of a visit, those in its middle, and the last where it is another."""
    more, middle = np.greater(visit.times, 1), np.greater(visit.times, 2)
    for first, last, alive, times in (
        (True, np.logical_not(more), True, 1),
        (False, False, middle, np.maximum(visit.times - 2, 0)),
        (False, True, more, more * 1),
    ):
        trip = Trip(
            block=visit.block, first=first, last=last, after=visit.after, before=visit.before
        )
        yield _Trips(trip=trip, alive=alive, many=times * visit.many)


def _is_point(part: Stretch | Start | Await) -> bool:
    return not isinstance(part, Stretch)


def _where(now: Number, value: Number) -> Number:
    return value if np.all(now) else value * now


def _collectives(clock: _Clock) -> Iterator[CollectiveCost]:
    """Yield every move and every copy to or from the host over a whole step.

    What is started belongs to the block that waits for it.
    """
    durations, blocks = clock.durations, clock.schedule.blocks
    for number, block in enumerate(blocks):
        for stretch in clock.stretches(number):
            for move, times, exposed_s in stretch.moves:
                many = times * block.trips
                yield _collective(durations, block, move, many, exposed_s * many)
    started: dict[int, tuple[Move | Copy, Number]] = {}
    for _, task, times in clock.schedule.runs():
        if isinstance(task, Move | Copy) and id(task) in clock.waited:
            _, before = started.get(id(task), (task, 0))
            started[id(task)] = task, before + times
    for key, (task, many) in started.items():
        waited = clock.waited[key]
        exposed_s = sum(seconds for _, seconds in waited)
        yield _collective(durations, blocks[waited[-1][0]], task, many, exposed_s)


def _collective(
    durations: Durations, block: Block, task: Move | Copy, many: Number, exposed_s: Number
) -> CollectiveCost:
    if isinstance(task, Copy):
        count, sent = many, task.host_bytes
    else:
        count = many * task.count
        sent = sent_bytes(task.kind, durations.links[task.role], task.bytes, task.stage)
    return CollectiveCost(
        task=task,
        block=block.name,
        count=count,
        sent_bytes=sent * count,
        time_s=durations.alone_s(task) * many,
        exposed_s=exposed_s,
    )


def work_cost(task: Work, cost: ComputeTime, block: str, count: Number) -> ComputeCost:
    """Return what `count` operations take."""
    return ComputeCost(
        task=task,
        block=block,
        count=count,
        time_s=cost.total_s * count,
        unit_s=cost.unit_s * count,
        memory_s=cost.memory_s * count,
        overhead_s=cost.overhead_s * count,
        flops=task.flops * count,
    )


def _computes(clock: _Clock) -> Iterator[ComputeCost]:
    """Yield all work over a whole step."""
    for number, block in enumerate(clock.schedule.blocks):
        for stretch in clock.stretches(number):
            for task, many in stretch.works.values():
                cost = clock.durations.work(task)
                yield work_cost(task, cost, block.name, task.count * many * block.trips)
