"""Tables of slices that were searched for one question, and of what training takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from shardsim.views.plans import columns as of_plans
from shardsim.views.table import Column, Table, table

if TYPE_CHECKING:
    from shardsim.answers.slices import Choice
    from shardsim.answers.training import Training


def training_columns(training: Training) -> list[Column]:
    """Return days, chip-hours and money of plans; money only where there are prices."""
    found = [
        Column("days", "days", training.days, ",.3g"),
        Column("chip_hours", "chip-hours", training.chip_hours, ",.0f"),
    ]
    return found + ([Column("cost", "cost", training.cost, ",.0f")] if training.prices else [])


def trained(training: Training) -> str:
    """Return in words for how many tokens those columns are."""
    what = "days, chip-hours and cost" if training.prices else "days and chip-hours"
    return f"{what} are for {training.tokens:,.0f} tokens"


def best_of_each(items: Sequence[Choice], training: Training | None) -> Table:
    """Return the best plan of each slice, the front and the smallest marked."""
    best = attrgetter("best")
    found = [one.best for one in items if one.best is not None]
    shown = of_plans(found, "mesh", "mfu", "step_time_s", "hbm_peak_gib")
    more = [Column("chip_seconds", "chip-s/step", _chip_seconds, ",.4g")]
    if training is not None:
        days, chip_hours, *cost = training_columns(training)
        more = [days, *(cost or [chip_hours])]
    columns = [
        Column("machine", "slice", lambda one: one.machine.name),
        Column("chips", "chips", lambda one: one.machine.chips, ",d"),
        *(one.within(best) for one in shown),
        *(one.within(best) for one in more),
        Column("note", "of all", _note),
    ]
    return table(columns, items)


def _chip_seconds(item: Any) -> float:
    return float(item.step_time_s * item.plan.machine.chips)


def _note(one: Choice) -> str:
    if one.best is None:
        return one.why_not
    words = ["front"] if one.on_front else []
    return ", ".join([*words, *(["smallest"] if one.smallest else [])])


def mfus(rows: Iterable[Any]) -> Table:
    """Return the utilisations of one step, by how FLOPs are counted."""
    get: Callable[[str], Callable[[Any], Any]] = attrgetter
    columns = [
        Column("convention", "convention", get("name")),
        Column("mfu", "utilisation", get("utilisation"), ".1f", "%"),
        Column("flops_per_token", "FLOP per token", get("flops_per_token"), ".4g"),
        Column("counts", "counts", get("counts")),
    ]
    return table(columns, rows)
