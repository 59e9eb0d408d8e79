"""Pricing a Schedule: the analytic level. One plan or a million go through the same lines.

Work and moves run one after another. What is started runs beside them on its own links: behind
what was started there before, and in the time that moves which are waited for leave them. So what
is left of it, where it is awaited, follows from sums over the stretches of a block, and only there
something has to be compared. A trip through a block of a planned schedule begins and ends with
nothing under way; a loop's first trip, those in its middle and its last one differ in what they
start, and those in the middle are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import ComputeTime, Costs
from shardsim.cost.lines import LayoutLines, Lines, Wires, wires_of
from shardsim.cost.network import Group
from shardsim.cost.stages import Turns, in_ticks_s, waiting_s
from shardsim.cost.stretch import Durations, Part, Stretch, spare_s, split
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
    clock = _Clock(Durations(costs, LayoutLines(machine, layout)), schedule)
    return _step_s(clock, _bubble_s(clock))


def least_step_s(lines: Lines, schedule: Schedule, costs: Costs) -> Number:
    """Return seconds that a step takes on no links that are better than `lines`.

    All that runs ends no earlier where a byte or a message takes longer, or where links are shared
    that were not: ends are sums and maxima of durations. What stages of a pipeline wait for each
    other is the exception, since it does not count waits for what belongs to the head, and those
    shorten others. So here it has no waits at all, only work and what is sent between it.
    """
    clock = _Clock(Durations(costs, lines), schedule)
    return _step_s(clock, _bubble_s(clock, waits=False))


def _step_s(clock: _Clock, bubble_s: Number) -> Number:
    total = Total()
    for number, block in enumerate(clock.schedule.blocks):
        for stretch in clock.stretches(number):
            total.add(stretch.total.value * block.trips)
        total.add(clock.waits[number].value)
    total.add(bubble_s)
    return total.value


def price(machine: Machine, layout: Layout, schedule: Schedule, costs: Costs) -> Price:
    """Return the time of a step by what takes it, down to every task."""
    lines = LayoutLines(machine, layout)
    clock = _Clock(Durations(costs, lines), schedule)
    computes, collectives = list(_computes(clock)), list(_collectives(clock, lines.links))
    return Price(
        compute_s=sum(cost.unit_s for cost in computes),
        hbm_bound_s=sum(cost.memory_s for cost in computes),
        exposed_comm_s=sum(cost.exposed_s for cost in collectives),
        bubble_s=_bubble_s(clock),
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


class _Clock:
    """Has run the trips of a schedule, and knows what is waited for."""

    def __init__(self, durations: Durations, schedule: Schedule, head: bool = True) -> None:
        """Run a step of a stage that has the `head`, or has none."""
        self.durations = durations
        self.schedule = schedule
        self.head = head
        self.waits = [Total() for _ in schedule.blocks]  # over a step
        self.closing = [Total() for _ in schedule.blocks]  # of those, after a last trip's tasks
        # The same by block and identity of the task.
        self.waited: dict[tuple[int, int], Number] = defaultdict(float)
        self._parts: dict[int, list[Part]] = {}
        self._run()

    def parts(self, number: int) -> list[Part]:
        """Return a block as stretches between points at which something may wait."""
        if number not in self._parts:
            self._parts[number] = split(self.durations, self.schedule.blocks[number].tasks)
        return self._parts[number]

    def stretches(self, number: int) -> Iterator[Stretch]:
        """Yield the stretches of a block."""
        return (part for part in self.parts(number) if isinstance(part, Stretch))

    def _run(self) -> None:
        """Run all that has something to wait for."""
        for visit in self.schedule.visits():
            parts = self.parts(visit.block)
            if not self.head:
                visit = replace(visit, after=False, before=False)
            if all(isinstance(part, Stretch) for part in parts):
                continue
            # Trips that start the same are alike, but for what is waited for at once.
            alike: dict[tuple[bool, ...], tuple[Trip, Number]] = {}
            for trip, times in _kinds(visit):
                many = times * visit.many
                if not np.any(many):
                    continue
                self._at_once(parts, trip, many)
                starts = tuple(
                    bool(np.any(trip.has(part.when)))
                    for place, part in enumerate(parts)
                    if isinstance(part, Start) and not _is_awaited(parts, place)
                )
                key = starts if np.ndim(trip.last) == 0 else (*starts, True)
                _, before = alike.get(key, (trip, 0))
                alike[key] = trip, before + many
            for trip, many in alike.values():
                self._trip(parts, trip, many)

    def _at_once(self, parts: list[Part], trip: Trip, many: Number) -> None:
        """Run what is started and awaited at once, as a trip begins or ends: beside nothing."""
        for place, part in enumerate(parts):
            if isinstance(part, Start) and _is_awaited(parts, place):
                if np.any(now := trip.has(part.when)):
                    flight = self._start(part, now, {})
                    if part.when == "last":
                        self.closing[trip.block].add(np.maximum(flight.left_s, 0.0) * many)
                    self._wait(flight, trip, many, {})

    def _trip(self, parts: list[Part], trip: Trip, many: Number) -> None:
        """Run trips that are alike, `many` in a step."""
        flights: dict[str, _Flight] = {}
        for place, part in enumerate(parts):
            if isinstance(part, Stretch):
                for flight in flights.values():
                    flight.left_s = flight.left_s - spare_s(self.durations, part, flight.wires)
            elif isinstance(part, Start):
                now = trip.has(part.when)
                if np.any(now) and not _is_awaited(parts, place):
                    flights[part.name] = self._start(part, now, flights)
            elif isinstance(part, Move):
                self._in_turn(part, trip, many, flights)
            elif part.name in flights and np.any(trip.has(part.when)):
                self._wait(flights.pop(part.name), trip, many, flights)

    def _wait(
        self, flight: _Flight, trip: Trip, many: Number, flights: Mapping[str, _Flight]
    ) -> None:
        waited_s = np.maximum(flight.left_s, 0.0)
        for other in flights.values():
            other.left_s = other.left_s - waited_s
        step_s = waited_s * many
        self.waits[trip.block].add(step_s)
        key = trip.block, id(flight.task)
        self.waited[key] = self.waited[key] + step_s

    def _in_turn(
        self, task: Move, trip: Trip, many: Number, flights: Mapping[str, _Flight]
    ) -> None:
        """Run a move behind what is under way on its own links; it goes before others on them."""
        wires = wires_of(task)
        same = {name: flight for name, flight in flights.items() if flight.wires == wires}
        flight = self._start(task, True, same)
        self._wait(flight, trip, many, flights)
        alone_s = self.durations.alone_s(task)
        for name, other in flights.items():
            if name not in same and np.any(
                shared := self.durations.lines.shared(other.wires, wires)
            ):
                other.left_s = other.left_s + alone_s * shared

    def _start(self, part: Start | Move, now: Number, flights: Mapping[str, _Flight]) -> _Flight:
        """Put something behind what is under way on its links; it takes no time where not `now`."""
        task = part.task if isinstance(part, Start) else part
        wires = wires_of(task)
        alone_s = self.durations.alone_s(task)
        if not np.all(now):
            alone_s = alone_s * now
        queue_s: Number = 0.0
        for flight in flights.values():
            if np.any(shared := self.durations.lines.shared(flight.wires, wires)):
                queue_s = np.maximum(queue_s, flight.left_s * shared)
        if np.any(queue_s):
            alone_s = np.where(alone_s > 0, queue_s + alone_s, 0.0)
        return _Flight(task=task, wires=wires, left_s=alone_s)


def _kinds(visit: Visit) -> Iterator[tuple[Trip, Number]]:
    """Yield a visit's first trip, one of those in its middle, and the last where it is another;
    with how many of them there are."""
    more = np.greater(visit.times, 1)
    for first, last, times in (
        (True, False if np.all(more) else np.logical_not(more), 1),
        (False, False, np.maximum(visit.times - 2, 0)),
        (False, True, more * 1),
    ):
        trip = Trip(
            block=visit.block, first=first, last=last, after=visit.after, before=visit.before
        )
        yield trip, times


def _is_awaited(parts: list[Part], place: int) -> bool:
    """Return whether what is started at a place is awaited at once."""
    start = parts[place]
    after = parts[place + 1] if place + 1 < len(parts) else None
    return (
        isinstance(start, Start)
        and isinstance(after, Await)
        and (after.name, after.when) == (start.name, start.when)
    )


def _bubble_s(clock: _Clock, waits: bool = True) -> Number:
    """Return how long the stages of a pipeline wait for each other.

    What is of the head makes none but the last one wait, and sums over replicas behind the last
    microbatch none at all. `waits`: whether they wait for what others wait for.
    """
    pipeline = clock.schedule.pipeline
    if not np.any(pipeline.bubble):
        return 0.0
    alone = _Clock(clock.durations, clock.schedule, head=False) if waits else clock
    each_s: dict[str, Number] = defaultdict(float)  # of a microbatch on one stage, by phase
    of_head_s: Number = 0.0
    last_s: Number = 0.0
    closing_s: Number = 0.0
    for phase in (*LAYERS, "head", "boundary"):
        blocks = [n for n, block in enumerate(clock.schedule.blocks) if block.phase == phase]
        if not blocks:
            continue
        trips = [clock.schedule.blocks[number].trips for number in blocks]
        own_s = [_trip_s(alone, number, waits) for number in blocks]
        many = sum(trips) / pipeline.microbatches
        each_s[phase] = own_s[-1] * many
        of_head_s = of_head_s + (_trip_s(clock, blocks[-1], waits) - own_s[-1]) * many
        if waits:
            number, (*_, usual) = blocks[-1], trips
            last = alone.closing[number].value / np.where(np.greater(usual, 0), usual, 1)
            closing_s = closing_s + last * many
        if phase == "backward":
            last_s = (own_s[0] - own_s[-1]) * trips[0]
    send_s, trained = own_s[-1], "backward" in each_s
    found: Number = 0.0
    lockstep = pipeline.lockstep
    if np.any(lockstep):
        each = sum(each_s[phase] for phase in (*LAYERS, "boundary")) + closing_s
        found = in_ticks_s(pipeline, each) * lockstep
    if not np.all(lockstep):
        turns = Turns(
            forward_s=each_s["forward"],
            backward_s=each_s["backward"],
            last_s=last_s,
            head_s=each_s["head"] + of_head_s,
            send_s=send_s,
        )
        usual_s = waiting_s(pipeline, turns, trained)
        found = found + usual_s * np.logical_not(lockstep)
    return found


def _trip_s(clock: _Clock, number: int, waits: bool) -> Number:
    """Return the seconds of a trip through a block of one stage, but for what follows the last."""
    seconds: Number = 0.0
    if waits:
        trips = clock.schedule.blocks[number].trips
        waited_s = clock.waits[number].value - clock.closing[number].value
        seconds = waited_s / np.where(np.greater(trips, 0), trips, 1)
    for stretch in clock.stretches(number):
        seconds = seconds + stretch.total.value
    return seconds


def _collectives(clock: _Clock, links: Mapping[str, Group]) -> Iterator[CollectiveCost]:
    """Yield every move and every copy to or from the host over a whole step."""
    blocks = clock.schedule.blocks
    for number, block in enumerate(blocks):
        for stretch in clock.stretches(number):
            for move, times, exposed_s in stretch.moves:
                many = times * block.trips
                yield _collective(clock.durations, links, block, move, many, exposed_s * many)
    counts: dict[tuple[int, int], tuple[Move | Copy, Number]] = {}
    for number, task, times in clock.schedule.runs():
        key = number, id(task)
        if key in clock.waited and isinstance(task, Move | Copy):
            _, before = counts.get(key, (task, 0))
            counts[key] = task, before + times
    for key, (task, many) in counts.items():
        yield _collective(clock.durations, links, blocks[key[0]], task, many, clock.waited[key])


def _collective(
    durations: Durations,
    links: Mapping[str, Group],
    block: Block,
    task: Move | Copy,
    many: Number,
    exposed_s: Number,
) -> CollectiveCost:
    if isinstance(task, Copy):
        count, sent = many, task.host_bytes
    else:
        count = many * task.count
        sent = sent_bytes(task.kind, links[task.role], task.bytes, task.stage)
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
