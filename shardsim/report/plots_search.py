"""Pictures of many plans: the Pareto front of a search, and sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardsim.answers.training import Training
from shardsim.cost.predict import Prediction
from shardsim.files import flow_text
from shardsim.plan.words import mesh_text
from shardsim.planner.found import SearchResult
from shardsim.report.style import INK, MARKERS, MUTED, PAPER, SERIES, picture, plain, styled
from shardsim.report.words import count_words
from shardsim.units import GIB

# What a swept key is on an axis: its name, its unit, and what a value is divided by.
KEYS: Mapping[str, tuple[str, str, float]] = {
    "batch": ("batch", "sequences per step", 1.0),
    "sequence": ("sequence", "tokens", 1.0),
    "microbatches": ("microbatches", "per step", 1.0),
    "machine": ("slice", "chip and shape", 1.0),
    "remat": ("remat policy", "name", 1.0),
    "chip.link_bytes_per_s": ("ICI link, one way", "GB/s", 1e9),
    "chip.hbm_bytes_per_s": ("HBM bandwidth of a chip", "GB/s", 1e9),
    "chip.dcn_bytes_per_s": ("DCN of a chip, one way", "GB/s", 1e9),
    "chip.hbm_usable_bytes": ("usable HBM of a chip", "GiB", GIB),
    "chip.hbm_bytes": ("HBM of a chip", "GiB", GIB),
}

KEY_WIDTH = 62  # characters of the key below a picture
MOST_LABELS = 6  # points that each say how many chips they are


@styled
def pareto_front(result: SearchResult | Sequence[Prediction], most_named: int = 6) -> Figure:
    """Return MFU against HBM headroom of a search's plans; the front is linked and named.

    A plan is on the front if no other has both more MFU and more headroom. The area of a mark
    grows with the number of chips, where that differs. Ask the search for many plans (`top=100`).
    """
    items = list(result.predictions if isinstance(result, SearchResult) else result)
    front = front_of(items)
    named = _apart(front, items)[:most_named]
    figure = picture(3.2 + 0.16 * len(named))
    axes = figure.add_subplot()
    chips = sorted({item.plan.machine.chips for item in items})
    for index, count in enumerate(chips):
        mine = [item for item in items if item.plan.machine.chips == count]
        axes.scatter(
            [headroom_gib(item) for item in mine],
            [100 * item.mfu for item in mine],
            s=24 + 14 * index,
            marker=MARKERS[index % len(MARKERS)],
            facecolor="none",
            edgecolor=SERIES[index % len(SERIES)] if len(chips) > 1 else MUTED,
            linewidth=1.1,
            label=f"{count:,} chips",
        )
    steps = sorted(front, key=headroom_gib)
    axes.plot(
        [headroom_gib(item) for item in steps],
        [100 * item.mfu for item in steps],
        color=SERIES[1],
        linewidth=1.4,
        drawstyle="steps-pre",
        zorder=1,
    )
    _numbers(axes, named)
    axes.margins(0.08, 0.12)
    axes.set_ylabel("predicted MFU (%)")
    lines = [
        f"{number}  {100 * item.mfu:.1f} %  {_where(item, len(chips) > 1)}"
        for number, item in enumerate(named, 1)
    ]
    axes.set_xlabel(
        "HBM left free on a device at the peak (GiB)\n" + "\n".join(lines),
        loc="left",
        multialignment="left",
        linespacing=1.4,
        fontsize=7.5,
    )
    axes.grid(True)
    if len(chips) > 1:
        figure.legend(loc="outside upper left", ncols=4)
    return figure


@styled
def cost_front(
    items: SearchResult | Sequence[Prediction], chip_hour_price: float, tokens: float = 1e12
) -> Figure:
    """Return days against the cost of training on `tokens`; the front is linked, chips named.

    A plan is on the front if no other is both sooner done and cheaper. Search several slices at
    once, or put searches together. `chip_hour_price` may be in any currency.
    """
    found = list(items.predictions if isinstance(items, SearchResult) else items)
    if not found:
        raise ValueError("no plans")
    training = Training(tokens=tokens, prices={"": chip_hour_price})
    days = [training.days(item) for item in found]
    costs = [training.chip_hours(item) * chip_hour_price for item in found]
    points = sorted(zip(days, costs, found, strict=True), key=lambda point: point[:2])
    front: list[tuple[float, float, Prediction]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    figure = picture(3.0)
    axes = figure.add_subplot()
    axes.scatter(days, costs, facecolor="none", edgecolor=MUTED, linewidth=1.1, s=26)
    axes.plot(
        [point[0] for point in front],
        [point[1] for point in front],
        color=SERIES[1],
        marker="o",
        markersize=5,
        linewidth=1.4,
        drawstyle="steps-post",
    )
    named = set()
    for day, cost, item in points if len(points) <= MOST_LABELS else front:
        chips = item.plan.machine.chips
        if chips not in named or len(points) <= MOST_LABELS:
            named.add(chips)
            axes.annotate(f"{chips:,} chips", (day, cost), (4, 5), textcoords="offset points")
    axes.margins(0.2, 0.2)
    axes.grid(True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"days for {count_words(tokens)} tokens")
    axes.set_ylabel(f"cost (at {chip_hour_price:g} a chip-hour)")
    return figure


def _where(item: Prediction, several: bool) -> str:
    where = f"{item.plan.machine.name}: " if several else ""
    mesh = f"{where}{mesh_text(item.plan)}"
    whole = f"{mesh}, remat {item.plan.remat.name}"
    return plain(whole if len(whole) <= KEY_WIDTH else mesh, KEY_WIDTH)


def _apart(front: Sequence[Prediction], items: Sequence[Prediction]) -> list[Prediction]:
    """Return plans of the front, without those whose number would cover an earlier one's, in a
    picture that shows all `items`."""
    if not items:
        return []
    width = max(map(headroom_gib, items)) - min(map(headroom_gib, items)) or 1.0
    height = max(item.mfu for item in items) - min(item.mfu for item in items) or 1.0
    kept: list[Prediction] = []
    for item in front:
        if all(
            abs(headroom_gib(item) - headroom_gib(other)) > 0.05 * width
            or abs(item.mfu - other.mfu) > 0.09 * height
            for other in kept
        ):
            kept.append(item)
    return kept


def _numbers(axes: Axes, items: Sequence[Prediction]) -> None:
    """Write a number on each point."""
    for number, item in enumerate(items, 1):
        axes.annotate(
            str(number),
            (headroom_gib(item), 100 * item.mfu),
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            color=PAPER,
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": SERIES[0], "edgecolor": PAPER},
            zorder=4,
        )


def headroom_gib(item: Prediction) -> float:
    """Return the HBM of one device that is free at the peak, in GiB."""
    return (item.hbm["capacity_bytes"] - item.hbm["peak_bytes"]) / GIB


def front_of(items: Iterable[Prediction]) -> list[Prediction]:
    """Return the plans that none beats in MFU and HBM headroom both, highest MFU first."""
    front: list[Prediction] = []
    most = -np.inf
    for item in sorted(items, key=lambda item: (-item.mfu, -headroom_gib(item))):
        if headroom_gib(item) > most:
            front.append(item)
            most = headroom_gib(item)
    return front


@styled
def sweep_curves(
    rows: Iterable[tuple[Mapping[str, Any], Prediction | None, str]], metric: str = "mfu"
) -> Figure:
    """Return curves of a sweep: the first key along the axis, one line per value of the others.

    `rows` is what `shardsim.sweep` yields. `metric`: "mfu" (%), "step_time_s" (s) or
    "tokens_per_s_per_chip". Hollow marks do not fit in HBM; combinations that make no legal plan
    are left out.
    """
    found = [(dict(changes), item) for changes, item, _ in rows]
    if not found:
        raise ValueError("an empty sweep")
    keys = list(found[0][0])
    labels = {
        "mfu": "predicted MFU (%)",
        "step_time_s": "step time (s)",
        "tokens_per_s_per_chip": "throughput (tokens/s/chip)",
    }
    scale = 100.0 if metric == "mfu" else 1.0
    name, unit, divisor = KEYS.get(keys[0], (keys[0], "value", 1.0))
    values = list(dict.fromkeys(_hashable(changes[keys[0]]) for changes, _ in found))
    numeric = all(isinstance(value, (int, float)) for value in values)
    figure = picture(3.1)
    axes = figure.add_subplot()
    lines: dict[tuple[Any, ...], list[tuple[float, Prediction]]] = {}
    for changes, item in found:
        if item is not None:
            other = tuple(_hashable(changes[key]) for key in keys[1:])
            value = _hashable(changes[keys[0]])
            x = value / divisor if numeric else float(values.index(value))
            lines.setdefault(other, []).append((x, item))
    for index, (other, points) in enumerate(lines.items()):
        label = ", ".join(
            f"{key}={flow_text(part)}" for key, part in zip(keys[1:], other, strict=True)
        )
        measured = [(x, scale * getattr(item, metric), item.fits) for x, item in points]
        _curve(axes, index, measured, label)
    _ticks(axes, values, divisor if numeric else None)
    axes.margins(0.05, 0.14)
    hollow = any(item is not None and not item.fits for _, item in found)
    more = "; hollow: does not fit in HBM" if hollow else ""
    axes.set_xlabel(f"{name} ({unit}){more}", color=INK)
    axes.set_ylabel(labels[metric])
    axes.grid(True)
    if len(keys) > 1:
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def _curve(axes: Axes, index: int, points: Sequence[tuple[float, float, bool]], label: str) -> None:
    """Draw a numbered line through points (x, y, whether it fits), hollow where one does not."""
    colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    axes.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        color=colour,
        linewidth=1.4,
        linestyle=("-", "--", ":", "-.")[index % 4],
        marker=marker,
        markersize=6,
        markerfacecolor=colour,
        markeredgecolor=colour,
        label=label,
    )
    axes.plot(
        [x for x, _, fits in points if not fits],
        [y for _, y, fits in points if not fits],
        linestyle="none",
        marker=marker,
        markersize=6,
        markerfacecolor=PAPER,
        markeredgecolor=colour,
    )


def _ticks(axes: Axes, values: Sequence[Any], divisor: float | None) -> None:
    """Mark values along the x axis: numbers in units of `divisor`, with none names in a row."""
    if divisor is None:
        ticks = [plain(str(value), 16) for value in values]
        axes.set_xticks(range(len(values)), ticks)
    else:
        if min(values) > 0 and max(values) / min(values) >= 8:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        ticks = [_tick(value / divisor) for value in values]
        axes.set_xticks([value / divisor for value in values], ticks)
    if sum(map(len, ticks)) > 50:
        axes.tick_params(axis="x", rotation=30)


def _tick(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else flow_text(value)
