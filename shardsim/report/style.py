"""One style for all pictures: readable in greyscale, by the colour-blind, on light and on dark.

Series differ in lightness and in hatching, not in hue alone. Figures are made without pyplot, so
that making one leaves no state behind.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG, RendererSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch

from shardsim.views.colours import COLOURS

# Each colour of `COLOURS` is told apart from all others in the SVG, where it becomes a variable of
# the page.
INK, MUTED, GRID, PAPER = (COLOURS[name][0] for name in ("ink", "muted", "grid", "paper"))
SERIES = tuple(COLOURS[f"c{index}"][0] for index in range(6))
HATCHES = ("", "//", "..", "\\\\", "xx", "")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "shardsim",
}

WIDTH = 5.0  # inches: 480 CSS pixels, still readable on a telephone

P = ParamSpec("P")


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook, whatever the backend."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


def picture(height: float, width: float = WIDTH) -> Picture:
    """Return an empty figure of `width` x `height` inches whose contents never overlap."""
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw what `function` returns in the style of this module."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def to_png(figure: Figure, dpi: float = 100) -> bytes:
    """Return the picture as a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=PAPER)
    return buffer.getvalue()


def to_svg(figure: Figure, prefix: str) -> str:
    """Return the picture as an inline SVG element whose colours are variables of the page.

    `prefix` starts every identifier inside, so that several pictures can share a page.
    """
    buffer = io.StringIO()
    paper = figure.get_facecolor()
    figure.set_facecolor("none")
    with matplotlib.rc_context(STYLE):
        # Not `savefig`, which draws everything twice.
        _draw_svg(figure, buffer)
    figure.set_facecolor(paper)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for before in (' id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}{prefix}-")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Coordinates to a tenth of a point: a third of the size, and nobody sees it.
    text = re.sub(r' d="[^"]*"|translate\([^)]*\)', _rounded, text)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)


def _draw_svg(figure: Figure, buffer: io.StringIO) -> None:
    """Draw once, with one renderer for layout and drawing, so that text is measured once."""
    canvas: Any = FigureCanvasSVG(figure)
    make: Any = RendererSVG
    dpi = figure.dpi
    figure.dpi = 72  # points are the unit of SVG
    width, height = figure.get_size_inches() * 72
    renderer = make(width, height, buffer, metadata={"Date": None})
    canvas.get_renderer = lambda: renderer
    figure.draw(renderer)
    renderer.finalize()
    figure.dpi = dpi


_LONG = re.compile(r"(\d\.\d)\d+")


def _rounded(match: re.Match[str]) -> str:
    return _LONG.sub(_cut, match.group())


def _cut(match: re.Match[str]) -> str:
    return match[1]


@functools.lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    return frozenset(font.get_charmap())


def plain(text: str, most: int = 60) -> str:
    """Return text that a picture can show: on one line, cut to `most`, unknown glyphs as `?`."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= most else flat[: most - 1] + "…"
    return "".join(char if ord(char) in _glyphs() else "?" for char in flat)


def folded(text: str, width: int = 20) -> str:
    """Return `plain` text on two lines at most."""
    flat = plain(text, 2 * width - 2)
    if len(flat) <= width:
        return flat
    cut = max(flat.rfind(mark, 6, width) for mark in "- _/.")
    cut = cut + 1 if cut > 0 else width
    return f"{flat[:cut]}\n{flat[cut:]}"


def look(index: int) -> Any:
    """Return how bars of series `index` look, as keywords of matplotlib."""
    return {"color": SERIES[index], "edgecolor": PAPER, "hatch": HATCHES[index], "linewidth": 0.6}


def swatch(index: int, label: str) -> Patch:
    """Return what a legend shows for bars of series `index`."""
    return Patch(facecolor=SERIES[index], edgecolor=PAPER, hatch=HATCHES[index], label=label)


def boxed(axes: Axes, x: float, y: float, text: str) -> None:
    """Write a short text on a bar."""
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=INK, bbox=box)


def marks(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], index: int, label: str, size: Any = 38
) -> None:
    """Draw hollow marks in the form and colour of series `index`."""
    axes.scatter(
        xs,
        ys,
        s=size,
        marker=MARKERS[index % len(MARKERS)],
        facecolor="none",
        edgecolor=SERIES[index % len(SERIES)],
        linewidth=1.5,
        label=label,
        zorder=3,
    )


def diagonal(axes: Axes, low: float, high: float) -> None:
    """Let both axes run from `low` to `high`, with the line on which both are alike."""
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.grid(True)


def bare(axes: Axes) -> None:
    """Remove spines and ticks that a table-like picture does not need."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
