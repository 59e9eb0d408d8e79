"""The picture of one layer's timeline: a compute stream above the streams of communication."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardsim.cost.predict import Prediction
from shardsim.report.style import boxed, look, picture, plain, styled, swatch
from shardsim.report.timeline import COMPUTE, LayerTimeline, Span, layer_timelines

KINDS = (
    ("matmul", "matmul", 0),
    ("attention", "attention", 4),
    ("elementwise", "elementwise", 3),
    ("copy", "copies and transposes", 5),
    ("wait", "waiting for communication", 1),
    ("collective", "communication", 2),
)
_INDEX = {kind: index for kind, _, index in KINDS}


def series_of(span: Span) -> int:
    """Return the colour of a task: what is on a link is communication, whatever its kind."""
    if span.stream != COMPUTE:
        return _INDEX["collective"]
    return _INDEX.get(span.kind, _INDEX["copy"])


@styled
def layer_timeline(item: Prediction) -> Figure:
    """Return one layer's forward and backward pass on one device, in milliseconds.

    Numbers mark the longest tasks; the list below the bars names them.
    """
    passes = layer_timelines(item)
    rows = [len(one.streams) for one in passes]
    keys = [_longest(one) for one in passes]
    figure = picture(sum(0.75 + 0.36 * row for row in rows) + 0.16 * sum(map(len, keys)) + 0.6)
    heights = [0.75 + 0.36 * row + 0.16 * len(key) for row, key in zip(rows, keys, strict=True)]
    axes_list = figure.subplots(len(passes), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, one, key in zip(axes_list, passes, keys, strict=True):
        _draw(axes, one, key)
    handles = [swatch(index, label) for _, label, index in KINDS]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=1.6)
    return figure


def _longest(one: LayerTimeline) -> list[Span]:
    """Return the tasks worth a number: the longest of those over 6 % of the pass, in order."""
    spans = [span for span in one.spans if span.duration_s > 0.055 * one.total_s]
    spans = sorted(spans, key=lambda span: -span.duration_s)[:12]
    return sorted(spans, key=lambda span: (span.stream != COMPUTE, span.start_s))


def _draw(axes: Axes, one: LayerTimeline, key: list[Span]) -> None:
    streams = one.streams
    for span in one.spans:
        index = series_of(span)
        axes.barh(
            streams.index(span.stream),
            span.duration_s * 1e3,
            left=span.start_s * 1e3,
            height=0.66,
            **look(index),
        )
    for number, span in enumerate(key, 1):
        middle_s = span.start_s + span.duration_s / 2
        boxed(axes, middle_s * 1e3, streams.index(span.stream), str(number))
    names = [COMPUTE, *(f"over {plain(name, 16)}" for name in streams[1:])]
    axes.set_yticks(range(len(streams)), names)
    axes.set_ylim(len(streams) - 0.5, -0.5)
    axes.set_xlim(0, one.total_s * 1e3 * 1.005)
    axes.xaxis.grid(True)
    axes.set_title(f"{one.block}: {one.total_s * 1e3:.4g} ms")
    lines = [
        f"{number}  {plain(span.name, 44)}, {span.duration_s * 1e3:.3g} ms"
        for number, span in enumerate(key, 1)
    ]
    axes.set_xlabel(
        "time (ms)\n" + "\n".join(lines), loc="left", multialignment="left", linespacing=1.35
    )
