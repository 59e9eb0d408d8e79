"""How busy links were: as a table by direction, and for every wire."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.cost.predict import Prediction
from shardsim.simulate.outcome import engine_of
from shardsim.simulate.topology import Floats


@dataclass(frozen=True, kw_only=True)
class LinkRow:
    """All links of one direction of one axis (or all DCN ports)."""

    port: str
    links: int
    bytes_per_s: float  # sustained rate of the fastest
    busiest: float  # share of the step in which the busiest link would be busy at its full rate
    mean: float
    busiest_bytes: float


def link_table(simulation: Prediction) -> list[LinkRow]:
    """Return utilisation by axis and direction.

    >>> from shardsim.plan import load_plan
    >>> from shardsim.simulate import simulate_plan
    >>> rows = link_table(simulate_plan(load_plan("vit-22b-published-tp8")))
    >>> [row.port for row in rows]
    ['x+', 'x-', 'y+', 'y-', 'z+', 'z-']
    """
    engine = engine_of(simulation)
    topology = engine.topology
    shares, moved = by_link(simulation)
    rows = []
    for port in range(topology.ports):
        links = np.arange(topology.devices) * topology.ports + port
        links = links[topology.rates[links] > 0]
        if len(links):
            rows.append(
                LinkRow(
                    port=topology.port_name(port),
                    links=len(links),
                    bytes_per_s=float(topology.rates[links].max()),
                    busiest=float(shares[links].max()),
                    mean=float(shares[links].mean()),
                    busiest_bytes=float(moved[links].max()),
                )
            )
    return rows


def by_link(simulation: Prediction) -> tuple[Floats, Floats]:
    """Return every link's share of the step at full rate, and its bytes."""
    engine = engine_of(simulation)
    classes = engine.folded.link_class
    used = classes >= 0
    shares, moved = np.zeros(len(classes)), np.zeros(len(classes))
    shares[used] = engine.links.busy_s[classes[used]] / simulation.step_time_s
    moved[used] = engine.links.bytes_off[classes[used]]
    return shares, moved


def by_wire(simulation: Prediction) -> Floats:
    """Return the busier direction of the wire up from every device, [devices, axes]; NaN: none."""
    engine = engine_of(simulation)
    topology = engine.topology
    shares, _ = by_link(simulation)
    table = np.full((topology.devices, len(topology.axes)), np.nan)
    for number in range(len(topology.axes)):
        there = topology.neighbour[:, 2 * number]
        wired = np.nonzero(there >= 0)[0]
        up = shares[wired * topology.ports + 2 * number]
        down = shares[there[wired] * topology.ports + 2 * number + 1]
        table[wired, number] = np.maximum(up, down)
    return table
