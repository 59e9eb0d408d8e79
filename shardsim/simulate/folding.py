"""Chips that do the same at the same time are simulated once.

Every device runs the same program, or that of its pipeline stage; what else differs between two
of them can only be their own speed, the groups that they are in, and the links that those groups
use. So colour devices by speed and stage and links by rate, and refine: a group gets a new colour
from the colours of its members and links, a device from those of its groups, a link from those of
the groups that load it, until nothing changes. Devices of one colour are then bound to do
everything at the same time (this is colour refinement, the coarsest equitable partition; Paige and
Tarjan 1987), and one of them stands for all. A healthy torus has one colour; a slow chip splits off
itself, the groups it is in, and the rest. Unfolded, every device, group and link has its own
colour, and all else stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from shardsim.simulate.fluid import Route
from shardsim.simulate.groups import Groups
from shardsim.simulate.load import Table
from shardsim.simulate.topology import Floats, Ints, Topology

Words = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass
class Fold:
    """The classes of devices, groups and links, and what connects them."""

    topology: Topology
    groups: dict[str, Groups]
    legs: dict[str, tuple[str, ...]]
    device_class: Ints
    group_class: dict[str, Ints]
    link_class: Ints  # -1: a link that nothing uses
    routes: dict[tuple[str, int, str], Route] = field(default_factory=dict)

    @cached_property
    def devices(self) -> Ints:
        """One device of each class."""
        return _first(self.device_class)

    @cached_property
    def device_counts(self) -> Ints:
        """How many devices each class has."""
        return np.bincount(self.device_class)

    @cached_property
    def links(self) -> Ints:
        """One link of each class."""
        return _first(self.link_class)

    @cached_property
    def link_counts(self) -> Ints:
        """How many links each class has."""
        return np.bincount(self.link_class[self.link_class >= 0])

    @cached_property
    def group_first(self) -> dict[str, Ints]:
        """One group of each class, by role."""
        return {role: _first(colours) for role, colours in self.group_class.items()}

    def group_of(self, role: str, device_class: int) -> int:
        """Return the class of the group in which devices of a class are."""
        group = self.groups[role].of_device[self.devices[device_class]]
        return int(self.group_class[role][group])

    def members(self, role: str, group_class: int) -> int:
        """Return how many classes of devices a group has."""
        group = self.group_first[role][group_class]
        return len(np.unique(self.device_class[self.groups[role].members[group]]))

    def route(self, role: str, group_class: int, leg: str) -> Route:
        """Return a leg of a group as links of classes."""
        key = (role, group_class, leg)
        if key not in self.routes:
            self.routes[key] = self._route(role, group_class, leg)
        return self.routes[key]

    def _route(self, role: str, group_class: int, name: str) -> Route:
        made = self.groups[role].table(name)  # by group, then by link
        group = int(self.group_first[role][group_class])
        begin, end = np.searchsorted(made.owners, (group, group + 1))
        used = np.unique(self.link_class[made.links[begin:end]])
        representatives = self.links[used]
        table = self._incidence(role, name)  # by link
        low, high = np.searchsorted(table.links, (representatives, representatives + 1))
        # All entries of the table about these links, link after link, and those of this class.
        counts = high - low
        entries = np.arange(counts.sum()) + np.repeat(low - np.cumsum(counts) + counts, counts)
        mine = self.group_class[role][table.owners[entries]] == group_class
        entries, place = entries[mine], np.repeat(np.arange(len(used)), counts)[mine]
        loads = np.zeros(len(used))
        # Groups of one class load links of one class alike, though perhaps not in one order.
        np.maximum.at(loads, place, table.shards[entries])
        ports = frozenset((representatives % self.topology.ports).tolist())
        return Route(
            name=made.name,
            links=used,
            loads=loads,
            streams=_totals(place, np.ones(len(place)), len(used)),
            carried=_totals(place, table.moved[entries], len(used)),
            hops=int(made.hops[group]),
            dcn=made.dcn,
            ports=ports,
        )

    def _incidence(self, role: str, name: str) -> Incidence:
        """Return what a leg over all groups puts on links; legs that load the same share it."""
        table = self.groups[role].table(name)
        if id(table) not in self._tables:
            self._tables[id(table)] = Incidence(table)
        return self._tables[id(table)]

    @cached_property
    def _tables(self) -> dict[int, Incidence]:
        return {}


class Incidence:
    """Which groups' leg loads which links with how many shards, by link."""

    def __init__(self, table: Table) -> None:
        order = np.argsort(table.links, kind="stable")
        self.links = table.links[order]
        self.owners = table.owners[order]
        self.shards = table.shards[order]
        self.moved = self.shards if table.moved is table.shards else table.moved[order]

    @cached_property
    def words(self) -> Words:
        """A number for each entry that differs where its shards do."""
        return _bits(self.shards) + _mix(_bits(self.moved))


def fold(
    topology: Topology,
    groups: dict[str, Groups],
    legs: dict[str, tuple[str, ...]],
    kinds: Ints,
    unfold: bool = False,
) -> Fold:
    """Return the classes. `legs` names what each role's groups will do; devices of different
    `kinds` are known to differ: in speed, or in their pipeline stage."""
    result = Fold(
        topology=topology,
        groups=groups,
        legs=legs,
        device_class=np.arange(topology.devices),
        group_class={role: np.arange(item.count) for role, item in groups.items()},
        link_class=np.full(len(topology.rates), -1),
    )
    tables = {
        role: list(dict.fromkeys(result._incidence(role, name) for name in legs[role]))
        for role in groups
    }
    used = np.zeros(len(topology.rates), dtype=bool)
    for item in tables.values():
        for table in item:
            used[table.links] = True
    if unfold:
        result.link_class[used] = np.arange(used.sum())
        return result
    _refine(result, tables, kinds, used)
    return result


def _refine(result: Fold, tables: dict[str, list[Incidence]], kinds: Ints, used: Any) -> None:
    topology, groups = result.topology, result.groups
    devices = kinds
    port = np.arange(len(used)) % topology.ports  # kept apart so that reports can name them
    links = np.where(used, _colours(topology.rates) * topology.ports + port + 1, 0)
    grouped = {role: _colours(_latencies(item, result.legs[role])) for role, item in groups.items()}
    before = -1
    while True:
        link_words = _mix(links.astype(np.uint64))
        for role, item in groups.items():
            word = _mix(grouped[role].astype(np.uint64))
            members = _mix(devices.astype(np.uint64) + np.uint64(1))[item.members]
            word = word + _mix(members.sum(axis=1, dtype=np.uint64))
            for number, table in enumerate(tables[role]):
                tagged = _mix(link_words[table.links] + table.words + np.uint64(number * 7919))
                word = word + _mix(_sums(table.owners, tagged, item.count) + np.uint64(number))
            grouped[role] = _colours(word)
        device_word = _mix(devices.astype(np.uint64))
        link_word = link_words.copy()  # carries the port and the rate along
        for tag, (role, item) in enumerate(groups.items()):
            colour = _mix(grouped[role].astype(np.uint64) + np.uint64(104729 * (tag + 1)))
            device_word = _mix(device_word + colour[item.of_device])
            for number, table in enumerate(tables[role]):
                tagged = _mix(colour[table.owners] + table.words + np.uint64(number * 31337))
                link_word = link_word + _sums(table.links, tagged, len(links))
        devices = _colours(device_word)
        links = np.where(used, _colours(np.where(used, _mix(link_word), 0)) + 1, 0)
        count = sum(len(np.unique(colours)) for colours in (devices, links, *grouped.values()))
        if count == before:
            break
        before = count
    result.device_class = _by_first(devices)
    result.group_class = {role: _by_first(colours) for role, colours in grouped.items()}
    result.link_class = np.full(len(links), -1)
    result.link_class[used] = _by_first(links[used])


def _latencies(groups: Groups, names: tuple[str, ...]) -> Floats:
    """Return a number per group that differs where hops differ (detours)."""
    total = np.zeros(groups.count)
    for number, name in enumerate(names):
        total += groups.table(name).hops * (1.0 + 0.6180339887 * number)
    return total


def _mix(words: Words) -> Words:
    """Return well-mixed 64-bit words (splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words ^= words >> np.uint64(30)
        words *= np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(27)
        words *= np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
        return words


def _bits(values: Floats) -> Words:
    return np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)


def _sums(keys: Ints, words: Words, count: int) -> Words:
    """Return the sum of `words` by key, modulo 2^64."""
    total = np.zeros(count, dtype=np.uint64)
    np.add.at(total, keys, words)
    return total


def _totals(keys: Ints, values: Floats, count: int) -> Floats:
    """Return the sum of `values` by key."""
    return np.asarray(np.bincount(keys, weights=values, minlength=count), dtype=np.float64)


def _colours(values: Any) -> Ints:
    return np.asarray(np.unique(values, return_inverse=True)[1], dtype=np.int64).reshape(-1)


def _by_first(colours: Ints) -> Ints:
    """Return colours renumbered in the order in which they first appear."""
    _, first, inverse = np.unique(colours, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return np.asarray(rank[inverse.reshape(-1)], dtype=np.int64)


def _first(colours: Ints) -> Ints:
    """Return the first place of each colour 0, 1, ...; places of colour -1 are left out."""
    found, first = np.unique(colours, return_index=True)
    return np.asarray(first[found >= 0], dtype=np.int64)
