"""Tables fitted to the width of a terminal, with rich: imported only when one is watched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Literal

from shardsim.views.table import Table
from shardsim.views.write import plain, printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

GAP = 2  # spaces between columns
NARROWEST = 8  # of a column of text, before rows are written as lists
EASY = 16  # of a column of text, before columns are left out that can be spared


def fitted(part: Table | str, width: int, colour: bool = False) -> str:
    """Return a table, or lines of text, in which no line is longer than `width`.

    Where a table is too wide, columns that say the same in every row move to a line below it, and a
    single row becomes a list. Headings and text wrap, numbers do not. Where even that is too wide,
    columns that the table can spare are left out, or each row is a list.
    """
    from rich.console import Console
    from rich.text import Text

    out = StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        legacy_windows=False,
    )
    if isinstance(part, Table):
        shared: list[str] = []
        too_wide = max(map(len, plain(part).splitlines())) > width
        if too_wide and len(part.rows) > 1:
            part, shared = _without_shared(part)
        part, left = _without_spare(part, width)
        widths = [] if too_wide and len(part.rows) == 1 else _widths(part, width)
        if widths:
            console.print(_rich(part, widths))
        lines = [] if widths else _lists(part)
        lines += [f"in all rows: {'; '.join(shared)}"] if shared else []
        lines += [f"in a wider terminal also: {', '.join(left)}"] if left else []
    else:
        lines = part.split("\n")
    for line in lines:
        console.print(Text(printable(line), overflow="fold"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _without_shared(table: Table) -> tuple[Table, list[str]]:
    """Return a table without the columns that say the same in every row, and what they say."""
    shared, kept = [], []
    for column, values in zip(table.columns, zip(*table.cells, strict=True), strict=True):
        if len(set(values)) > 1:
            kept.append(column.key)
        elif values[0] not in ("", column.missing):
            shared.append(f"{column.label} {values[0]}")
    return (table.only(*kept), shared) if kept else (table, [])


def _without_spare(table: Table, width: int) -> tuple[Table, list[str]]:
    """Return a table without the columns that it has to spare for others to be easy to read, and
    what they are called."""
    left: list[str] = []
    for key in table.spare:
        if _widths(table, width, EASY):
            break
        if key in table.keys:
            left += table.only(key).labels
            table = table.without(key)
    return table, left


def _widths(table: Table, width: int, narrowest: int = NARROWEST) -> list[int]:
    """Return the columns' widths, so that all fit into `width`; none where they cannot."""
    columns = list(zip(table.labels, *table.cells, strict=True))
    most = [max(map(len, texts)) for texts in columns]
    least = []
    for column, (label, *texts) in zip(table.columns, columns, strict=True):
        whole = [text for text in texts if column.form]
        words = [word for text in (label, *texts) for word in text.split()]
        words = label.split() if column.form else words
        least.append(max(map(len, (*whole, *words, " "))))
    room = width - GAP * (len(columns) - 1)
    while sum(least) > room:  # long words of text are broken
        long = [
            (size, index)
            for index, size in enumerate(least)
            if size > narrowest and not table.columns[index].form
        ]
        if not long:
            return []
        least[max(long)[1]] -= 1
    while sum(least) < min(room, sum(most)):
        need = [wanted / size for wanted, size in zip(most, least, strict=True)]
        least[need.index(max(need))] += 1
    return least


def _lists(table: Table) -> list[str]:
    """Return each row as a list of its values."""
    lines = []
    for row in table.cells:
        shown = zip(table.columns, row, strict=True)
        lines += [f"{one.label}: {cell}" for one, cell in shown if cell not in ("", one.missing)]
        lines.append("")
    return lines[:-1]


def _rich(table: Table, widths: Sequence[int]) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for column, width in zip(table.columns, widths, strict=True):
        side: Literal["left", "right"] = "right" if column.number else "left"
        label = Text(_broken(printable(column.label), width))
        made.add_column(label, justify=side, width=width, overflow="fold")
    for row in table.cells:
        cells = zip(map(printable, row), widths, strict=True)
        made.add_row(*(Text(_broken(cell, width)) for cell, width in cells))
    return made


def _broken(text: str, width: int) -> str:
    """Return text whose too long words are broken behind what joins their parts.

    >>> _broken("remat save_context", 9)
    'remat\\nsave_\\ncontext'
    """
    if all(len(word) <= width for word in text.split()):
        return text
    lines = [""]
    for word in text.split():
        joined = " " if lines[-1] else ""
        for part in re.findall(r"[^._,=:/-]*[._,=:/-]|[^._,=:/-]+", word):
            if lines[-1] and len(lines[-1] + joined + part) > width:
                lines.append(part)
            else:
                lines[-1] += joined + part
            joined = ""
    return "\n".join(lines)
