"""A report as plain data, written out as HTML and as Markdown: both carry the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from shardsim.views.table import Table


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """The few numbers that matter: (what, value) pairs shown large."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is."""

    text: str


@dataclass(frozen=True)
class Drawing:
    """A picture with a caption that says what it shows."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Beside:
    """Items that stand beside each other where the page is wide enough."""

    items: Sequence[Text | Bullets | Table | Drawing]


FOLDED_ROWS = 16  # a longer table is shown when a reader asks for it


def folded(table: Table) -> str:
    """Return what stands for a long table until a reader asks for it; "" for one that is short."""
    if len(table.rows) <= FOLDED_ROWS:
        return ""
    return f"{len(table.rows)} rows: {', '.join(filter(None, table.labels))}"


Item = Text | Facts | Bullets | Table | Code | Drawing | Beside


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Chapter:
    """All sections about one plan (or about all plans together)."""

    title: str
    sections: Sequence[Section]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    chapters: Sequence[Chapter]
