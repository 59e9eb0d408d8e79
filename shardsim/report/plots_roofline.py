"""The roofline picture: every matmul of a plan, achieved rate against arithmetic intensity."""

from __future__ import annotations

from collections.abc import Callable
from math import log10

from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from shardsim.cost.predict import Prediction
from shardsim.report.roofline import GROUPS, device_peaks, matmul_points
from shardsim.report.style import GRID, INK, MUTED, marks, picture, styled

DRAWN = 1e-3  # of the step


@styled
def roofline(item: Prediction) -> Figure:
    """Return the roofline of one device with every matmul of the step on it.

    The area of a mark is the share of the step that the matmul takes. The solid roof is the
    chip's as sold, the dashed one what is sustained of it. Matmuls of less than a thousandth of
    the step are left out and counted.
    """
    every = matmul_points(item)
    points = [point for point in every if point.step_s >= DRAWN * item.step_time_s]
    chip = item.plan.machine.chip
    peak, bandwidth = device_peaks(chip, item.plan.precision.compute)
    figure = picture(3.9)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    low = min([point.flops_per_byte for point in points] + [peak / bandwidth / 4]) / 1.8
    high = max([point.flops_per_byte for point in points] + [peak / bandwidth * 4]) * 1.8
    bottom = min([point.flops_per_s for point in points] + [low * bandwidth]) / 1.6
    for share, unit, memory, style in (
        ("peak", 1.0, 1.0, "-"),
        ("sustained", chip.matmul_efficiency, chip.hbm_efficiency, "--"),
    ):
        top, slope = peak * unit, bandwidth * memory
        knee = top / slope
        axes.plot(
            [low, knee, high],
            [low * slope, top, top],
            style,
            color=INK if share == "peak" else MUTED,
            linewidth=1.3 if share == "peak" else 1.0,
            label=f"{share}: {top / 1e12:,.0f} TFLOP/s, {slope / 1e9:,.0f} GB/s",
        )
    for index, group in enumerate(GROUPS):
        mine = [point for point in points if point.group == group]
        if mine:
            sizes = [18 + 500 * point.step_s / item.step_time_s for point in mine]
            rates = [point.flops_per_s for point in mine]
            marks(axes, [point.flops_per_byte for point in mine], rates, index, group, sizes)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, peak * 1.6)
    _decades(axes.set_xticks, low, high, 1.0)
    _decades(axes.set_yticks, bottom, peak * 1.6, 1e12)
    axes.minorticks_off()
    axes.set_xlabel("arithmetic intensity (FLOP per byte of HBM)")
    axes.set_ylabel("rate of one device (TFLOP/s)")
    axes.grid(True, color=GRID)
    if rest := len(every) - len(points):
        few = f"{rest} shorter one{'s' if rest > 1 else ''} not drawn"
        axes.text(0.985, 0.04, few, ha="right", fontsize=7.5, transform=axes.transAxes)
    legend = figure.legend(loc="outside lower left", ncols=2, handlelength=1.8)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([36])
    return figure


def _decades(set_ticks: Callable[..., object], low: float, high: float, unit: float) -> None:
    """Set ticks at 1, 3, 10, ... (or 1, 10, ... over many decades), labelled in `unit`."""
    many = log10(high / low) > 3.2
    ticks = [
        step * 10.0**power
        for power in range(-6, 22)
        for step in ((1,) if many else (1, 3))
        if low <= step * 10.0**power <= high
    ]
    set_ticks(ticks, [f"{tick / unit:,g}" for tick in ticks])
