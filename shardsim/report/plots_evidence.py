"""Pictures of evidence: sensitivities, ablations, predictions beside published and compiled."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from shardsim.cost.predict import Prediction
from shardsim.cost.sensitivity import Sensitivity
from shardsim.cost.words import figure_words
from shardsim.planner.whatif import Ablation
from shardsim.report.style import (
    HATCHES,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    diagonal,
    marks,
    picture,
    plain,
    styled,
)
from shardsim.validate.runs import Validation
from shardsim.xla.tpu.agreement import Pair

# What leaving a technique out adds to the step time as published, low to high, as fractions: "15 %
# faster" and "+3 % utilisation" are read as that much more. Their sources stand in the table beside
# (`planner.whatif`).
PUBLISHED_EFFECTS = {
    "parallel layers": (0.15, 0.15),
    "bias removal": (0.03, 0.03),
    "asynchronous overlap": (0.14, 0.38),
}


@styled
def sensitivity_bars(base: Prediction, items: Sequence[Sensitivity]) -> Figure:
    """Return how much shorter the step is with 10 % more of each figure of the chip, in %."""
    chip = base.plan.machine.chip
    shown = [(figure_words(item.figure, chip), 100 * _saving(base, item)) for item in items]
    some = [pair for pair in shown if abs(pair[1]) >= 0.005] or shown[:1]
    figure = picture(1.0 + 0.32 * len(some))
    axes = figure.add_subplot()
    values = [value for _, value in some]
    axes.barh(range(len(some)), values, height=0.6, color=SERIES[0], edgecolor=PAPER)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    low, high = min(0.0, *values), max(0.0, *values)
    span = max(high - low, 0.1)
    for row, value in enumerate(values):
        axes.text(
            value + (0.015 * span if value >= 0 else -0.015 * span),
            row,
            f"{value:+.2f}",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8,
        )
    axes.set_yticks(range(len(some)), [name for name, _ in some])
    axes.set_ylim(len(some) - 0.5, -0.5)
    axes.set_xlim(low - (0.16 * span if low < 0 else 0.0), high + 0.16 * span)
    axes.set_xlabel("step time saved by 10 % more of it (%)")
    axes.xaxis.grid(True)
    return figure


def _saving(base: Prediction, item: Sensitivity) -> float:
    return 1.0 - item.step_time_s_at_110 / base.step_time_s


@styled
def ablation_bars(base: Prediction, items: Sequence[Ablation]) -> Figure:
    """Return what leaving each technique out adds to the step, in %, beside what was published.

    Techniques that the plan does not use are left out.
    """
    shown = [item for item in items if item.prediction is not None]
    figure = picture(1.75 + 0.42 * max(len(shown), 1))
    axes = figure.add_subplot()
    ends = [0.0]
    labels = []
    for row, item in enumerate(shown):
        assert item.prediction is not None
        value = 100 * (item.prediction.step_time_s / base.step_time_s - 1)
        fits = item.prediction.fits
        axes.barh(
            row,
            value,
            height=0.55,
            color=SERIES[0] if fits else PAPER,
            edgecolor=PAPER if fits else SERIES[0],
            hatch="" if fits else HATCHES[1],
        )
        ends.append(value)
        labels.append(f"without {item.technique}\n{value:+.1f} %")
        effect = PUBLISHED_EFFECTS.get(item.technique)
        if effect is not None:
            low, high = (100 * share for share in effect)
            axes.plot([low, high], [row, row], color=INK, linewidth=2.2, zorder=3)
            axes.plot([low, high], [row, row], "D", color=SERIES[3], markeredgecolor=INK, zorder=4)
            ends.append(high)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    span = max(ends) - min(ends) or 1.0
    axes.set_xlim(min(ends) - 0.04 * span, max(ends) + 0.04 * span)
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    axes.set_xlabel("change of the step time (%)")
    axes.xaxis.grid(True)
    elsewhere = "published (other models)"
    handles: list[Patch | Line2D] = [
        Patch(facecolor=SERIES[0], edgecolor=PAPER, label="predicted"),
        Patch(facecolor=PAPER, edgecolor=SERIES[0], hatch=HATCHES[1], label="does not fit in HBM"),
        Line2D([], [], marker="D", color=INK, markerfacecolor=SERIES[3], label=elsewhere),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=1.6)
    return figure


@styled
def predicted_against_published(result: Validation) -> Figure:
    """Return the error of every published run's prediction, in %, one line a run, by family.

    Hollow marks are runs that a constant was fitted to; a thin line is the range of plans that
    the source leaves open.
    """
    rows = sorted((row for row in result.rows if row.error is not None), key=lambda row: row.family)
    families = list(dict.fromkeys(row.family for row in rows))
    figure = picture(1.4 + 0.2 * len(rows))
    axes = figure.add_subplot()
    shade = axes.axvspan(-5, 5, color=SERIES[5], alpha=0.3, linewidth=0, label="within 5 %")
    axes.axvline(0, color=MUTED, linewidth=0.9)
    for line, row in enumerate(rows):
        index = families.index(row.family)
        assert row.error is not None
        assert row.measured is not None
        if row.low is not None and row.high is not None and row.high > row.low:
            span = [100 * (value / row.measured - 1) for value in (row.low, row.high)]
            axes.plot(span, [line, line], color=SERIES[index % len(SERIES)], linewidth=1.2)
        axes.plot(
            100 * row.error,
            line,
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            markerfacecolor=PAPER if row.fitted else SERIES[index % len(SERIES)],
            markeredgecolor=SERIES[index % len(SERIES)],
        )
    axes.set_yticks(range(len(rows)), [plain(row.id, 42) for row in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("error of predicted tokens/s/chip (%)")
    axes.xaxis.grid(True)
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            color=SERIES[index % len(SERIES)],
            label=family,
        )
        for index, family in enumerate(families)
    ]
    hollow = Line2D(
        [], [], linestyle="none", marker="o", color=INK, markerfacecolor=PAPER, label="fitted to"
    )
    figure.legend(
        handles=[*handles, hollow, shade], loc="outside lower left", ncols=4, columnspacing=1.2
    )
    return figure


@styled
def published_scatter(result: Validation) -> Figure:
    """Return predicted against published tokens/s/chip on logarithmic axes, by chip family."""
    rows = [row for row in result.rows if row.error is not None]
    families = sorted({row.family for row in rows})
    figure = picture(4.2, 4.6)
    axes = figure.add_subplot()
    values = [value for row in rows for value in (row.measured, row.predicted) if value]
    low, high = min(values) / 1.4, max(values) * 1.4
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.fill_between(
        [low, high],
        [0.9 * low, 0.9 * high],
        [1.1 * low, 1.1 * high],
        color=SERIES[5],
        alpha=0.35,
        linewidth=0,
        label="within 10 %",
    )
    for index, family in enumerate(families):
        mine = [row for row in rows if row.family == family]
        measured = [row.measured or 0.0 for row in mine]
        marks(axes, measured, [row.predicted or 0.0 for row in mine], index, family)
    ticks = [10**power for power in range(0, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    diagonal(axes, low, high)
    axes.set_xlabel("published throughput (tokens/s/chip)")
    axes.set_ylabel("predicted throughput (tokens/s/chip)")
    figure.legend(loc="outside lower left", ncols=4)
    return figure


@styled
def predicted_against_compiled(found: Sequence[Pair]) -> Figure:
    """Return predicted against compiled MFU of the kept compilations, by model and slice."""
    read = [pair for pair in found if "mfu" in pair.row]
    groups = list(dict.fromkeys(pair.row["group"] for pair in read))
    figure = picture(4.2 + 0.2 * len(groups), 4.6)
    axes = figure.add_subplot()
    values = [value for pair in read for value in (pair.predicted.mfu, pair.row["mfu"])]
    top = 100 * max(values, default=0.9) * 1.08
    diagonal(axes, 0, top)
    for index, group in enumerate(groups):
        mine = [pair for pair in read if pair.row["group"] == group]
        compiled = [100 * pair.row["mfu"] for pair in mine]
        marks(axes, compiled, [100 * pair.predicted.mfu for pair in mine], index, plain(group, 40))
    axes.set_xlabel("MFU as compiled (%)")
    axes.set_ylabel("predicted MFU (%)")
    if groups:
        figure.legend(loc="outside lower left", ncols=1)
    return figure
