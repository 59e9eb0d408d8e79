"""Links that several transfers share at once, on the simulation's clock.

A transfer uses a set of links for one amount of data on each. Every link divides its rate
equally among the transfers on it, and a transfer goes as fast as the slowest of its links lets
it: no link ever carries more than its rate. Where nobody else is on its links, a transfer is one
event.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardsim.simulate.clock import Call, Clock
from shardsim.simulate.topology import Floats, Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """Links of one transfer: of each, bytes per unit of data, and how many streams it carries.

    Links are classes of links that do the same. `streams` is how many transfers like this one
    cross one link of the class (groups that interleave share links), `carried` the bytes per unit
    that all of them put on it.
    """

    name: str
    links: Ints
    loads: Floats
    streams: Floats
    carried: Floats
    hops: int
    dcn: bool
    ports: frozenset[int]


class Transfer:
    """Data on its way."""

    __slots__ = (
        *("alone", "by", "changed_s", "collective", "done", "due_s", "label", "left", "links"),
        *("number", "rate", "route", "unit_bytes"),
    )

    def __init__(
        self,
        links: Links,
        number: int,
        route: Route,
        unit_bytes: float,
        collective: int,
        label: str,
        done: Call,
    ) -> None:
        self.links = links
        self.number = number
        self.route = route
        self.unit_bytes = unit_bytes
        self.collective = collective
        self.label = label
        self.done = done
        self.left = 1.0  # fraction still to be moved
        self.rate = 0.0  # fractions per second
        self.alone = 0.0  # the rate if no other collective were there
        self.changed_s = links.clock.now
        self.due_s = 0.0  # when it will have arrived at its present rate
        self.by: tuple[tuple[int, str], ...] = ()  # bottleneck link class and the other's label

    def arrive(self) -> None:
        """Leave the links, unless the rate has changed since it was known when that would be."""
        if self.links.clock.now == self.due_s:
            self.due_s = -1.0
            self.links.finish(self)


class _Lane:
    """A route: what is on it, and which others share links with it; it does so itself."""

    __slots__ = ("active", "free", "near", "rates", "route")

    def __init__(self, route: Route, rates: Floats) -> None:
        self.route = route
        self.rates = rates[route.links]
        self.free = float(self.speeds(route.streams).min())  # with nobody else there
        self.active: dict[int, Transfer] = {}
        self.near: list[dict[int, Transfer]] = [self.active]  # what is active on all of them

    def speeds(self, streams: Floats) -> Floats:
        """Return the units of data per second that each link has for one of its `streams`."""
        return self.rates / (streams * self.route.loads)


class Links:
    """Every class of links, and what is on them now."""

    def __init__(self, clock: Clock, rates: Floats) -> None:
        self.clock = clock
        self.rates = rates
        self.active: dict[Route, dict[int, Transfer]] = {}
        self.contention: dict[tuple[str, str, int], float] = defaultdict(float)
        self.transfers = 0
        self._put_on: dict[Route, float] = defaultdict(float)  # units
        self._taken_off: dict[Route, float] = defaultdict(float)
        self._lanes: dict[Route, _Lane] = {}
        self._users: dict[int, list[_Lane]] = defaultdict(list)  # by link
        self._shared: dict[tuple[Route, Route], tuple[Ints, Ints, frozenset[int]]] = {}
        self._streams = np.zeros(len(rates))
        self._changed: dict[_Lane, int] = defaultdict(int)  # transfers not in `_streams` yet

    @property
    def streams(self) -> Floats:
        """How many transfers are on every link now."""
        for lane, count in self._changed.items():
            if count:
                self._streams[lane.route.links] += count * lane.route.streams
        self._changed.clear()
        return self._streams

    @property
    def bytes_on(self) -> Floats:
        """Bytes put on every link so far."""
        return self._sum(self._put_on)

    @property
    def bytes_off(self) -> Floats:
        """Bytes that have left every link so far."""
        return self._sum(self._taken_off)

    @property
    def busy_s(self) -> Floats:
        """Seconds that every link would have needed for them at its full rate."""
        return self.bytes_off / self.rates

    @property
    def sums(self) -> tuple[dict[Any, float], ...]:
        """What is added up as transfers go on: contention, and units put on and taken off."""
        return self.contention, self._put_on, self._taken_off

    def _sum(self, units: dict[Route, float]) -> Floats:
        total = np.zeros(len(self.rates))
        for route, amount in units.items():
            total[route.links] += route.carried * amount
        return total

    def send(
        self, route: Route, unit_bytes: float, collective: int, label: str, done: Call
    ) -> None:
        """Put `unit_bytes` times the route's loads on its links; `done` is called on arrival."""
        if unit_bytes <= 0 or not len(route.links):
            self.clock.after(0.0, done)
            return
        self.transfers = number = self.transfers + 1
        transfer = Transfer(self, number, route, unit_bytes, collective, label, done)
        self._put_on[route] += unit_bytes
        lane = self._lanes.get(route) or self._learn(route)
        shared = any(lane.near)
        lane.active[number] = transfer
        self._changed[lane] += 1
        if shared:
            self._settle(transfer)
        else:
            transfer.rate = transfer.alone = lane.free / unit_bytes
            self._schedule(transfer)

    def _learn(self, route: Route) -> _Lane:
        """Note a new route, and which others share links with it."""
        lane = self._lanes[route] = _Lane(route, self.rates)
        self.active[route] = lane.active
        near: dict[_Lane, None] = {}
        for link in route.links.tolist():
            near.update(dict.fromkeys(self._users[link]))
            self._users[link].append(lane)
        for other in near:
            lane.near.append(other.active)
            other.near.append(lane.active)
        return lane

    def _schedule(self, transfer: Transfer) -> None:
        """Let `transfer` arrive when its rate says, unless that changes before."""
        seconds = transfer.left / transfer.rate
        transfer.due_s = self.clock.now + seconds
        self.clock.after(seconds, transfer.arrive)

    def _settle(self, changed: Transfer, gone: bool = False) -> None:
        """Give every transfer that shares a link with `changed` its new rate."""
        others = self._sharing(changed)
        if not gone:
            others.append(changed)
        for transfer in others:
            self._rate(transfer)

    def _sharing(self, transfer: Transfer) -> list[Transfer]:
        """Return the other transfers on the links of `transfer`, oldest first."""
        found: dict[int, Transfer] = {}
        for active in self._lanes[transfer.route].near:
            found.update(active)
        found.pop(transfer.number, None)
        return [found[number] for number in sorted(found)]

    def _common(self, one: Route, other: Route) -> tuple[Ints, Ints, frozenset[int]]:
        """Return the places of the links that two routes share, in each; and in the first."""
        places = self._shared.get((one, other))
        if places is None:
            _, here, there = np.intersect1d(
                one.links, other.links, assume_unique=True, return_indices=True
            )
            places = self._shared[one, other] = (here, there, frozenset(here.tolist()))
        return places

    def _rate(self, transfer: Transfer) -> None:
        """Note what `transfer` has moved so far and set its rate from now on."""
        lane = self._lanes[transfer.route]
        route = transfer.route
        speeds = lane.speeds(self.streams[route.links])
        slowest = int(speeds.argmin())
        rate = float(speeds[slowest]) / transfer.unit_bytes
        if rate == transfer.rate:
            return
        self._advance(transfer)
        rivals: dict[tuple[int, str], None] = {}
        own = route.streams
        for other in self._sharing(transfer):
            here, there, places = self._common(route, other.route)
            if other.collective == transfer.collective:
                own = own.copy()
                own[here] += other.route.streams[there]
            elif slowest in places:
                rivals[int(route.links[slowest]), other.label] = None
        transfer.by = tuple(rivals)
        transfer.alone = float(lane.speeds(own).min()) / transfer.unit_bytes if rivals else rate
        transfer.rate = rate
        self._schedule(transfer)

    def _advance(self, transfer: Transfer) -> None:
        now = self.clock.now
        passed = now - transfer.changed_s
        if passed > 0 and transfer.rate > 0:
            transfer.left = max(0.0, transfer.left - passed * transfer.rate)
            if transfer.by:
                lost = passed * (1.0 - transfer.rate / transfer.alone)
                for link, label in transfer.by:
                    self.contention[transfer.label, label, link] += lost / len(transfer.by)
        transfer.changed_s = now

    def finish(self, transfer: Transfer) -> None:
        """Take a transfer off its links, and tell who waits for it."""
        if transfer.by:
            self._advance(transfer)
        lane = self._lanes[transfer.route]
        self._taken_off[transfer.route] += transfer.unit_bytes
        del lane.active[transfer.number]
        self._changed[lane] -= 1
        if any(lane.near):
            self._settle(transfer, gone=True)
        transfer.done()
