"""Tables of a profile beside its prediction, and of what was learned from it."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING

from shardsim.views.table import Column, Table, table

if TYPE_CHECKING:
    from shardsim.xla.profile.learn import Rate, Residual
    from shardsim.xla.profile.lined import LinedUp, Row
    from shardsim.xla.profile.steps import OpTime

MOST_OPS = 8  # of what is not lined up


def _times(step_s: float) -> tuple[Column, ...]:
    return (
        Column("predicted_s", "predicted", attrgetter("predicted_s"), "time"),
        Column("measured_s", "measured", attrgetter("measured_s"), "time"),
        Column("difference_s", "difference", attrgetter("difference_s"), "time"),
        Column("share", "of the step", lambda row: row.measured_s / step_s, "percent"),
    )


def kinds(lined: LinedUp) -> Table:
    """Return the step by kinds of work, those that differ most first."""
    what = Column("kind", "kind of work", attrgetter("kind"))
    return table((what, *_times(lined.profile.step_s)), lined.by_kind)


def rows(lined: LinedUp) -> Table:
    """Return the parts of the step, those that differ most first."""
    columns = (
        Column("what", "what", attrgetter("what")),
        Column("kind", "kind", attrgetter("kind")),
        *_times(lined.profile.step_s),
        Column("lined_up", "", attrgetter("lined_up"), show=lambda value: "" if value else "?"),
    )
    return table(columns, lined.rows)


def shown(parts: Table, whole: Row) -> Table:
    """Return parts of the step for people: with the whole of it as the last row."""
    columns = [column for column in parts.columns if column.key != "lined_up"]
    made = parts.only(*(column.key for column in columns))
    values = {
        "predicted_s": whole.predicted_s,
        "measured_s": whole.measured_s,
        "difference_s": whole.difference_s,
        "share": 1.0,
    }
    last = tuple(values.get(key, "step" if at == 0 else "") for at, key in enumerate(made.keys))
    return Table(made.columns, (*made.rows, last), made.title)


def not_lined_up(lined: LinedUp) -> Table:
    """Return the measured operations that no part of the plan was found for, longest first."""
    ops = [op for row in lined.rows if not row.lined_up for op in row.ops]
    return operations(sorted(ops, key=lambda op: -op.own_s), "not lined up")


def operations(ops: Iterable[OpTime], heading: str = "operation") -> Table:
    """Return measured operations, with where they come from as far as the program says it."""
    columns = (
        Column("op", heading, attrgetter("op")),
        Column("kind", "kind", attrgetter("what.kind")),
        Column("own_s", "measured", attrgetter("own_s"), "time"),
        Column("count", "times", attrgetter("count"), ",.0f"),
        Column("source", "from", lambda op: op.what.source or op.what.scope or op.kernel),
    )
    return table(columns, ops)


def rates(learned: Iterable[Rate]) -> Table:
    """Return the figures of a chip that were learned, or why they were not."""
    columns = (
        Column("figure", "figure", attrgetter("figure")),
        Column("was", "was", attrgetter("was"), ".4f"),
        Column("value", "is", attrgetter("value"), ".4f"),
        Column("why", "", attrgetter("why")),
    )
    return table(columns, learned)


def residuals(found: Iterable[Residual]) -> Table:
    """Return how far each kind of work is off, before and after."""
    columns = (
        Column("kind", "kind of work", attrgetter("kind")),
        Column("rows", "rows", attrgetter("rows"), ",d"),
        Column("measured_s", "measured", attrgetter("measured_s"), "time"),
        Column("before", "error before", attrgetter("before"), "+.1f", "%"),
        Column("after", "after", attrgetter("after"), "+.1f", "%"),
        Column("worst", "worst row", attrgetter("worst")),
        Column("worst_after", "after", attrgetter("worst_after"), "+.1f", "%"),
    )
    return table(columns, found)
