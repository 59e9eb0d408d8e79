"""Copies of records with other values, fast enough for the tasks of a search."""

from __future__ import annotations

from typing import Any, TypeVar

Record = TypeVar("Record")


def replace(record: Record, **changes: Any) -> Record:
    """Return a frozen dataclass with other values: `dataclasses.replace` in a tenth of its time,
    which a search of plans spends on its tasks, of 25 to 40 fields each, a quarter of a million
    times. For classes that check nothing when they are made, and cache nothing.
    """
    assert changes.keys() <= record.__dict__.keys(), changes
    made: Record = object.__new__(type(record))
    made.__dict__.update(record.__dict__, **changes)
    return made
