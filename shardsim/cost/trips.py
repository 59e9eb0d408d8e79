"""Running the trips of a Schedule in the closed form: what is started, and what is waited for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardsim.cost.lines import Wires, wires_of
from shardsim.cost.stretch import Durations, Part, Stretch, spare_s, split
from shardsim.cost.total import Total
from shardsim.plan.layout import Number, somewhere
from shardsim.program.schedule import Await, Copy, Move, Schedule, Start, Trip, Visit


@dataclass
class _Flight:
    """What was started: seconds that its links still need for it and all before it."""

    task: Move | Copy
    wires: Wires
    left_s: Number


class Clock:
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
                if not somewhere(many):
                    continue
                self._at_once(parts, trip, many)
                starts = tuple(
                    somewhere(trip.has(part.when))
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
                if somewhere(now := trip.has(part.when)):
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
                if somewhere(now) and not _is_awaited(parts, place):
                    flights[part.name] = self._start(part, now, flights)
            elif isinstance(part, Move):
                self._in_turn(part, trip, many, flights)
            elif part.name in flights and somewhere(trip.has(part.when)):
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
            if name not in same and somewhere(
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
            if somewhere(shared := self.durations.lines.shared(flight.wires, wires)):
                queue_s = np.maximum(queue_s, flight.left_s * shared)
        if somewhere(queue_s):
            alone_s = np.where(alone_s > 0, queue_s + alone_s, 0.0)
        return _Flight(task=task, wires=wires, left_s=alone_s)


def _kinds(visit: Visit) -> Iterator[tuple[Trip, Number]]:
    """Yield a visit's first trip, one of those in its middle, and the last where it is another;
    with how many of them there are."""
    more = np.greater(visit.times, 1)
    some: Number = 1 if np.all(np.greater(visit.times, 0)) else np.greater(visit.times, 0) * 1
    for first, last, times in (
        (True, False if np.all(more) else np.logical_not(more), some),
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


def trip_s(clock: Clock, number: int, waits: bool) -> Number:
    """Return the seconds of a trip through a block of one stage, but for what follows the last."""
    seconds: Number = 0.0
    if waits:
        trips = clock.schedule.blocks[number].trips
        waited_s = clock.waits[number].value - clock.closing[number].value
        seconds = waited_s / np.where(np.greater(trips, 0), trips, 1)
    for stretch in clock.stretches(number):
        seconds = seconds + stretch.total.value
    return seconds
