"""A table written as text, HTML, Markdown, cells or a pandas frame; the terminal's is `terminal`.

And plain data as JSON.
"""

from __future__ import annotations

import csv
import io
import json
import re
from html import escape
from typing import TYPE_CHECKING, Any

from shardsim.views.table import Column, Table

if TYPE_CHECKING:
    import pandas as pd

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!&])")


def printable(text: object) -> str:
    r"""Return `text` with control characters spelt out, so that none reaches a terminal.

    >>> printable("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def plain(table: Table) -> str:
    """Return unwrapped text in columns, for files, pipes and tests."""
    cells = [[printable(cell) for cell in row] for row in table.cells]
    labels = table.labels
    widths = [max(map(len, column)) for column in zip(labels, *cells, strict=True)]

    def line(parts: list[str]) -> str:
        aligned = [
            part.rjust(width) if column.number else part.ljust(width)
            for part, width, column in zip(parts, widths, table.columns, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    rows = [line(row) for row in cells]
    return "\n".join([line(labels), line(["-" * width for width in widths]), *rows])


def csv_text(table: Table) -> str:
    """Return comma-separated values under the columns' keys: numbers in SI units and fractions."""

    def cell(column: Column, value: object) -> str:
        if value is None:
            return ""
        return f"{value:.6g}" if isinstance(value, float) else column.text(value)

    text = io.StringIO()
    rows = ([*map(cell, table.columns, row)] for row in table.rows)
    csv.writer(text, lineterminator="\n").writerows([table.keys, *rows])
    return text.getvalue()


def html(table: Table) -> str:
    """Return an HTML table, every cell escaped; without headings the first column is one.

    Its alignment needs no style sheet; the classes (`n` numbers; `s`, `t`, `l` short to long
    text) are for pages that have one.
    """
    cells = table.cells
    headed = any(table.labels)
    kinds = []
    for index, column in enumerate(table.columns):
        most = max((len(row[index]) for row in cells), default=0)
        kinds.append("n" if column.number else "l" if most > 80 else "t" if most > 34 else "s")

    def row(parts: list[str], heads: int) -> str:
        shown = []
        for index, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
            tag = "th" if index < heads else "td"
            side = "right" if kind == "n" else "left"
            shown.append(f'<{tag} class="{kind}" style="text-align:{side}">{escape(part)}</{tag}>')
        return f"<tr>{''.join(shown)}</tr>"

    title = table.title
    caption = f'<caption style="text-align:left">{escape(title)}</caption>' if title else ""
    head = f"<thead>{row(table.labels, len(kinds))}</thead>" if headed else ""
    body = "\n".join(row(each, 0 if headed else 1) for each in cells)
    return f"<table>{caption}{head}<tbody>\n{body}</tbody></table>"


def cells(table: Table) -> dict[str, Any]:
    """Return headings, sides and cells as they show, for a page that builds its own elements."""
    return {
        "title": table.title,
        "columns": [
            {"key": one.key, "label": label, "number": one.number}
            for one, label in zip(table.columns, table.labels, strict=True)
        ],
        "rows": table.cells,
    }


def json_text(data: Any, indent: int | None = None) -> str:
    """Return plain data as JSON; not-a-number and infinity become null.

    >>> json_text({"a": float("inf"), "b": (1, 2)})
    '{"a": null, "b": [1, 2]}'
    """
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def safe(text: str) -> str:
    """Return text that Markdown shows as it is, on one line.

    >>> safe("<b>*x*</b> | `y`")
    '\\\\<b\\\\>\\\\*x\\\\*\\\\</b\\\\> \\\\| \\\\`y\\\\`'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown."""
    rows = [[safe(cell) for cell in row] for row in (table.labels, *table.cells)]
    rows.insert(1, ["---:" if column.number else "---" for column in table.columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def frame(table: Table) -> pd.DataFrame:
    """Return a pandas frame of the raw values, its columns named by their keys."""
    import pandas as pd

    columns = [column.key for column in table.columns]
    return pd.DataFrame.from_records(list(table.rows), columns=columns)
