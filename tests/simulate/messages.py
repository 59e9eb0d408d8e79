"""Gathers and scatters hop by hop: every device a process, every link a SimPy resource.

This is what `groups.py` sums up in one leg: a device passes on along an axis what it got from
behind, one message after the other, and each message holds one link for its bytes and arrives a
hop's latency later. It is slow, and there to check the legs: nothing is assumed here about who
waits for whom.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from colours import Chain, colour_chains

from shardsim.machine import Machine
from shardsim.plan.layout import AxisLayout
from shardsim.simulate.groups import Groups
from shardsim.simulate.topology import Topology

Steps = Generator[simpy.Event, Any, Any]


@dataclass(kw_only=True)
class HopByHop:
    """The end of one collective, and what every link carried."""

    time_s: float
    finished_s: list[float]  # by device
    bytes_on: dict[int, float] = field(default_factory=dict)
    bytes_off: dict[int, float] = field(default_factory=dict)
    messages: int = 0


def hop_by_hop(
    machine: Machine,
    layout: AxisLayout,
    kind: str,
    total_bytes: float,
    late_s: dict[int, float] | None = None,
    chunks: int = 1,
) -> HopByHop:
    """Simulate an all-gather or reduce-scatter inside a slice, device by device.

    `late_s` delays the start of some devices; `chunks` cuts the array into as many parts that
    follow each other.

    >>> from shardsim.machine import parse_machine
    >>> ring = AxisLayout(factors=(4, 1, 1), strides=(1, 1, 1))
    >>> hop_by_hop(parse_machine("v4:4x4x4"), ring, "all-gather", 4096.0).messages
    256
    """
    return _Run(machine, layout, kind, total_bytes, late_s or {}, chunks).result


class _Run:
    def __init__(
        self,
        machine: Machine,
        layout: AxisLayout,
        kind: str,
        total_bytes: float,
        late_s: dict[int, float],
        chunks: int,
    ) -> None:
        if kind not in ("all-gather", "reduce-scatter"):
            raise ValueError(f"hop by hop: all-gather or reduce-scatter, not '{kind}'")
        self.chip = machine.chip
        self.gather = kind == "all-gather"
        self.topology = Topology(machine)
        self.groups = Groups(self.topology, layout, "group")
        self.env = simpy.Environment()
        self.wires: dict[int, simpy.PriorityResource] = {}
        self.inbox: dict[tuple[int, int, int, int], simpy.Store] = {}
        self.lines: dict[int, tuple[np.ndarray[Any, Any], dict[int, tuple[int, int]]]] = {}
        self.result = HopByHop(time_s=0.0, finished_s=[0.0] * self.topology.devices)
        self.on: dict[int, float] = defaultdict(float)
        self.off: dict[int, float] = defaultdict(float)
        chains = colour_chains(self.groups, total_bytes / self.groups.size, chunks)
        if not self.gather:
            chains = tuple(chain[::-1] for chain in chains)
        for device in range(self.topology.devices):
            start_s = late_s.get(device, 0.0)
            self.env.process(self._device(device, chains, start_s))
        self.env.run()
        self.result.time_s = max(self.result.finished_s)
        self.result.bytes_on, self.result.bytes_off = dict(self.on), dict(self.off)

    def _device(self, device: int, chains: tuple[Chain, ...], start_s: float) -> Steps:
        yield self.env.timeout(start_s + self.chip.collective_overhead_s)
        running = [
            self.env.process(self._chain(device, chain, tag)) for tag, chain in enumerate(chains)
        ]
        yield self.env.all_of(running)
        self.result.finished_s[device] = float(self.env.now)

    def _chain(self, device: int, chain: Chain, tag: int) -> Steps:
        for step, (axis, unit_bytes) in enumerate(chain):
            ways = [
                self.env.process(self._way(device, axis, way, unit_bytes, tag, step * 1000 + tag))
                for way in (0, 1)
            ]
            yield self.env.all_of(ways)

    def _line(self, device: int, axis: int) -> tuple[list[int], int]:
        """Return the members of a device's line along an axis, and its place among them."""
        if axis not in self.lines:
            lines, _ = self.groups.lines(axis)
            where = {
                int(member): (row, place)
                for row, line in enumerate(lines)
                for place, member in enumerate(line)
            }
            self.lines[axis] = (lines, where)
        lines, where = self.lines[axis]
        row, place = where[device]
        return [int(member) for member in lines[row]], place

    def _way(
        self, device: int, axis: int, way: int, unit_bytes: float, tag: int, priority: int
    ) -> Steps:
        """Send what goes one way along an axis, and receive what comes from that way."""
        line, place = self._line(device, axis)
        n = len(line)
        ring = self.groups.closed(axis)
        step = 1 if way == 0 else -1
        if ring:
            # Half of the last shard of an even ring comes from each side.
            sizes = [unit_bytes] * ((n - 1) // 2) + [unit_bytes / 2] * ((n - 1) % 2)
            sends = receives = len(sizes)
            first_own = True
        else:
            behind = place if way == 0 else n - 1 - place
            ahead = n - 1 - behind
            first_own = self.gather
            sends = (behind + 1 if ahead else 0) if self.gather else ahead
            receives = behind if self.gather else (ahead + 1 if behind else 0)
            sizes = [unit_bytes] * max(sends, receives)
        inbox = self._inbox(device, axis, way, tag)
        pending: list[simpy.Process] = []
        got = 0
        for number in range(sends):
            needed = number if first_own else number + (1 if receives else 0)
            while got < min(needed, receives):
                yield inbox.get()
                got += 1
            target = line[(place + step) % n]
            sent = self.env.event()
            pending.append(
                self.env.process(
                    self._send(device, target, axis, way, sizes[number], tag, priority, sent)
                )
            )
            yield sent
        while got < receives:
            yield inbox.get()
            got += 1
        if pending:
            yield self.env.all_of(pending)

    def _send(
        self,
        device: int,
        target: int,
        axis: int,
        way: int,
        size: float,
        tag: int,
        priority: int,
        sent: simpy.Event,
    ) -> Steps:
        """Hold every wire on the way in turn; the hop's latency follows its bytes."""
        here, port = device, 2 * axis + way
        while here != target:
            link = here * self.topology.ports + port
            wire = self.wires.get(link)
            if wire is None:
                wire = self.wires[link] = simpy.PriorityResource(self.env)
            with wire.request(priority=priority) as turn:
                yield turn
                self.on[link] += size
                yield self.env.timeout(size / float(self.topology.rates[link]))
                self.off[link] += size
            if not sent.triggered:
                sent.succeed()
            yield self.env.timeout(self.chip.hop_latency_s)
            here = int(self.topology.neighbour[here, port])
        self.result.messages += 1
        self._inbox(target, axis, way, tag).put(size)

    def _inbox(self, device: int, axis: int, way: int, tag: int) -> simpy.Store:
        key = (device, axis, way, tag)
        if key not in self.inbox:
            self.inbox[key] = simpy.Store(self.env)
        return self.inbox[key]
