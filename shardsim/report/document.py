"""A report as plain data, written out as HTML and as Markdown: both carry the same numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

# A number with its unit, or a shape: `+1.5`, `14.8 ms`, `512 x 256`, `3,072 of 256 x 128`.
_NUMBER = re.compile(r"[+-]?[\d,.]+(e-?\d+)?(( x | of )[\d,.]+)*( ?([KMGT]iB|[mun]?s|B|%))?")


@dataclass(frozen=True, kw_only=True)
class Text:
    """One paragraph."""

    text: str
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The few numbers that matter: (what, value) pairs shown large."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; a column is set to the right where all its cells are numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self, column: int) -> bool:
        """Return whether every cell of a column is a number, a dash or empty."""
        cells = [row[column] for row in self.rows]
        return any(cells) and all(
            cell in ("", "-") or _NUMBER.fullmatch(cell) is not None for cell in cells
        )


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text to be copied as it is."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture with a caption that says what it shows."""

    figure: Figure
    caption: str


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Items that stand beside each other where the page is wide enough."""

    items: Sequence[Text | Bullets | Table | Drawing]


Item = Text | Facts | Bullets | Table | Code | Drawing | Beside


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    items: Sequence[Item]


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """All sections about one plan (or about all plans together)."""

    title: str
    sections: Sequence[Section]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    chapters: Sequence[Chapter]
