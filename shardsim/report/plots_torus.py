"""The placement of a mesh on the machine, as one line of chips for each of its axes."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardsim.cost.predict import Prediction
from shardsim.machine import Machine
from shardsim.plan import Plan
from shardsim.report.links import axis_use
from shardsim.report.style import INK, MARKERS, MUTED, PAPER, SERIES, bare, picture, plain, styled

MOST_DOTS = 32  # of a longer axis only the first chips are drawn


@dataclass(frozen=True, kw_only=True)
class Track:
    """One mesh axis on one torus axis: the members of one of its groups."""

    mesh_axis: str
    factor: int  # members along the torus axis
    stride: int  # from one member to the next
    closed: bool  # whether they form a ring over single hops


def tracks(plan: Plan, torus: str, length: int, wrapped: bool) -> tuple[Track, ...]:
    """Return the mesh axes on one torus axis, the outermost first.

    A group of a later mesh axis has neighbours; of an earlier one, every n-th chip.
    """
    found = []
    stride = 1
    for axis in reversed(plan.mesh):
        factor = axis.torus.get(torus, 1)
        if factor > 1:
            closed = wrapped and factor * stride == length and factor > 2
            found.append(Track(mesh_axis=axis.name, factor=factor, stride=stride, closed=closed))
            stride *= factor
    return tuple(reversed(found))


@styled
def mesh_on_torus(item: Prediction | Plan) -> Figure:
    """Return which mesh axis lies on which torus axis: one group of each, as linked chips.

    Of a prediction also for which part of the step the links of each torus axis carry traffic.
    """
    plan = item.plan if isinstance(item, Prediction) else item
    busy = axis_use(item) if isinstance(item, Prediction) else {}
    rows = [(axis.name, axis.length, axis.wrapped) for axis in plan.machine.axes]
    if plan.machine.slices > 1:
        rows.insert(0, ("dcn", plan.machine.slices, False))
    lines = [(row, tracks(plan, *row)) for row in rows]
    height = sum(0.5 + 0.3 * max(len(found), 1) for _, found in lines)
    figure = picture(height + 0.35)
    axes = figure.add_subplot()
    colours = {axis.name: index for index, axis in enumerate(plan.mesh)}
    y = 0.0
    longest = max(min(length, MOST_DOTS) for _, length, _ in rows)
    for (name, length, wrapped), found in lines:
        y -= 0.3
        title = _title(plan.machine, name, length, wrapped)
        axes.text(0, y, title, va="center", fontweight="bold")
        if name in busy:
            axes.text(
                1.0,
                y,
                f"links busy {100 * busy[name]:.0f} % of the step",
                va="center",
                ha="right",
                fontsize=7.5,
            )
        y -= 0.3
        for track in found or (None,):
            _line(axes, y, track, length, longest, colours)
            y -= 0.3
        y -= 0.02
    axes.set_xlim(-0.005, 1.005)
    axes.set_ylim(y + 0.1, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    switched = plan.machine.chip.interconnect == "switch"
    along = "a node, nodes above" if switched else "each torus axis"
    axes.set_xlabel(f"chips in order along {along}; filled: one group of a mesh axis")
    bare(axes)
    return figure


def _title(machine: Machine, name: str, length: int, wrapped: bool) -> str:
    if name == "dcn":
        nodes = machine.chip.interconnect == "switch"
        return f"between nodes: {length}" if nodes else f"data-centre network: {length} slices"
    if name == "core":
        return f"inside a chip: {length} devices"
    if name == "node":
        return f"node: {length} behind a switch"
    form = "ring" if wrapped and length > 2 else "line, ends not joined"
    return f"torus axis {name}: {length} chip{'s' if length > 1 else ''}" + (
        f", {form}" if length > 1 else ""
    )


def _line(
    axes: Axes, y: float, track: Track | None, length: int, longest: int, colours: dict[str, int]
) -> None:
    """Draw the chips of a torus axis, those of one group filled and linked."""
    left, right = 0.36, 0.985
    shown = min(length, MOST_DOTS)
    gap = (right - left) / max(longest, 8)
    xs = [left + gap * (index + 0.5) for index in range(shown)]
    size = min(30.0, 900.0 / max(longest, 8))
    axes.scatter(xs, [y] * shown, s=size, facecolor="none", edgecolor=MUTED, linewidth=0.8)
    if shown < length:
        axes.text(right + 0.004, y, "…", va="center")
    if track is None:
        axes.text(0.012, y, "no mesh axis", va="center", fontsize=8, color=MUTED)
        return
    index = colours[track.mesh_axis] % len(SERIES)
    colour = SERIES[index]
    members = [xs[i * track.stride] for i in range(track.factor) if i * track.stride < shown]
    axes.plot([members[0], members[-1]], [y, y], color=colour, linewidth=2.0, zorder=2)
    if track.closed and shown == length:
        ends = [members[0], members[0], members[-1], members[-1]]
        axes.plot(ends, [y, y + 0.17, y + 0.17, y], color=colour, linewidth=1.1, zorder=1)
    axes.scatter(
        members,
        [y] * len(members),
        s=size * 1.25,
        marker=MARKERS[index],
        facecolor=colour,
        edgecolor=PAPER,
        linewidth=0.6,
        zorder=3,
    )
    how = "neighbours" if track.stride == 1 else f"every {track.stride}th"
    how = "every 2nd" if track.stride == 2 else how
    how = "all" if track.factor == length else how
    axes.text(
        0.012,
        y,
        f"{plain(track.mesh_axis, 14)}: {track.factor} ({how})",
        va="center",
        fontsize=8,
        color=INK,
    )
