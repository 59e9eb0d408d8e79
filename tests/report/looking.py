"""Helpers that look at a figure as a reader would: what its text covers."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from shardsim.report.style import STYLE


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Return every visible text of a figure with its box in pixels."""
    with matplotlib.rc_context(STYLE):
        figure.canvas.draw()
        hidden = outside(figure)
        return [
            (artist.get_text(), artist.get_window_extent())
            for artist in figure.findobj(Text)
            if artist.get_visible() and artist.get_text().strip() and id(artist) not in hidden
        ]


def outside(figure: Figure) -> set[int]:
    """Return the labels of ticks beyond the ends of their axis, which are not drawn."""
    found = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = 1e-9 * (high - low)
            for tick in axis.get_major_ticks():
                if not low - room <= tick.get_loc() <= high + room:
                    found |= {id(tick.label1), id(tick.label2)}
    return found


def cut_off(figure: Figure) -> list[str]:
    """Return the texts that leave the canvas."""
    width, height = figure.canvas.get_width_height()
    return [
        text
        for text, box in texts(figure)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Return pairs of texts that cover each other by more than a tenth of the smaller one."""
    found = []
    boxes = texts(figure)
    for index, (one, a) in enumerate(boxes):
        for other, b in boxes[index + 1 :]:
            common = Bbox.intersection(a, b)
            smaller = min(a.width * a.height, b.width * b.height)
            if common is not None and common.width * common.height > 0.1 * smaller > 0:
                found.append((one, other))
    return found
