"""Collectives carried out hop by hop: who holds what, what each link carries, how long it takes.

An axis is `length` devices in a row, joined end to end if it wraps; a link carries bytes both
ways at once. In a group of every `stride`-th device, members pass data through the devices of the
other groups, which do the same at the same time: `stride` groups share each link. Each step ends
when the busiest link is done and the data has passed its hops. An opposite member of a ring is
reached half from either side, so every shard is two halves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

Half = tuple[int, int]  # a member's shard, and which half of it


@dataclass
class Line:
    """One torus axis with groups of `members`, `stride` apart, from end to end of the axis."""

    members: int
    stride: int
    wrapped: bool  # the group closes into a ring
    bytes_per_s: float
    hop_s: float
    ways: int = 2  # directions that are used
    time_s: float = 0.0
    link_bytes: defaultdict[tuple[int, int], float] = field(
        default_factory=lambda: defaultdict(float)
    )
    sent: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    received: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def length(self) -> int:
        """Devices along the axis that the groups cover."""
        return self.members * self.stride

    def neighbour(self, member: int, way: int) -> int | None:
        """Return the next member in the direction `way`, or None past the end of a line."""
        there = member + way
        if self.wrapped:
            return there % self.members
        return there if 0 <= there < self.members else None

    def step(self, moves: list[tuple[int, int, float]]) -> None:
        """Move (from member, way, bytes) in every interleaved group at once."""
        carried: defaultdict[tuple[int, int], float] = defaultdict(float)
        for member, way, size in moves:
            other = self.neighbour(member, way)
            assert other is not None
            self.sent[member] += size
            self.received[other] += size
            for group in range(self.stride):
                device = member * self.stride + group
                for _ in range(self.stride):
                    after = (device + way) % self.length
                    carried[device, after] += size
                    device = after
                assert device == other * self.stride + group
        if carried:
            for link, size in carried.items():
                self.link_bytes[link] += size
            self.time_s += max(carried.values()) / self.bytes_per_s + self.stride * self.hop_s

    def reach(self, member: int, way: int, half: int) -> int:
        """Return how many members a half shard travels in one direction."""
        if self.ways == 1:
            far = self.members - 1
            return far if way == 1 else 0
        if not self.wrapped:
            return self.members - 1 - member if way == 1 else member
        other = (self.members - 1) // 2
        longer = (half == 0) == (way == 1)
        return self.members // 2 if longer else other

    def paths(self) -> Iterator[tuple[int, int, Half, int]]:
        """Yield (from, to, half shard, step) of every hop of an all-gather."""
        for member in range(self.members):
            for half in (0, 1):
                for way in (1, -1):
                    here = member
                    for step in range(self.reach(member, way, half)):
                        there = self.neighbour(here, way)
                        assert there is not None
                        yield here, way, (member, half), step
                        here = there

    def all_gather(self, shard_bytes: float) -> None:
        """Bring every member's shard to every member; all members end with all shards."""
        holds: list[set[Half]] = [{(member, 0), (member, 1)} for member in range(self.members)]
        hops = sorted(self.paths(), key=lambda hop: hop[3])
        for step in range(self.members):
            now = [hop for hop in hops if hop[3] == step]
            for here, _, half, _ in now:
                assert half in holds[here], "sent before it arrived"
            for here, way, half, _ in now:
                there = self.neighbour(here, way)
                assert there is not None
                assert half not in holds[there], "arrived twice"
                holds[there].add(half)
            self.step([(here, way, shard_bytes / 2) for here, way, _, _ in now])
        everything = {(member, half) for member in range(self.members) for half in (0, 1)}
        assert all(held == everything for held in holds)

    def reduce_scatter(self, shard_bytes: float) -> None:
        """Sum every member's part for each member: the hops of an all-gather backwards."""
        parts = [
            {(owner, half): {member} for owner in range(self.members) for half in (0, 1)}
            for member in range(self.members)
        ]
        hops = sorted(self.paths(), key=lambda hop: -hop[3])
        for step in reversed(range(self.members)):
            now = [hop for hop in hops if hop[3] == step]
            back = []
            for here, way, half, _ in now:
                source = self.neighbour(here, way)
                assert source is not None
                carried = parts[source].pop(half)
                assert not carried & parts[here][half], "summed twice"
                parts[here][half] |= carried
                back.append((source, -way, shard_bytes / 2))
            self.step(back)
        for member, held in enumerate(parts):
            assert set(held) == {(member, 0), (member, 1)}
            assert all(summed == set(range(self.members)) for summed in held.values())

    def all_reduce(self, shard_bytes: float) -> None:
        """Reduce-scatter, then all-gather."""
        self.reduce_scatter(shard_bytes)
        self.all_gather(shard_bytes)

    def all_to_all_s(self, held_bytes: float) -> float:
        """Return the time in which the busiest link has carried its share of an exchange."""
        part = held_bytes / self.members
        load: defaultdict[tuple[int, int], float] = defaultdict(float)
        for source in range(self.members):
            for target in range(self.members):
                for way, share in self.routes(source, target):
                    for group in range(self.stride):
                        device = source * self.stride + group
                        while device != target * self.stride + group:
                            after = (device + way) % self.length
                            load[device, after] += share * part
                            device = after
        return max(load.values()) / self.bytes_per_s

    def routes(self, source: int, target: int) -> list[tuple[int, float]]:
        """Return the ways from one member to another, each with its share of the data."""
        if source == target:
            return []
        if not self.wrapped:
            return [(1 if target > source else -1, 1.0)]
        ahead = (target - source) % self.members
        if 2 * ahead == self.members:
            return [(1, 0.5), (-1, 0.5)]
        return [(1 if 2 * ahead < self.members else -1, 1.0)]
