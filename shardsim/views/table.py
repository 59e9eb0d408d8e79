"""A table as raw values and how they show; `shardsim.views.write` writes it in every form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from shardsim.units import show_bytes, show_count, show_percent, show_time

# Numbers that show their unit in every cell.
FORMS: dict[str, Callable[[float], str]] = {
    "bytes": show_bytes,
    "time": show_time,
    "percent": show_percent,
    "FLOP/s": lambda value: show_count(value, "FLOP/s"),
    "B/s": lambda value: show_count(value, "B/s"),
}


@dataclass(frozen=True)
class Column:
    """One column: the key of its values in data, its heading, and how a value shows.

    `get` takes the value from what a row is about. A value with a `form` is a number: a format
    specification, or one of `FORMS`; of a `unit` of "%" it is a fraction. `show` writes others.
    None shows as `missing`.
    """

    key: str
    heading: str
    get: Callable[[Any], Any]
    form: str = ""
    unit: str = ""
    show: Callable[[Any], str] = str
    right: bool = False  # numbers stand to the right, whether or not this says so
    missing: str = "-"

    @property
    def label(self) -> str:
        """The heading, with its unit where it does not say it itself."""
        said = self.unit in ("", *(word.lstrip("+") for word in self.heading.split()))
        return self.heading if said else f"{self.heading} {self.unit}"

    def within(self, get: Callable[[Any], Any], key: str = "", heading: str = "") -> Column:
        """Return the column for rows that hold what it is about; `get` takes that, or None."""

        def value(row: Any) -> Any:
            inner = get(row)
            return None if inner is None else self.get(inner)

        return replace(self, key=key or self.key, heading=heading or self.heading, get=value)

    @property
    def number(self) -> bool:
        """Whether the column stands to the right and is never wrapped."""
        return bool(self.form) or self.right

    def text(self, value: Any) -> str:
        """Return how a value shows."""
        if value is None or value != value:  # not a number
            return self.missing
        if not self.form:
            return self.show(value)
        if self.form in FORMS:
            return FORMS[self.form](value)
        return format(100 * value if self.unit == "%" else value, self.form)


@dataclass(frozen=True)
class Table:
    """Columns and rows of raw values (SI units, fractions)."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    spare: tuple[str, ...] = ()  # keys of columns that a narrow terminal does without, in order

    @property
    def labels(self) -> list[str]:
        """The headings with their units."""
        return [column.label for column in self.columns]

    @property
    def cells(self) -> list[list[str]]:
        """Every value as it shows."""
        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    @property
    def keys(self) -> list[str]:
        """What the columns are called in data."""
        return [column.key for column in self.columns]

    def data(self) -> list[dict[str, Any]]:
        """Return the raw values of every row by the columns' keys."""
        return [dict(zip(self.keys, row, strict=True)) for row in self.rows]

    def only(self, *keys: str) -> Table:
        """Return the table with the columns of some keys, in the keys' order."""
        indices = [self.keys.index(key) for key in keys]
        columns = tuple(self.columns[index] for index in indices)
        return replace(
            self, columns=columns, rows=tuple(tuple(row[i] for i in indices) for row in self.rows)
        )

    def without(self, *keys: str) -> Table:
        """Return the table without the columns of some keys."""
        return self.only(*(key for key in self.keys if key not in keys))

    def head(self, count: int) -> Table:
        """Return the table with its first rows only."""
        return replace(self, rows=self.rows[:count])


def table(
    columns: Iterable[Column], items: Iterable[Any], title: str = "", spare: tuple[str, ...] = ()
) -> Table:
    """Return a table of one row for each of `items`.

    >>> table([Column("n", "number", lambda n: n, "d")], [1, 2]).rows
    ((1,), (2,))
    """
    columns = tuple(columns)
    rows = tuple(tuple(one.get(item) for one in columns) for item in items)
    return Table(columns, rows, title, spare)


def pick(columns: Iterable[Column], *keys: str) -> list[Column]:
    """Return the columns of some keys, in the keys' order."""
    by_key = {column.key: column for column in columns}
    return [by_key[key] for key in keys]


def names(values: Iterable[str]) -> str:
    """Return names in one cell."""
    return ", ".join(values) or "-"


def yes_no(value: object) -> str:
    """Return a truth as a word."""
    return "yes" if value else "no"
