"""The group of devices that a collective runs over, as levels of links.

A group lies on some of the torus axes of a slice, perhaps on the two devices of a chip, perhaps
on several slices. Each of these is a level with its own bandwidth; within the torus level all
axes carry traffic at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations
from math import prod

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


@dataclass(frozen=True)
class _Line:
    """What a group has along one torus axis, or in a chip or node: `factor` of its devices, every
    `stride`-th. Groups of these interleave, and share each link among `stride` of them."""

    axis: TorusAxis
    factor: Number
    stride: Number

    @property
    def inside(self) -> bool:
        """Whether it lies in one chip, or one node of a switched machine."""
        return self.axis.switched or self.axis.name == "core"

    @property
    def used(self) -> Number:
        """Whether it has several members."""
        return np.greater(self.factor, 1)

    @cached_property
    def ways(self) -> Number:
        """Directions in which a member receives."""
        if self.axis.switched:
            return self.used * 1.0
        return self.used * np.where(closes(self.axis, self.factor, self.stride), 2.0, 1.0)

    @property
    def bytes_per_s(self) -> Number:
        """What one member receives, in all ways together."""
        return self.axis.bytes_per_s * self.ways / (1 if self.axis.switched else self.stride)

    @property
    def slowest_bytes_per_s(self) -> Number:
        """What passes in one way, infinite where it has one member."""
        way = self.bytes_per_s if self.inside else self.axis.bytes_per_s / self.stride
        return np.where(self.used, way, np.inf)

    @property
    def hop_s(self) -> Number:
        """Latency from a member to the next."""
        return self.used * self.axis.hop_latency_s * (1 if self.axis.switched else self.stride)

    @property
    def latency_s(self) -> Number:
        """Latency to the member furthest away."""
        closed = np.greater(self.ways, 1)
        return np.where(closed, np.ceil((self.factor - 1) / 2.0), self.factor - 1) * self.hop_s

    @property
    def across(self) -> Number:
        """Seconds that a byte a pair of members takes over the middle: see
        `collectives.all_to_all`.

        Half of the traffic of a wrapped axis crosses the worst link in eight directed shares, of an
        open one in four; the middle of an odd axis is a member: (P^2 - 1)/P instead of P.
        """
        members = (self.factor - np.mod(self.factor, 2) / self.factor) * self.stride
        return self.used * members / (4.0 * self.axis.bytes_per_s * np.maximum(self.ways, 1))


def group_of(machine: Machine, layout: AxisLayout) -> Group:
    """Return the links of the group that `layout` describes on `machine`.

    The torus level adds up the bandwidth of its axes: a multi-coloured collective cuts the array
    into parts that cross the axes in different orders, so that all of them are busy all the time
    (Sack and Gropp 2015; the form max(a sum|X|/2, V/(W n)) of the jax-ml/scaling-book,
    `sharding.md`). See `_together` for axes too slow for that.
    """
    chip = machine.chip
    lines = list(map(_Line, machine.axes, layout.factors, layout.strides))
    torus = [line for line in lines if not line.inside]
    core = Level(size=1, bytes_per_s=1.0, latency_s=0.0)
    for line in lines:
        if line.inside:
            rate = np.where(line.used, line.bytes_per_s * chip.link_efficiency, 1.0)
            core = Level(size=line.factor, bytes_per_s=rate, latency_s=line.hop_s)
    many = np.greater(layout.slices, 1)
    dcn_rate = chip.dcn_bytes_per_s / chip.devices_per_chip * chip.dcn_efficiency
    dcn_s = np.where(many, (layout.slices - 1) * chip.dcn_hop_latency_s, 0.0)
    members = prod(line.factor for line in torus)
    ways, close_s = _ring(lines, torus, members * core.size)
    slowest = reduce(np.minimum, (line.slowest_bytes_per_s for line in lines), np.inf)
    none = np.isinf(slowest)
    rate = np.where(none, 1.0, slowest) * chip.link_efficiency * chip.permute_gain
    hop_s = reduce(np.maximum, (line.hop_s for line in lines), 0.0)
    return Group(
        torus=Level(
            size=members,
            bytes_per_s=_together(torus) * chip.link_efficiency,
            latency_s=sum((line.latency_s for line in torus), 0.0),
        ),
        core=core,
        dcn=Level(size=layout.slices, bytes_per_s=dcn_rate, latency_s=dcn_s),
        # A group that lies on slices only has no links inside one.
        ring_bytes_per_s=np.where(many, np.where(none, dcn_rate, np.minimum(rate, dcn_rate)), rate),
        ring_ways=np.where(many, 1.0, ways),
        ring_hop_s=np.where(many, chip.dcn_hop_latency_s, hop_s),
        ring_close_s=np.where(many, 0.0, close_s),
        longest_axis=reduce(np.maximum, (line.across for line in torus), 0.0)
        / chip.link_efficiency,
        overhead_s=chip.collective_overhead_s,
    )


def _ring(lines: Sequence[_Line], torus: Sequence[_Line], members: Number) -> tuple[Number, Number]:
    """Return in how many ways a ring of all `members` in a slice goes round, and what its last hop
    takes beyond others.

    It closes over single hops on a whole wrapped axis, and on any patch of two or more axes with an
    even number of members (a snake); on a line its last hop goes all the way back. Of members
    further apart that hop is as long as others, but groups share their links.
    """
    closed = reduce(np.logical_or, (np.greater(line.ways, 1) for line in torus), False)
    apart = (np.greater(line.stride, 1) & line.used for line in torus)
    adjacent = np.logical_not(reduce(np.logical_or, apart, False))
    axes = sum(line.used for line in lines)
    snake = np.greater(axes, 1) & (np.mod(members, 2) == 0)
    back_s = sum(((line.factor - 1) * line.hop_s for line in torus), 0.0)
    hop_s = reduce(np.maximum, (line.hop_s for line in lines), 0.0)
    ways = np.where(closed | snake & adjacent, 2.0, 1.0)
    return ways, np.where(closed | snake, 0.0, np.maximum(back_s - hop_s, 0.0))


def _together(lines: Sequence[_Line]) -> Number:
    """Return the bytes/s into a member over all torus axes of a group together.

    Whatever the order of the axes, a set S of them carries at least prod(S) - 1 of the prod - 1
    shards, as many as if it went first. So the time is the longest of (prod(S) - 1) / (rate of S)
    over all sets; parts in all orders reach it (the bases of the polytope that these bounds span,
    Edmonds 1970). On equal axes, and whenever no axis is much slower, the longest is that of all
    axes: their rates add up.
    """
    time: Number = 0.0
    whole: Number = 1
    for count in range(1, len(lines) + 1):
        for chosen in combinations(lines, count):
            product: Number = prod(line.factor for line in chosen)
            rate: Number = sum(line.bytes_per_s for line in chosen)
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
