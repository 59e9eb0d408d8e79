"""The links of a machine: torus, twisted torus, slices over DCN, broken links, routes.

A device has one port per torus axis and direction and one DCN port; a link is the wire that
leaves a port. Links are numbered `device * ports + port`, so that loads are numpy arrays. Port
`2 * axis` leads up the axis, `2 * axis + 1` down; the last port is the one to other slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from shardsim.errors import HardwareError
from shardsim.machine import Machine

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A wire between two neighbours, both directions, at `factor` of its rate; 0 is dead."""

    device: int
    port: int
    factor: float = 0.0


class Topology:
    """All devices and directed links of a machine, faults included."""

    def __init__(
        self, machine: Machine, faults: tuple[Fault, ...] = (), broken: tuple[int, ...] = ()
    ) -> None:
        self.machine = machine
        self.axes = machine.axes
        self.shape = (machine.slices, *(axis.length for axis in machine.axes))
        self.devices = math.prod(self.shape)
        self.ports = 2 * len(self.axes) + 1
        self.dcn_port = self.ports - 1
        self.neighbour = self._neighbours()
        self.rates = self._rates()
        self.dead: set[int] = set()
        for fault in faults:
            self._break(fault)
        self.broken = frozenset(broken)  # devices that are out of order, with all their wires
        for device in self.broken:
            self._remove(device)

    # Construction.

    def _neighbours(self) -> Ints:
        """Return the device that each port leads to, [devices, ports]; -1 where none."""
        grid = np.arange(self.devices).reshape(self.shape)
        table = np.full((self.devices, self.ports), -1, dtype=np.int64)
        for number, axis in enumerate(self.axes):
            if axis.length == 1:
                continue
            if axis.switched:
                table[:, 2 * number] = np.arange(self.devices)  # a port into the switch
                continue
            up = np.roll(grid, -1, axis=number + 1)
            if axis.wrapped and self.machine.twisted:
                up = self._twist(up, number)
            flat = up.reshape(-1)
            table[:, 2 * number] = flat
            table[flat, 2 * number + 1] = np.arange(self.devices)
            if not axis.wrapped:
                position = self.position(number)
                table[position == axis.length - 1, 2 * number] = -1
                table[position == 0, 2 * number + 1] = -1
        return table

    def _twist(self, up: Ints, number: int) -> Ints:
        """Shift what wraps around a short axis by half of each long axis.

        k x k x 2k and k x 2k x 2k: a step around a k-long axis lands k further along the 2k-long
        ones, so that the torus stays the same seen from every chip (Camara et al. 2010, "Twisted
        torus topologies for enhanced interconnection networks"; Jouppi et al., arXiv 2304.01433,
        section 2.8).
        """
        lengths = [axis.length for axis in self.axes if axis.name != "core"]
        short = min(lengths)
        if self.axes[number].length != short or self.axes[number].name == "core":
            return up
        seam: list[Any] = [slice(None)] * len(self.shape)
        seam[number + 1] = short - 1
        part = np.expand_dims(up[tuple(seam)], number + 1)
        for other, length in enumerate(lengths):
            if length == 2 * short:
                part = np.roll(part, -short, axis=other + 1)
        twisted = up.copy()
        twisted[tuple(seam)] = np.take(part, 0, axis=number + 1)
        return twisted

    @property
    def twist(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the short axes of a twisted torus, and the long ones that they shift."""
        if not self.machine.twisted:
            return (), ()
        short = min(self.machine.shape)
        numbers = range(len(self.machine.shape))
        return (
            tuple(number for number in numbers if self.machine.shape[number] == short),
            tuple(number for number in numbers if self.machine.shape[number] == 2 * short),
        )

    def _rates(self) -> Floats:
        """Return the sustained bytes/s of every link; 0 where there is none."""
        chip = self.machine.chip
        rates = np.zeros((self.devices, self.ports))
        for number, axis in enumerate(self.axes):
            rates[:, 2 * number : 2 * number + 2] = axis.bytes_per_s * chip.link_efficiency
        rates[self.neighbour < 0] = 0.0
        if self.machine.slices > 1:
            rates[:, self.dcn_port] = (
                chip.dcn_bytes_per_s / chip.devices_per_chip * chip.dcn_efficiency
            )
        return rates.reshape(-1)

    def _break(self, fault: Fault) -> None:
        if not (0 <= fault.device < self.devices and 0 <= fault.port < self.dcn_port):
            raise HardwareError(f"{self.machine.name} has no link at {fault}")
        other = int(self.neighbour[fault.device, fault.port])
        if other < 0 or self.axes[fault.port // 2].switched:
            raise HardwareError(f"{self.machine.name}: no wire leaves {self.link_name(fault)}")
        if not 0 <= fault.factor <= 1:
            raise HardwareError(f"a link runs at 0 to 1 of its rate, not {fault.factor:g}")
        for link in (fault.device * self.ports + fault.port, other * self.ports + (fault.port ^ 1)):
            self.rates[link] *= fault.factor
            if fault.factor == 0:
                self.dead.add(link)

    def _remove(self, device: int) -> None:
        """Take a device and every wire at it out."""
        self.check_device(device)
        for port in range(self.dcn_port):
            other = int(self.neighbour[device, port])
            self.dead.add(device * self.ports + port)
            if 0 <= other != device:
                self.dead.add(other * self.ports + (port ^ 1))
        self.dead.add(device * self.ports + self.dcn_port)
        self.rates[list(self.dead)] = 0.0

    # Reading.

    def check_device(self, device: int) -> None:
        """Raise `HardwareError` for a device that is not there."""
        if not 0 <= device < self.devices:
            raise HardwareError(
                f"{self.machine.name} has devices 0 to {self.devices - 1}, not {device}"
            )

    def position(self, axis: int) -> Ints:
        """Return every device's place along torus axis number `axis`."""
        return np.asarray(np.indices(self.shape)[axis + 1].reshape(-1), dtype=np.int64)

    def coordinates(self, device: int) -> tuple[int, ...]:
        """Return a device's slice and its place along each axis."""
        return tuple(int(place) for place in np.unravel_index(device, self.shape))

    def device_at(self, *coordinates: int) -> int:
        """Return the device at (slice, x, y, ...)."""
        return int(np.ravel_multi_index(coordinates, self.shape))

    def port_name(self, port: int) -> str:
        """Return `x+`, `x-`, ..., or `dcn`.

        >>> from shardsim.machine import parse_machine
        >>> Topology(parse_machine("v4:4x4x4")).port_name(3)
        'y-'
        """
        if port == self.dcn_port:
            return "dcn"
        return f"{self.axes[port // 2].name}{'+-'[port % 2]}"

    def link_name(self, fault: Fault) -> str:
        """Return where a link is, for messages."""
        place = ",".join(map(str, self.coordinates(fault.device)[1:]))
        return f"chip ({place}) port {self.port_name(fault.port)}"

    @cached_property
    def graph(self) -> Any:
        """The working links as a networkx digraph; edges carry `link` and `bytes_per_s`."""
        import networkx as nx  # type: ignore[import-untyped]

        graph = nx.DiGraph()
        graph.add_nodes_from(device for device in range(self.devices) if device not in self.broken)
        for device, port in zip(*np.nonzero(self.neighbour >= 0), strict=True):
            link = int(device) * self.ports + int(port)
            if link not in self.dead and not self.axes[int(port) // 2].switched:
                graph.add_edge(
                    int(device),
                    int(self.neighbour[device, port]),
                    link=link,
                    bytes_per_s=float(self.rates[link]),
                )
        return graph

    # Routes.

    def is_dead(self, links: Ints) -> Any:
        """Return which of `links` are dead, as an array of booleans."""
        if not self.dead:
            return np.zeros(len(links), dtype=bool)
        return np.isin(links, list(self.dead))

    def route(self, source: int, target: int) -> list[int]:
        """Return the links from `source` to `target`: axis by axis, around what is dead.

        Between slices the route is the source's DCN port; behind a switch its one port.

        >>> from shardsim.machine import parse_machine
        >>> ring = Topology(parse_machine("v5e:2x4"))
        >>> [ring.port_name(link % ring.ports) for link in ring.route(0, 5)]
        ['x+', 'y+']
        """
        links, _, _ = self.routes(np.array([source]), np.array([target]))
        return [int(link) for link in links]

    def routes(self, sources: Ints, targets: Ints, half_way: int = 0) -> tuple[Ints, Ints, Ints]:
        """Return the links of many routes in a row, the route of each link, and each length.

        Half way around a wrapped axis there are two shortest ways: `half_way` 1 goes up, -1 down,
        0 the way that does not cross the seam.
        """
        here = np.stack(np.unravel_index(sources, self.shape))
        there = np.stack(np.unravel_index(targets, self.shape))
        device = np.array(sources)
        links: list[Ints] = []
        which: list[Ints] = []
        away = np.nonzero(here[0] != there[0])[0]
        links.append(device[away] * self.ports + self.dcn_port)
        which.append(away)
        device[away] = targets[away]
        for number, axis in enumerate(self.axes):
            ahead = there[number + 1] - here[number + 1]
            ahead[away] = 0
            if axis.switched:
                moving = np.nonzero(ahead)[0]
                links.append(device[moving] * self.ports + 2 * number)
                which.append(moving)
                device[moving] = targets[moving]
                continue
            if axis.wrapped:
                ahead = np.where(
                    2 * np.abs(ahead) > axis.length, ahead - np.sign(ahead) * axis.length, ahead
                )
                if half_way:
                    tied = 2 * np.abs(ahead) == axis.length
                    ahead = np.where(tied, half_way * np.abs(ahead), ahead)
            for step in range(int(np.abs(ahead).max(initial=0))):
                moving = np.nonzero(np.abs(ahead) > step)[0]
                port = 2 * number + (ahead[moving] < 0)
                links.append(device[moving] * self.ports + port)
                which.append(moving)
                device[moving] = self.neighbour[device[moving], port]
        all_links, all_which = np.concatenate(links), np.concatenate(which)
        lost = device != targets
        lost[all_which[self.is_dead(all_links)]] = True
        if lost.any():
            keep = ~lost[all_which]
            links, which = [all_links[keep]], [all_which[keep]]
            for place in np.nonzero(lost)[0].tolist():
                way = self.detour(int(sources[place]), int(targets[place]))
                links.append(np.array(way, dtype=np.int64))
                which.append(np.full(len(way), place))
            all_links, all_which = np.concatenate(links), np.concatenate(which)
        order = np.argsort(all_which, kind="stable")
        lengths = np.bincount(all_which, minlength=len(sources))
        return all_links[order], all_which[order], lengths

    def detour(self, source: int, target: int) -> list[int]:
        """Return the links of a shortest route over what still works."""
        import networkx as nx

        try:
            nodes = nx.bidirectional_shortest_path(self.graph, source, target)
        except (nx.NetworkXNoPath, nx.NodeNotFound):
            raise HardwareError(
                f"{self.machine.name}: no working way from device {source} to {target}"
            ) from None
        return [int(self.graph.edges[pair]["link"]) for pair in pairwise(nodes)]
