"""Running collectives on the links, for every group that meets for one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from shardsim.cost.network import Group, group_of
from shardsim.machine import Machine
from shardsim.plan.layout import AxisLayout
from shardsim.simulate.fluid import Links
from shardsim.simulate.folding import Fold, fold
from shardsim.simulate.groups import Groups
from shardsim.simulate.topology import Fault, Topology
from shardsim.simulate.traffic import Traffic, leg_names, traffic

Steps = Generator[simpy.Event, Any, Any]


@dataclass
class Meeting:
    """Members of a group that have arrived for a collective, and its end."""

    arrived: int
    first_s: float
    done: simpy.Event


@dataclass(frozen=True, kw_only=True)
class Span:
    """One collective of one group class, or one of its legs, for the timeline."""

    name: str
    role: str
    group: int
    start_s: float
    end_s: float
    bytes: float
    leg: str = ""
    ports: frozenset[int] = frozenset()


@dataclass
class Traveller:
    """All running collectives."""

    env: simpy.Environment
    folded: Fold
    links: Links
    hop_s: float
    dcn_hop_s: float
    overhead_s: float
    watch: Callable[[Span], None] | None = None
    started: int = 0
    running: int = 0
    meetings: dict[tuple[str, int, int], Meeting] = field(default_factory=dict)
    mailboxes: dict[tuple[str, int, str, int], simpy.Event] = field(default_factory=dict)

    def meet(self, role: str, group: int, key: int, go: Callable[[int], Steps]) -> simpy.Event:
        """Arrive for collective number `key` of a group; the last to come starts it."""
        place = (role, group, key)
        meeting = self.meetings.get(place)
        if meeting is None:
            meeting = Meeting(arrived=0, first_s=self.env.now, done=self.env.event())
            self.meetings[place] = meeting
        meeting.arrived += 1
        if meeting.arrived == self._needed(role, group):
            del self.meetings[place]
            self.started += 1
            self.env.process(self._run(go(self.started), meeting.done))
        return meeting.done

    def _needed(self, role: str, group: int) -> int:
        key = (role, group)
        if key not in self._members:
            self._members[key] = self.folded.members(role, group)
        return self._members[key]

    def __post_init__(self) -> None:
        self._members: dict[tuple[str, int], int] = {}

    def mail(
        self, role: str, group: int, name: str, leg: str, message: int, unit_bytes: float
    ) -> simpy.Event:
        """Send a message from one member of a group to another; the event is its arrival."""
        box = self.mailbox(role, group, leg, message)
        self.started += 1
        self.env.process(self._run(self._launched(role, group, name, leg, unit_bytes), box))
        return box

    def mailbox(self, role: str, group: int, leg: str, message: int) -> simpy.Event:
        """Return the arrival of a message, whether it has been sent yet or not."""
        place = (role, group, leg, message)
        if place not in self.mailboxes:
            self.mailboxes[place] = self.env.event()
        return self.mailboxes[place]

    def _launched(self, role: str, group: int, name: str, leg: str, unit_bytes: float) -> Steps:
        number = self.started
        if self.overhead_s > 0:
            yield self.env.timeout(self.overhead_s)
        yield from self.leg(role, group, name, leg, unit_bytes, 1.0, number)

    def _run(self, steps: Steps, done: simpy.Event) -> Steps:
        self.running += 1
        yield from steps
        self.running -= 1
        done.succeed()

    def collective(
        self,
        role: str,
        group: int,
        name: str,
        moved: Traffic,
        messages: float,
        sent: float,
        repeat: int = 1,
    ) -> Callable[[int], Steps]:
        """Return the process of one collective of one group class, `repeat` times in a row."""

        def go(number: int) -> Steps:
            for _ in range(repeat if moved.moves else 0):
                yield from once(number)

        def once(number: int) -> Steps:
            start = self.env.now
            launch = self.overhead_s * messages * moved.overheads
            if launch > 0:
                yield self.env.timeout(launch)
            for move in moved.moves:
                yield from self.leg(role, group, name, move.leg, move.unit_bytes, messages, number)
            if self.watch is not None:
                self.watch(
                    Span(
                        name=name,
                        role=role,
                        group=group,
                        start_s=start,
                        end_s=self.env.now,
                        bytes=sent,
                    )
                )

        return go

    def latency_s(self, role: str, group: int, leg: str) -> float:
        """Return the latency of a leg's hops."""
        route = self.folded.route(role, group, leg)
        return route.hops * (self.dcn_hop_s if route.dcn else self.hop_s)

    def hop(
        self, role: str, group: int, name: str, leg: str, unit: float
    ) -> Callable[[int], Steps]:
        """Return the process of one hop of a ring."""
        return lambda number: self.leg(role, group, name, leg, unit, 1.0, number)

    def leg(
        self,
        role: str,
        group: int,
        name: str,
        leg: str,
        unit_bytes: float,
        messages: float,
        number: int,
    ) -> Steps:
        """Put one leg on its links and wait for it and its hops' latency."""
        route = self.folded.route(role, group, leg)
        start = self.env.now
        yield self.links.send(route, unit_bytes, number, name)
        delay = self.latency_s(role, group, leg) * messages
        if delay > 0:
            yield self.env.timeout(delay)
        if self.watch is not None:
            self.watch(
                Span(
                    name=name,
                    role=role,
                    group=group,
                    start_s=start,
                    end_s=self.env.now,
                    bytes=float((route.carried * unit_bytes).max(initial=0.0)),
                    leg=route.name,
                    ports=route.ports,
                )
            )


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One collective of every group at once, with nothing else running."""

    time_s: float
    analytic: Group
    folded: Fold
    links: Links
    events: int


def run_alone(
    machine: Machine,
    layout: AxisLayout,
    kind: str,
    total_bytes: float,
    *,
    messages: int = 1,
    stage: str = "all",
    unfold: bool = False,
    faults: tuple[Fault, ...] = (),
) -> Alone:
    """Simulate one collective of every group of `layout`, all starting together.

    >>> from shardsim.machine import parse_machine
    >>> from shardsim.plan.layout import AxisLayout
    >>> ring = AxisLayout(factors=(1, 1, 16), strides=(1, 1, 1))
    >>> run_alone(parse_machine("v4:8x8x16"), ring, "all-gather", 2**20).folded.devices.tolist()
    [0]
    """
    topology = Topology(machine, faults)
    analytic = group_of(machine, layout)
    groups = {"group": Groups(topology, layout, "group")}
    legs = {"group": tuple(sorted(leg_names(kind, groups["group"], stage)))}
    folded = fold(topology, groups, legs, np.zeros(topology.devices, dtype=np.int64), unfold)
    env = simpy.Environment()
    links = Links(env, topology.rates[folded.links])
    chip = machine.chip
    traveller = Traveller(
        env, folded, links, chip.hop_latency_s, chip.dcn_hop_latency_s, chip.collective_overhead_s
    )
    moved = traffic(kind, groups["group"], total_bytes, stage)
    ends: list[float] = []
    for device in range(len(folded.devices)):
        group = folded.group_of("group", device)
        go = traveller.collective("group", group, kind, moved, messages, total_bytes)
        done = traveller.meet("group", group, 0, go)
        assert done.callbacks is not None
        done.callbacks.append(lambda _: ends.append(float(env.now)))
    env.run()
    if traveller.meetings or any(links.streams > 0):
        raise RuntimeError(f"deadlock: {kind} stopped after {env.now:g} s")
    return Alone(
        time_s=max(ends), analytic=analytic, folded=folded, links=links, events=links.transfers
    )
