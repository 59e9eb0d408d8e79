"""What the messages of all groups put on the links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shardsim.simulate.topology import Floats, Ints, Topology


@dataclass(frozen=True, kw_only=True)
class Table:
    """One leg of all groups, by group and then by link."""

    name: str  # "x", "dcn", "ring", ...
    links: Ints
    owners: Ints
    shards: Floats  # carried by each link, in units of the shard a member starts with
    moved: Floats  # the same on average over the step, for what is evened out: see `Load.add`
    hops: Ints  # per group: links that one message crosses after the other
    dcn: bool


class Load:
    """Adds up the shards that the messages of all groups put on links."""

    def __init__(self, topology: Topology, count: int) -> None:
        self.topology = topology
        self.links: list[Ints] = []
        self.owners: list[Ints] = []
        self.shards: list[Floats] = []
        self.moved: list[Floats] = []
        self.longest = np.zeros(count, dtype=np.int64)  # links of a group's longest message
        self.dcn = False

    def add(self, links: Ints, owners: Ints, shards: float, moved: float | None = None) -> None:
        """Put `shards` on every link, for its owner.

        Where only some of the links carry them, all are held up, by `shards`, and `moved` is what
        they carry on average.
        """
        self.links.append(links)
        self.owners.append(owners)
        self.shards.append(np.full(len(links), shards))
        self.moved.append(self.shards[-1] if moved is None else np.full(len(links), moved))

    def step(
        self, sources: Ints, targets: Ints, owners: Ints, port: int, stride: int, shards: float
    ) -> None:
        """Send `shards` from each source `stride` wires along `port`; detour where needed."""
        topology = self.topology
        here = sources
        path = []
        good = np.ones(len(sources), dtype=bool)
        for _ in range(stride):
            path.append(here * topology.ports + port)
            good &= ~topology.is_dead(path[-1])
            here = topology.neighbour[here, port]
        good &= here == targets
        for links in path:
            self.add(links[good], owners[good], shards)
        np.maximum.at(self.longest, owners[good], stride)
        if not good.all():
            self.messages(sources[~good], targets[~good], owners[~good], shards)

    def messages(
        self,
        sources: Ints,
        targets: Ints,
        owners: Ints,
        shards: float,
        moved: float | None = None,
        half_way: int = 0,
    ) -> None:
        """Send `shards` along the routes from sources to targets."""
        links, which, hops = self.topology.routes(sources, targets, half_way)
        self.dcn |= bool(np.any(links % self.topology.ports == self.topology.dcn_port))
        np.maximum.at(self.longest, owners, hops)
        self.add(links, owners[which], shards, moved)

    def table(self, name: str, rounds: int) -> Table:
        """Return what was added; `rounds` messages follow each other over the longest path."""
        none = np.zeros(0, dtype=np.int64)
        count = len(self.topology.rates)
        keys = np.concatenate([none, *self.owners]) * count + np.concatenate([none, *self.links])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        fresh = np.diff(keys, prepend=-1) != 0
        found, place = keys[fresh], np.cumsum(fresh) - 1
        shards = _sums(place, self.shards, order)
        alike = all(moved is held for moved, held in zip(self.moved, self.shards, strict=True))
        return Table(
            name=name,
            links=found % count,
            owners=found // count,
            shards=shards,
            moved=shards if alike else _sums(place, self.moved, order),
            hops=self.longest * rounds,
            dcn=self.dcn,
        )


def _sums(place: Ints, amounts: Sequence[Floats], order: Ints) -> Floats:
    """Return the sums of amounts by place, taken in `order`."""
    weights = np.concatenate([np.zeros(0), *amounts])[order]
    return np.asarray(np.bincount(place, weights=weights), dtype=np.float64)


def most(tables: Sequence[Table]) -> Table:
    """Return a leg that puts on each link the most that one of `tables` puts there.

    For messages of which each member sends one or another, and it is not known which.
    """
    if len(tables) == 1:
        return tables[0]
    owners = np.concatenate([table.owners for table in tables])
    links = np.concatenate([table.links for table in tables])
    pairs, inverse = np.unique(np.stack([owners, links]), axis=1, return_inverse=True)
    place = inverse.reshape(-1)
    shards = np.zeros(pairs.shape[1])
    np.maximum.at(shards, place, np.concatenate([table.shards for table in tables]))
    moved = np.concatenate([table.moved for table in tables])
    return Table(
        name=tables[0].name,
        links=pairs[1],
        owners=pairs[0],
        shards=shards,
        moved=np.bincount(place, weights=moved) / len(tables),
        hops=np.max([table.hops for table in tables], axis=0),
        dcn=any(table.dcn for table in tables),
    )


def axis_loads(lengths: Sequence[int], rates: Sequence[float]) -> list[float]:
    """Return how many shards each member receives along every axis of a gather over all of them.

    What parts in all orders of the axes can load them with are the bases of the polytope where
    each set S of axes carries at least prod(S) - 1 shards, the load if S goes first, and all
    together carry prod - 1 (Edmonds 1970). The set that its rates serve worst gets its least;
    the others share the rest in the same way (Fujishige 1980, the lexicographically optimal base).

    >>> axis_loads([4, 4], [1.0, 1.0]), axis_loads([4, 4], [1.0, 0.1])
    ([7.5, 7.5], [12.0, 3.0])
    """
    loads = [0.0] * len(lengths)
    left = list(range(len(lengths)))
    held = 1
    while left:
        sets = [part for size in range(len(left), 0, -1) for part in combinations(left, size)]
        products = {part: math.prod(lengths[axis] for axis in part) for part in sets}
        times = {part: held * (products[part] - 1) / sum(rates[a] for a in part) for part in sets}
        worst = max(sets, key=lambda part: times[part])
        for axis in worst:
            loads[axis] = rates[axis] * times[worst]
            left.remove(axis)
        held *= products[worst]
    return loads
