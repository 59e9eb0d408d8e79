"""Link utilisation as a table and as a picture of the torus."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardsim.simulate.step import Simulation
from shardsim.simulate.timeline import save_figure
from shardsim.simulate.topology import Floats, Topology


@dataclass(frozen=True, kw_only=True)
class LinkRow:
    """All links of one direction of one axis (or all DCN ports)."""

    port: str
    links: int
    bytes_per_s: float  # sustained rate of the fastest
    busiest: float  # share of the step in which the busiest link would be busy at its full rate
    mean: float
    busiest_bytes: float


def link_table(simulation: Simulation) -> list[LinkRow]:
    """Return utilisation by axis and direction.

    >>> from shardsim.plan import load_plan
    >>> from shardsim.simulate import simulate_plan
    >>> rows = link_table(simulate_plan(load_plan("vit-22b-published-tp8")))
    >>> [row.port for row in rows]
    ['x+', 'x-', 'y+', 'y-', 'z+', 'z-']
    """
    engine = simulation.engine
    assert engine is not None
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


def by_link(simulation: Simulation) -> tuple[Floats, Floats]:
    """Return every link's share of the step at full rate, and its bytes."""
    engine = simulation.engine
    assert engine is not None
    classes = engine.folded.link_class
    used = classes >= 0
    shares, moved = np.zeros(len(classes)), np.zeros(len(classes))
    shares[used] = engine.links.busy_s[classes[used]] / simulation.step_time_s
    moved[used] = engine.links.bytes_off[classes[used]]
    return shares, moved


def draw_torus(simulation: Simulation, path: str | os.PathLike[str]) -> None:
    """Draw one slice: every wire coloured by how busy its busier direction is; dead ones dashed.

    Planes of the last torus axis stand side by side, so that a 3-D torus is drawn flat; the wires
    between planes are the dots. Wires around the torus leave the edge.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    engine = simulation.engine
    assert engine is not None
    topology = engine.topology
    share = _wires(simulation, topology)
    torus = [n for n, axis in enumerate(topology.axes) if not axis.switched and axis.name != "core"]
    lengths = [topology.axes[n].length for n in torus] + [1, 1]
    planes = lengths[2]
    columns = min(planes, 8)
    rows = -(-planes // columns)
    top = max(float(np.nanmax(share, initial=0.0)), 1e-9)
    scale = Normalize(0.0, top)
    figure = Figure(
        figsize=(2.2 + columns * (0.5 + 0.17 * lengths[0]), 1.3 + rows * (0.5 + 0.2 * lengths[1])),
        layout="constrained",
    )
    for plane in range(planes):
        axes = figure.add_subplot(rows, columns, plane + 1)
        lines: list[Any] = []
        values: list[float] = []
        dead: list[Any] = []
        dots = np.full((lengths[0], lengths[1]), np.nan)
        for x in range(lengths[0]):
            for y in range(lengths[1]):
                place = [0] * len(topology.shape)
                for number, value in zip(torus, (x, y, plane), strict=False):
                    place[number + 1] = value
                device = topology.device_at(*place)
                for number in torus[:2]:
                    value = share[device, number]
                    ends = [(x, y), (x + 1, y)] if number == torus[0] else [(x, y), (x, y + 1)]
                    if device * topology.ports + 2 * number in topology.dead:
                        dead.append(ends)
                    elif not np.isnan(value):
                        lines.append(ends)
                        values.append(float(value))
                if len(torus) > 2:
                    dots[x, y] = share[device, torus[2]]
        axes.add_collection(
            LineCollection(lines, array=np.array(values), cmap="viridis_r", norm=scale, linewidth=3)
        )
        axes.add_collection(LineCollection(dead, colors="red", linestyles="dotted", linewidth=3))
        where = np.indices(dots.shape)
        axes.scatter(
            where[0], where[1], c=dots, cmap="viridis_r", norm=scale, s=26, zorder=3,
            edgecolors="black", linewidths=0.4,
        )  # fmt: skip
        axes.set_xlim(-0.6, lengths[0] + 0.2)
        axes.set_ylim(-0.6, lengths[1] + 0.2)
        axes.set_aspect("equal")
        axes.axis("off")
        if planes > 1:
            axes.set_title(f"{topology.axes[torus[2]].name} = {plane}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm=scale, cmap="viridis_r"), ax=figure.axes, shrink=0.7)
    bar.set_label("busier direction's share of the step at full rate", fontsize=8)
    dots_are = f"; dots: {topology.axes[torus[2]].name} wires" if len(torus) > 2 else ""
    figure.suptitle(
        f"{simulation.plan.name} on {simulation.plan.machine.name}: lines across "
        f"{topology.axes[torus[0]].name}, up {topology.axes[torus[1]].name}{dots_are}",
        fontsize=9,
    )
    save_figure(figure, path)


def _wires(simulation: Simulation, topology: Topology) -> Floats:
    """Return the busier direction of the wire up from every device, [devices, axes]; NaN: none."""
    shares, _ = by_link(simulation)
    table = np.full((topology.devices, len(topology.axes)), np.nan)
    for number in range(len(topology.axes)):
        there = topology.neighbour[:, 2 * number]
        wired = np.nonzero(there >= 0)[0]
        up = shares[wired * topology.ports + 2 * number]
        down = shares[there[wired] * topology.ports + 2 * number + 1]
        table[wired, number] = np.maximum(up, down)
    return table
