"""Pictures of one plan's step: where its time goes, and where its HBM goes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shardsim.cost.predict import Prediction
from shardsim.cost.words import HBM, PARTS
from shardsim.report.moments import hbm_moments
from shardsim.report.style import INK, PAPER, boxed, folded, look, picture, styled, swatch
from shardsim.units import GIB, show_percent
from shardsim.views.step import step_columns

# The look of each part, the same in every picture; operations look as their largest part.
SERIES_OF = {part: index for index, part in enumerate(PARTS)}


@styled
def step_breakdown(
    items: Sequence[Prediction] | Prediction, names: Sequence[str] | None = None
) -> Figure:
    """Return stacked bars of the step time in seconds, one bar per prediction.

    Beside a compiled step, whose cycles hold the wait for HBM, operations are one part in all.

    >>> from shardsim.plan import load_plan
    >>> from shardsim.cost.predict import predict
    >>> step_breakdown(predict(load_plan("vit-22b-published-tp8"))).axes[0].get_xlabel()
    'step time (s)'
    """
    items = [items] if isinstance(items, Prediction) else list(items)
    names = names or [item.plan.name for item in items]
    figure = picture(1.75 + 0.42 * len(items))
    axes = figure.add_subplot()
    parts = step_columns(items)
    longest = max(item.step_time_s for item in items)
    for row, item in enumerate(items):
        left = 0.0
        for part in parts:
            index, value = SERIES_OF.get(part.key, 0), part.get(item)
            axes.barh(row, value, left=left, height=0.62, **look(index))
            if value > 0.09 * longest:
                boxed(axes, left + value / 2, row, show_percent(value / item.step_time_s))
            left += value
    axes.set_yticks(range(len(items)), [folded(name) for name in names])
    axes.set_ylim(len(items) - 0.5, -0.5)
    axes.set_xlim(0, 1.03 * longest)
    axes.set_xlabel("step time (s)")
    axes.xaxis.grid(True)
    handles = [
        swatch(SERIES_OF.get(part.key, 0), part.heading)
        for part in parts
        if any(part.get(item) > 0 for item in items)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=1.8)
    return figure


@styled
def hbm_over_step(item: Prediction) -> Figure:
    """Return HBM of one device by use, in GiB, at the moments of a step, below its capacity."""
    moments = hbm_moments(item)
    figure = picture(3.5)
    axes = figure.add_subplot()
    bottoms = [0.0] * len(moments)
    for index, use in enumerate(HBM):
        heights = [moment.uses[use] / GIB for moment in moments]
        axes.bar(range(len(moments)), heights, bottom=bottoms, width=0.66, **look(index))
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    capacity = item.hbm["capacity_bytes"] / GIB
    axes.axhline(capacity, color=INK, linewidth=1.1, linestyle=(0, (5, 2)))
    top = 1.18 * max(capacity, *bottoms)
    axes.set_ylim(0, top)
    axes.text(
        -0.45,
        capacity + 0.02 * top,
        f"usable: {capacity:.2f} GiB",
        va="bottom",
        fontsize=7.5,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
    )
    for column, total in enumerate(bottoms):
        above = capacity + 0.055 * top if abs(total - capacity) < 0.08 * top else 0.0
        axes.text(
            column,
            max(total, above) + 0.015 * top,
            f"{total:.1f}",
            ha="center",
            va="bottom",
            fontsize=8,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
        )
    axes.set_xticks(range(len(moments)), [moment.short for moment in moments])
    axes.set_xlim(-0.5, len(moments) - 0.5)
    axes.set_xlabel("moment of the step")
    axes.set_ylabel("HBM of one device (GiB)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.grid(True)
    handles = [swatch(index, label) for index, label in enumerate(HBM.values())]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=1.8)
    return figure
