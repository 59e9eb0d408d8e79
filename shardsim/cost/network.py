"""The group of devices that a collective runs over, as levels of links.

A group lies on some of the torus axes of a slice, perhaps on the two devices of a chip, perhaps
on several slices. Each of these is a level with its own bandwidth; within the torus level all
axes carry traffic at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shardsim.machine import Machine, TorusAxis
from shardsim.plan.layout import JOINT_ROLES, ROLES, AxisLayout, Layout, Number, closes


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a group's links: `size` members that move `bytes_per_s` in and out each."""

    size: Number
    bytes_per_s: Number  # what one member receives, all links of the level together
    latency_s: Number  # of one message to every member, in hops that follow each other


@dataclass(frozen=True, kw_only=True)
class Group:
    """The links of one group of devices."""

    torus: Level
    core: Level  # the devices of one chip, or of one node of a switched machine
    dcn: Level
    ring_bytes_per_s: Number  # per direction, when the group passes blocks round in a ring
    ring_ways: Number  # directions that a ring can use: 2 if it closes over single hops
    ring_hop_s: Number
    ring_close_s: Number  # what the hop from the last member to the first takes beyond that
    longest_axis: Number  # max over axes of what crosses the middle: all-to-all
    overhead_s: float

    @property
    def size(self) -> Number:
        """Devices in the group."""
        return self.torus.size * self.core.size * self.dcn.size

    def levels(self, stage: str = "all") -> tuple[Level, ...]:
        """Return the levels from the innermost to the outermost; `stage` keeps some of them."""
        if stage == "torus":
            return (self.core, self.torus)
        if stage == "dcn":
            return (self.dcn,)
        return (self.core, self.torus, self.dcn)


def _line(axis: TorusAxis, factor: Number, stride: Number) -> tuple[Number, Number, Number]:
    """Return bandwidth, ways and hop latency of a group along one torus axis.

    Groups of every `stride`-th device interleave, and share each link among `stride` of them.
    """
    used = np.greater(factor, 1)
    if axis.switched:
        return used * axis.bytes_per_s, used * 1.0, used * axis.hop_latency_s
    ways = np.where(closes(axis, factor, stride), 2.0, 1.0)
    return (
        used * axis.bytes_per_s * ways / stride,
        used * ways,
        used * axis.hop_latency_s * stride,
    )


def group_of(machine: Machine, layout: AxisLayout) -> Group:
    """Return the links of the group that `layout` describes on `machine`.

    The torus level adds up the bandwidth of its axes: a multi-coloured collective cuts the array
    into parts that cross the axes in different orders, so that all of them are busy all the time
    (Sack and Gropp 2015; the form max(a sum|X|/2, V/(W n)) of the jax-ml/scaling-book,
    `sharding.md`). See `_together` for axes too slow for that.
    """
    chip = machine.chip
    torus_size: Number = 1
    sizes: list[Number] = []
    rates: list[Number] = []
    latency: Number = 0.0
    longest: Number = 0.0
    used_axes: Number = 0
    slowest: Number = np.inf
    hop: Number = 0.0
    closed_line: Number = False
    way_back_s: Number = 0.0
    strided: Number = 1
    core = Level(size=1, bytes_per_s=1.0, latency_s=0.0)
    for axis, factor, stride in zip(machine.axes, layout.factors, layout.strides, strict=True):
        rate, ways, hop_s = _line(axis, factor, stride)
        if axis.switched or axis.name == "core":
            core = Level(
                size=factor,
                bytes_per_s=np.where(np.greater(factor, 1), rate * chip.link_efficiency, 1.0),
                latency_s=hop_s,
            )
            used_axes = used_axes + np.greater(factor, 1)
            slowest = np.where(np.greater(factor, 1), np.minimum(slowest, rate), slowest)
            hop = np.maximum(hop, hop_s)
            continue
        used = np.greater(factor, 1)
        torus_size = torus_size * factor
        sizes.append(factor)
        rates.append(rate)
        hops = np.where(np.greater(ways, 1), np.ceil((factor - 1) / 2.0), factor - 1)
        latency = latency + hops * hop_s
        way_back_s = way_back_s + used * (factor - 1) * hop_s
        # Half of the traffic of a wrapped axis crosses the worst link in eight directed shares,
        # of an open one in four; the middle of an odd axis is a member: (P^2 - 1)/P instead of P.
        # See collectives.all_to_all.
        across = (factor - np.mod(factor, 2) / factor) * stride
        longest = np.maximum(
            longest, used * across / (4.0 * axis.bytes_per_s * np.maximum(ways, 1))
        )
        used_axes = used_axes + used
        slowest = np.where(used, np.minimum(slowest, axis.bytes_per_s / stride), slowest)
        closed_line = closed_line | np.greater(ways, 1)
        strided = np.maximum(strided, np.where(used, stride, 1))
        hop = np.maximum(hop, hop_s)
    in_slice = torus_size * core.size
    # A ring closes over single hops on a whole wrapped axis, and on any patch of two or more axes
    # with an even number of members (a snake); on a line its last hop goes all the way back.
    # Of members further apart that hop is as long as others, but groups share their links.
    snake = np.greater(used_axes, 1) & (np.mod(in_slice, 2) == 0)
    ring_ways = np.where(closed_line | snake & np.equal(strided, 1), 2.0, 1.0)
    many = np.greater(layout.slices, 1)
    rate = np.where(np.isinf(slowest), 1.0, slowest) * chip.link_efficiency * chip.permute_gain
    dcn_rate = chip.dcn_bytes_per_s / chip.devices_per_chip * chip.dcn_efficiency
    return Group(
        torus=Level(
            size=torus_size,
            bytes_per_s=_together(sizes, rates) * chip.link_efficiency,
            latency_s=latency,
        ),
        core=core,
        dcn=Level(
            size=layout.slices,
            bytes_per_s=dcn_rate,
            latency_s=np.where(many, (layout.slices - 1) * chip.dcn_hop_latency_s, 0.0),
        ),
        # A group that lies on slices only has no links inside one.
        ring_bytes_per_s=np.where(
            many, np.where(np.isinf(slowest), dcn_rate, np.minimum(rate, dcn_rate)), rate
        ),
        ring_ways=np.where(many, 1.0, ring_ways),
        ring_hop_s=np.where(many, chip.dcn_hop_latency_s, hop),
        ring_close_s=np.where(many | closed_line | snake, 0.0, np.maximum(way_back_s - hop, 0.0)),
        longest_axis=longest / chip.link_efficiency,
        overhead_s=chip.collective_overhead_s,
    )


def _together(sizes: list[Number], rates: list[Number]) -> Number:
    """Return the bytes/s into a member over all torus axes of a group together.

    Whatever the order of the axes, a set S of them carries at least prod(S) - 1 of the prod - 1
    shards, as many as if it went first. So the time is the longest of (prod(S) - 1) / (rate of S)
    over all sets; parts in all orders reach it (the bases of the polytope that these bounds span,
    Edmonds 1970). On equal axes, and whenever no axis is much slower, the longest is that of all
    axes: their rates add up.
    """
    time: Number = 0.0
    whole: Number = 1
    for count in range(1, len(sizes) + 1):
        for chosen in combinations(range(len(sizes)), count):
            product: Number = 1
            rate: Number = 0.0
            for axis in chosen:
                product = product * sizes[axis]
                rate = rate + rates[axis]
            time = np.maximum(time, (product - 1) / np.where(np.greater(rate, 0), rate, 1.0))
            whole = product
    return np.where(time > 0, (whole - 1) / np.where(time > 0, time, 1.0), 1.0)


class Links(Mapping[str, Group]):
    """The links of every role of a layout, and of its joint groups, when asked for."""

    ROLES = (*ROLES, *JOINT_ROLES)

    def __init__(self, machine: Machine, layout: Layout) -> None:
        self.machine = machine
        self._layout = layout
        self._known: dict[str, Group] = {}

    def __getitem__(self, role: str) -> Group:
        if role not in self._known:
            if not set(role.split("+")) <= set(self.ROLES):
                raise KeyError(role)
            self._known[role] = group_of(self.machine, self._layout.role(role))
        return self._known[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ROLES)

    def __len__(self) -> int:
        return len(self.ROLES)
