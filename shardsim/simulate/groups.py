"""The groups of a role on the torus, and the links that each way of moving data loads.

A group's leg is one movement that its members make together: everybody passes shards along one
axis, or to the next member of a ring, or to everybody else. It lists the links it uses and how
many shards each of them carries. All members of a ring start a leg together, because each needs
what all the others send; a ring whose members forward in order takes, hop by hop, exactly as long
as its links need for all the shards they carry plus the latency of its hops (`messages.py`
simulates the hops, and a test holds the two together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from shardsim.plan.layout import AxisLayout
from shardsim.simulate.load import Load, Table, axis_loads, most
from shardsim.simulate.permutes import permuted
from shardsim.simulate.topology import Ints, Topology
from shardsim.simulate.walks import exchange_crossings, ring_order, twisted_crossings


class Groups:
    """All groups of one role: members, and the legs of every group, made when first asked for."""

    def __init__(
        self, topology: Topology, layout: AxisLayout, role: str, order: Sequence[int] = ()
    ) -> None:
        """Lay out the groups; `order` has the torus axes (-1: DCN) along which a permute counts
        members, major first, where that is not the order of a ring."""
        self.topology = topology
        self.layout = layout
        self.role = role
        self.order = tuple(order)
        factors = [int(factor) for factor in layout.factors]
        strides = [int(stride) for stride in layout.strides]
        self.factors = (int(layout.slices), *factors)
        self.strides = (int(layout.slice_stride), *strides)
        self.members = self._members()
        self.count, self.size = self.members.shape
        self._tables: dict[str, Table] = {}

    def _members(self) -> Ints:
        """Return device numbers, [groups, members]; the last torus axis varies fastest."""
        grid = np.arange(self.topology.devices)
        shape: list[int] = []
        for length, factor, stride in zip(
            self.topology.shape, self.factors, self.strides, strict=True
        ):
            shape += [length // (factor * stride), factor, stride]
        axes = range(len(shape))
        inside = [axis for axis in axes if axis % 3 == 1]
        outside = [axis for axis in axes if axis % 3 != 1]
        size = math.prod(self.factors)
        return grid.reshape(shape).transpose(outside + inside).reshape(-1, size)

    @cached_property
    def of_device(self) -> Ints:
        """Return the group that each device is in."""
        table = np.empty(self.topology.devices, dtype=np.int64)
        table[self.members.reshape(-1)] = np.repeat(np.arange(self.count), self.size)
        return table

    def axes(self) -> list[int]:
        """Return the numbers of the torus axes (not core or switch) that a group extends over."""
        return [
            number
            for number, axis in enumerate(self.topology.axes)
            if self.factors[number + 1] > 1 and not axis.switched and axis.name != "core"
        ]

    def inner_axes(self) -> list[int]:
        """Return the axis between the devices of a chip or of a node, if a group is on it."""
        return [
            number
            for number, axis in enumerate(self.topology.axes)
            if self.factors[number + 1] > 1 and (axis.switched or axis.name == "core")
        ]

    def closed(self, number: int) -> bool:
        """Return whether a group takes a whole wrapped axis."""
        axis = self.topology.axes[number]
        factor, stride = self.factors[number + 1], self.strides[number + 1]
        return axis.wrapped and factor * stride == axis.length and factor > 2

    def twisted_axes(self) -> tuple[int, ...]:
        """Return the short axes of a twisted torus that close inside a group: it takes the whole
        of them and of the long axes that they lead to."""
        short, long = self.topology.twist
        if not all(self.closed(axis) for axis in long):
            return ()
        return tuple(axis for axis in short if self.closed(axis))

    def axis_rate(self, number: int) -> float:
        """Return the bytes/s that one member gets along a torus axis."""
        ways = 2.0 if self.closed(number) else 1.0
        return self.topology.axes[number].bytes_per_s * ways / self.strides[number + 1]

    def lines(self, number: int) -> tuple[Ints, Ints]:
        """Return all groups' members by line along torus axis `number`, and each line's group."""
        grid = self.members.reshape(self.count, *self.factors)
        lines = np.moveaxis(grid, number + 2, -1).reshape(-1, self.factors[number + 1])
        return lines, np.repeat(np.arange(self.count), len(lines) // self.count)

    def table(self, name: str) -> Table:
        """Return a leg of all groups together: `gather:torus` and `scatter:torus`, `gather:N`
        inside a chip or node (axis N), `gather:dcn`, `exchange` (all-to-all), `ring+`, `closing+`
        and `ring+-` (one hop, one or both ways), `shift`, `next:N` and `back:N` (the Nth member of
        the ring to its neighbour), `permute:1,-2` (every member to the one so far ahead)."""
        if name not in self._tables:
            kind, _, where = name.partition(":")
            load = Load(self.topology, self.count)
            if kind in ("next", "back"):
                self._tables[name] = self._message(load, int(where), 1 if kind == "next" else -1)
            elif kind == "permute":
                shifts = [int(shift) for shift in where.split(",")]
                self._tables[name] = most([permuted(self, shift) for shift in shifts])
            elif where == "dcn":
                self._tables[name] = self._ports(load)
            elif where == "torus":
                # Around rings a scatter loads what a gather loads, and is then the same table.
                rings = kind == "scatter" and all(self.closed(axis) for axis in self.axes())
                self._tables[name] = (
                    self.table("gather:torus") if rings else self._torus(load, kind == "gather")
                )
            elif kind in ("gather", "scatter"):
                self._tables[name] = self._inside(load, int(where))
            elif kind == "exchange":
                self._tables[name] = self._exchange(load)
            else:
                self._tables[name] = self._ring(load, name)
        return self._tables[name]

    def _ports(self, load: Load) -> Table:
        """Return the slices' part of a gather: every member sends to all other slices."""
        slices = self.factors[0]
        members = self.members.reshape(-1)
        owners = np.repeat(np.arange(self.count), self.size)
        load.add(members * self.topology.ports + self.topology.dcn_port, owners, slices - 1.0)
        load.longest[:] = 1
        load.dcn = True
        return load.table("dcn", slices - 1)

    def _torus(self, load: Load, gather: bool) -> Table:
        """Return an all-gather or reduce-scatter over all torus axes at the same time.

        The hops of the axes follow each other. A twisted torus that closes inside the group loads
        all links of an axis alike, as a straight one does.
        """
        hops = np.zeros(self.count, dtype=np.int64)
        axes = self.axes()
        lengths = [self.factors[number + 1] for number in axes]
        rates = [self.axis_rate(number) for number in axes]
        closes = bool(self.twisted_axes())
        for number, n, shards in zip(axes, lengths, axis_loads(lengths, rates), strict=True):
            load.longest[:] = 0
            if closes and self.closed(number):
                owners = np.repeat(np.arange(self.count), self.size)
                for way in (0, 1):
                    links = self.members.reshape(-1) * self.topology.ports + 2 * number + way
                    load.add(links, owners, shards / 2.0)
                load.longest[:] = 1
            else:
                self._along(load, number, gather, shards / (n - 1))
            hops += load.longest * (math.ceil((n - 1) / 2) if self.closed(number) else n - 1)
        load.longest = hops
        return load.table("+".join(self.topology.axes[number].name for number in axes), 1)

    def _along(self, load: Load, number: int, gather: bool, unit: float) -> None:
        """Add an all-gather or reduce-scatter of `unit` shards along one axis, both ways.

        On a ring of n every directed link carries (n - 1) / 2 of them: for an even n the one from
        the far side comes half from each. On a line the link between members i and i + 1 carries
        the i + 1 of one side up and the n - 1 - i of the other down; in a reduce-scatter the sums
        go the other way.
        """
        n, stride = self.factors[number + 1], self.strides[number + 1]
        (lines, owners), ring = self.lines(number), self.closed(number)
        for way in (0, 1):
            for place in range(n):
                target = place + (1 if way == 0 else -1)
                if not ring and not 0 <= target < n:
                    continue
                shards = (n - 1) / 2.0 * unit
                if not ring:
                    behind = place + 1 if way == 0 else n - place
                    shards = (behind if gather else n - behind) * unit
                port = 2 * number + way
                load.step(lines[:, place], lines[:, target % n], owners, port, stride, shards)

    def _inside(self, load: Load, number: int) -> Table:
        """Return a gather or scatter inside a chip of two devices, or through a node's switch."""
        axis = self.topology.axes[number]
        n = self.factors[number + 1]
        if not axis.switched:
            self._along(load, number, True, 1.0)
            return load.table(axis.name, n - 1)
        owners = np.repeat(np.arange(self.count), self.size)
        links = self.members.reshape(-1) * self.topology.ports + 2 * number
        load.add(links, owners, n - 1.0)
        load.longest[:] = 1
        return load.table(axis.name, 1)

    def _exchange(self, load: Load) -> Table:
        """Return an all-to-all over the torus axes, in units of what a member holds.

        Every message goes axis by axis, the shorter way round; those to the opposite member of a
        ring half each way. What crosses an axis is what each member holds for other places on it.
        """
        if self.twisted_axes() and all(self.closed(axis) for axis in self.axes()):
            return self._twisted_exchange(load)
        hops = np.zeros(self.count, dtype=np.int64)
        for number in self.axes():
            n, stride = self.factors[number + 1], self.strides[number + 1]
            (lines, owners), ring = self.lines(number), self.closed(number)
            crossing = exchange_crossings(n, ring) / n
            load.longest[:] = 0
            for way in (0, 1):
                for place in np.nonzero(crossing[way])[0].tolist():
                    target = (place + (1 if way == 0 else -1)) % n
                    shards = float(crossing[way, place])
                    port = 2 * number + way
                    load.step(lines[:, place], lines[:, target], owners, port, stride, shards)
            hops += load.longest * (math.ceil((n - 1) / 2) if ring else n - 1)
        load.longest = hops
        return load.table("exchange", 1)

    def _twisted_exchange(self, load: Load) -> Table:
        """Return an all-to-all over shortest routes; it loads all links of a twisted slice alike.

        It gains 1.75 times over a straight 4x4x8 and 1.39 times over a 4x8x8, of which 1.63 and
        1.31 were measured on TPU v4 (Jouppi et al., arXiv 2304.01433, section 2.8).
        """
        crossing, hops = twisted_crossings(self.topology.machine.shape, self.topology.twist)
        owners = np.repeat(np.arange(self.count), self.size)
        share = self.size / self.topology.machine.chips_per_slice
        for port, shards in enumerate(crossing.reshape(-1).tolist()):
            links = self.members.reshape(-1) * self.topology.ports + port
            load.add(links, owners, shards * share)
        load.longest[:] = hops
        return load.table("exchange", 1)

    @cached_property
    def in_ring(self) -> Ints:
        """The members of every group in the order in which a ring visits them."""
        return self.members[:, ring_order(self.factors)]

    def places(self) -> Ints:
        """Return every device's place in the ring of its group: its pipeline stage."""
        table = np.empty(self.topology.devices, dtype=np.int64)
        table[self.in_ring] = np.arange(self.size)
        return table

    def _message(self, load: Load, place: int, way: int) -> Table:
        """Return one message from a place of every ring to the next or the previous one."""
        sources, targets = self.in_ring[:, place], self.in_ring[:, (place + way) % self.size]
        load.messages(sources, targets, np.arange(self.count), 1.0)
        return load.table("ring", 1)

    def _ring(self, load: Load, name: str) -> Table:
        """Return one hop from every member to the next of a ring; `ring+-` also to the last one.

        `shift` does not close the ring: the last member sends nothing. The ring visits the
        members so that each hop is one link where that is possible; where the ring cannot close
        over single links, its last hop goes all the way back. `ring+` has the latency of the other
        hops, `closing+` that of the last one.
        """
        order = self.in_ring
        following = np.roll(order, -1, axis=1)
        groups = np.arange(self.count)
        owners = np.repeat(groups, order.shape[1] - 1)
        load.messages(order[:, :-1].reshape(-1), following[:, :-1].reshape(-1), owners, 1.0)
        usual = load.longest.copy()
        if name != "shift":
            load.messages(order[:, -1], following[:, -1], groups, 1.0)
        if name == "ring+-":
            owners = np.repeat(groups, order.shape[1])
            load.messages(following.reshape(-1), order.reshape(-1), owners, 1.0)
        if name == "ring+":
            load.longest = usual
        return load.table("ring", 1)
