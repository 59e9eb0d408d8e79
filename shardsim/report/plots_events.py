"""Pictures of what only the event simulation shows: how busy every wire is, and what-ifs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from shardsim.cost.predict import Prediction
from shardsim.errors import ShardsimError
from shardsim.report.style import INK, MUTED, PAPER, SERIES, picture, plain, styled
from shardsim.simulate.outcome import engine_of
from shardsim.simulate.topology import Floats
from shardsim.simulate.utilisation import by_wire

MOST_PLANES = 6
BUSY = "viridis_r"  # darker is busier, in greyscale too
COLUMNS = 2


@styled
def link_loads(simulation: Prediction, top: float | None = None) -> Figure:
    """Return the torus, every wire coloured by how busy its busier direction is.

    A 3-D torus is drawn plane by plane along its last axis; planes that look the same are drawn
    once. Lines are wires of the first two axes (those around the torus leave the edge), dots are
    wires of the last. Dead wires are dotted. Of several slices the busiest is drawn. `top` is the
    share at the end of the scale, so that two pictures can be compared.
    """
    planes = _Planes(simulation)
    shown = planes.distinct()[:MOST_PLANES]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    across, up = planes.shares.shape[:2]
    scale = Normalize(0.0, top or max(float(np.nanmax(planes.shares, initial=0.0)), 1e-9))
    height = min(max(1.0, 4.1 / columns * (up + 1) / (across + 1)), 3.2)
    figure = picture(rows * (height + 0.7) + 0.85)
    for place, same in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        planes.draw(axes, same[0], scale)
        if len(planes.names) > 2:
            axes.set_title(f"{planes.names[2]} = {_ranges(same)}", fontweight="normal")
        axes.set_xlabel(planes.names[0])
        axes.set_ylabel(planes.names[1] if len(planes.names) > 1 else "")
    bar = figure.colorbar(
        ScalarMappable(norm=scale, cmap=BUSY), ax=figure.axes, location="bottom", aspect=40
    )
    dots = f" (dots: {planes.names[2]})" if len(planes.names) > 2 else ""
    bar.set_label(f"share of the step in which a wire is busy{dots}")
    return figure


class _Planes:
    """One slice of a torus as planes of its last axis."""

    def __init__(self, simulation: Prediction) -> None:
        engine = engine_of(simulation)
        topology = engine.topology
        torus = [
            number
            for number, axis in enumerate(topology.axes)
            if not axis.switched and axis.name != "core"
        ]
        if not torus:
            raise ShardsimError(f"{simulation.plan.machine.name} is no torus: no wires to draw")
        self.names = [topology.axes[number].name for number in torus]
        grid = np.arange(topology.devices).reshape(topology.shape)
        shares = by_wire(simulation)[:, torus]
        if len(topology.axes) > len(torus):
            grid = grid[..., 0]  # both devices of a chip look alike
        worst = np.nanmax(shares[grid], axis=tuple(range(1, grid.ndim + 1)))
        grid = grid[int(np.argmax(worst))]
        grid = grid.reshape(grid.shape + (1,) * (3 - grid.ndim))
        ports = np.array([2 * number for number in torus])
        numbers = grid[..., None] * topology.ports + ports
        self.dead: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = topology.is_dead(
            numbers.reshape(-1)
        ).reshape(numbers.shape)
        self.shares: Floats = shares[grid]  # [x, y, plane, axis]; NaN where there is no wire

    def distinct(self) -> list[list[int]]:
        """Return the planes by what they look like, the busiest first."""
        found: dict[bytes, list[int]] = {}
        peak = max(float(np.nanmax(self.shares)), 1e-9)
        for plane in range(self.shares.shape[2]):
            look = np.round(np.nan_to_num(self.shares[:, :, plane] / peak, nan=-1.0), 2)
            found.setdefault(look.tobytes() + self.dead[:, :, plane].tobytes(), []).append(plane)
        return sorted(
            found.values(), key=lambda same: (-float(np.nanmax(self.shares[:, :, same[0]])), same)
        )

    def draw(self, axes: Axes, plane: int, scale: Normalize) -> None:
        """Draw one plane."""
        lines, values, dead = [], [], []
        across, up = self.shares.shape[:2]
        for x, y in np.ndindex(across, up):
            for number, end in enumerate([(x + 0.9, y), (x, y + 0.9)][: len(self.names)]):
                if self.dead[x, y, plane, number]:
                    dead.append([(x, y), end])
                elif not np.isnan(self.shares[x, y, plane, number]):
                    lines.append([(x, y), end])
                    values.append(self.shares[x, y, plane, number])
        axes.add_collection(
            LineCollection(lines, array=np.array(values), cmap=BUSY, norm=scale, linewidth=2.6)
        )
        axes.add_collection(LineCollection(dead, colors=SERIES[1], linestyles=":", linewidth=2.6))
        where = np.indices((across, up))
        if len(self.names) > 2:
            dots = self.shares[:, :, plane, 2]
            gone = self.dead[:, :, plane, 2]
            axes.scatter(
                where[0][~gone], where[1][~gone], c=dots[~gone], cmap=BUSY, norm=scale, s=20,
                zorder=3, edgecolors=INK, linewidths=0.5,
            )  # fmt: skip
            axes.scatter(
                where[0][gone], where[1][gone], s=30, marker="x", color=SERIES[1], zorder=3
            )
        else:
            axes.scatter(where[0], where[1], s=12, color=PAPER, zorder=3, edgecolors=INK)
        axes.set_xlim(-0.5, across + 0.1)
        axes.set_ylim(-0.5, up + 0.1)
        axes.set_aspect("equal")
        axes.set_xticks([0, across - 1])
        axes.set_yticks([0, up - 1])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges.

    >>> _ranges([0, 2, 3, 4, 7, 8])
    '0, 2 to 4, 7, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


@styled
def what_if_bars(cases: Mapping[str, Prediction]) -> Figure:
    """Return the MFU of several simulations of one model; the first is what the others lose to."""
    if not cases:
        raise ShardsimError("no simulation to compare")
    names = list(cases)
    values = [100 * item.mfu for item in cases.values()]
    figure = picture(0.55 + 0.3 * len(names))
    axes = figure.add_subplot()
    places = range(len(names))
    axes.barh(places, values, color=[SERIES[0], *[SERIES[5]] * (len(names) - 1)], height=0.7)
    axes.axvline(values[0], color=MUTED, linewidth=0.8, linestyle="--")
    for place, value in zip(places, values, strict=True):
        change = "" if place == 0 else f"  ({value - values[0]:+.1f})"
        text = axes.annotate(
            f"{value:.1f}{change}", (value, place), (3, 0), textcoords="offset points", va="center"
        )
        text.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})
    axes.set_yticks(places, [plain(name, 44) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(values))
    axes.set_xlabel("MFU (%); in brackets points against the first")
    return figure
