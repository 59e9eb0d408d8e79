"""Links that several transfers share at once, on SimPy's clock.

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
import simpy

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
        "alone",
        "by",
        "changed_s",
        "collective",
        "done",
        "label",
        "left",
        "lost_s",
        "number",
        "rate",
        "route",
        "unit_bytes",
        "version",
    )

    def __init__(
        self,
        number: int,
        route: Route,
        unit_bytes: float,
        collective: int,
        label: str,
        done: simpy.Event,
    ) -> None:
        self.number = number
        self.route = route
        self.unit_bytes = unit_bytes
        self.collective = collective
        self.label = label
        self.done = done
        self.left = 1.0  # fraction still to be moved
        self.rate = 0.0  # fractions per second
        self.alone = 0.0  # the rate if no other collective were there
        self.changed_s = 0.0
        self.version = 0
        self.lost_s = 0.0
        self.by: set[tuple[int, str]] = set()  # bottleneck link class and the other's label


class Links:
    """Every class of links, and what is on them now."""

    def __init__(self, env: simpy.Environment, rates: Floats) -> None:
        self.env = env
        self.rates = rates
        self.streams = np.zeros(len(rates))
        self.active: dict[Route, dict[int, Transfer]] = {}
        self.contention: dict[tuple[str, str, int], float] = defaultdict(float)
        self.transfers = 0
        self._put_on: dict[Route, float] = defaultdict(float)  # units
        self._taken_off: dict[Route, float] = defaultdict(float)
        self._shared: dict[tuple[Route, Route], tuple[Ints, Ints, frozenset[int]]] = {}
        self._near: dict[Route, list[Route]] = {}  # routes that share links with another
        self._users: dict[int, list[Route]] = defaultdict(list)  # by link
        self._speeds: dict[Route, float] = {}  # units per second, with nobody else there

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

    def send(self, route: Route, unit_bytes: float, collective: int, label: str) -> simpy.Event:
        """Put `unit_bytes` times the route's loads on its links; the event is their arrival."""
        done = self.env.event()
        if unit_bytes <= 0 or not len(route.links):
            done.succeed()
            return done
        self.transfers += 1
        transfer = Transfer(self.transfers, route, unit_bytes, collective, label, done)
        transfer.changed_s = float(self.env.now)
        self._put_on[route] += unit_bytes
        before = self.streams[route.links]
        self.streams[route.links] = before + route.streams
        if route not in self.active:
            self._learn(route)
        self.active[route][transfer.number] = transfer
        if before.any():
            self._settle(transfer)
        else:
            transfer.rate = transfer.alone = self._speed(route) / unit_bytes
            self._schedule(transfer)
        return done

    def _speed(self, route: Route) -> float:
        """Return units per second where no other transfer is."""
        speed = self._speeds.get(route)
        if speed is None:
            speed = float((self.rates[route.links] / (route.streams * route.loads)).min())
            self._speeds[route] = speed
        return speed

    def _schedule(self, transfer: Transfer) -> None:
        """Finish `transfer` when its rate says, unless that changes before."""
        transfer.version += 1
        version = transfer.version
        timer = self.env.timeout(transfer.left / transfer.rate)
        assert timer.callbacks is not None
        timer.callbacks.append(lambda _: self._finish(transfer, version))

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
        for route in self._near[transfer.route]:
            found.update(self.active[route])
        found.pop(transfer.number, None)
        return [found[number] for number in sorted(found)]

    def _learn(self, route: Route) -> None:
        """Note a new route, and which others share links with it; it does so itself."""
        self.active[route] = {}
        near = {route: None}
        for link in route.links.tolist():
            near.update(dict.fromkeys(self._users[link]))
            self._users[link].append(route)
        self._near[route] = list(near)
        for other in near:
            if other is not route:
                self._near[other].append(route)

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
        route = transfer.route
        speeds = self.rates[route.links] / (self.streams[route.links] * route.loads)
        slowest = int(speeds.argmin())
        rate = float(speeds[slowest]) / transfer.unit_bytes
        if rate == transfer.rate:
            return
        self._advance(transfer)
        transfer.by.clear()
        transfer.alone = rate
        own = route.streams
        for other in self._sharing(transfer):
            here, there, places = self._common(route, other.route)
            if other.collective == transfer.collective:
                own = own.copy()
                own[here] += other.route.streams[there]
            elif slowest in places:
                transfer.by.add((int(route.links[slowest]), other.label))
        if transfer.by:
            alone = (self.rates[route.links] / (own * route.loads)).min()
            transfer.alone = float(alone) / transfer.unit_bytes
        transfer.rate = rate
        self._schedule(transfer)

    def _advance(self, transfer: Transfer) -> None:
        now = float(self.env.now)
        passed = now - transfer.changed_s
        if passed > 0 and transfer.rate > 0:
            transfer.left = max(0.0, transfer.left - passed * transfer.rate)
            if transfer.by:
                lost = passed * (1.0 - transfer.rate / transfer.alone)
                for link, label in transfer.by:
                    self.contention[transfer.label, label, link] += lost / len(transfer.by)
                transfer.lost_s += lost
        transfer.changed_s = now

    def _finish(self, transfer: Transfer, version: int) -> None:
        if version != transfer.version:
            return
        self._advance(transfer)
        transfer.version += 1
        route = transfer.route
        after = self.streams[route.links] - route.streams
        self.streams[route.links] = after
        self._taken_off[route] += transfer.unit_bytes
        del self.active[route][transfer.number]
        if after.any():
            self._settle(transfer, gone=True)
        transfer.done.succeed()
