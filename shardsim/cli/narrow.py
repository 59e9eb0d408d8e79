"""Help in a narrow terminal: click's own is never narrower than 50 columns, 30 of them options."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

import click

NARROW, NARROWEST = 60, 32  # columns


class _Formatter(click.HelpFormatter):
    """What an option does stands below it where there is no room beside it."""

    def __init__(self, *, width: int | None = None, **given: Any) -> None:
        columns = shutil.get_terminal_size().columns
        self.narrow = width is None and columns < NARROW
        super().__init__(width=max(columns, NARROWEST) - 2 if self.narrow else width, **given)

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write options, or commands, with what they do."""
        if not self.narrow:
            super().write_dl(rows, col_max, col_spacing)
            return
        outer, inner = (" " * (self.current_indent + more) for more in (0, 4))
        for name, text in rows:
            for words, first in ((name, outer), (text, inner)):
                self.write(
                    textwrap.fill(
                        words,
                        self.width,
                        initial_indent=first,
                        subsequent_indent=inner,
                        break_on_hyphens=False,
                    )
                )
                self.write("\n")


class Context(click.Context):
    """The context of a command whose help fits any terminal."""

    formatter_class = _Formatter
