"""Tables of one predicted step: its parts, HBM, collectives and operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shardsim.cost.words import HBM, PARTS
from shardsim.units import GIB
from shardsim.views.table import Column, Table, names, table

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction


def _part(part: str, name: str) -> Column:
    def seconds(item: Prediction) -> float | None:
        """Return a part of the step; None where a compiler's cycles hold it and others."""
        return None if item.compiled and part in IN_OPERATIONS else item.time[part]

    return Column(part, name, seconds, ".4g", "s")


# Cycles of a compiled operation hold its wait for HBM: only their sum is the same on both sides.
IN_OPERATIONS = ("compute_s", "hbm_bound_s", "overhead_s")
STEP_PARTS = tuple(_part(part, name) for part, name in PARTS.items())
OPERATIONS = Column("operations_s", "operations", lambda item: item.operations_s, ".4g", "s")


def step_columns(items: Iterable[Prediction]) -> list[Column]:
    """Return the parts of a step that all of `items` can tell apart; they add up to the step."""
    if any(item.compiled for item in items):
        return [OPERATIONS, *(one for one in STEP_PARTS if one.key not in IN_OPERATIONS)]
    return list(STEP_PARTS)


def parts(item: Prediction) -> Table:
    """Return what the step time is made of."""

    def share(part: Column) -> float:
        return float(part.get(item) / item.step_time_s)

    columns = [
        Column("part", "step time", lambda part: part.heading),
        Column("time_s", "seconds", lambda part: part.get(item), ".4g"),
        Column("share", "share", share, "percent"),
    ]
    return table(columns, step_columns([item]))


def hbm(item: Prediction) -> Table:
    """Return what HBM of one device holds at the peak."""
    columns = [
        Column("use", "HBM per device", HBM.__getitem__),
        Column("gib", "GiB", lambda use: item.hbm[use] / GIB, ".2f"),
    ]
    return table(columns, HBM)


COLLECTIVES = (
    Column("kind", "collective", lambda use: use.kind),
    Column("mesh_axes", "mesh axes", lambda use: use.mesh_axes, show=names),
    Column("purpose", "of", lambda use: use.purpose),
    Column("bytes_per_chip", "sent per device", lambda use: use.bytes_per_chip, "bytes"),
    Column("count", "count", lambda use: use.count, ",.0f"),
    Column("time_s", "time", lambda use: use.time_s, ".4g", "s"),
    Column("exposed_s", "exposed", lambda use: use.exposed_s, ".4g", "s"),
)


def collectives(item: Prediction) -> Table:
    """Return the collectives of a step on one device, the longest first."""
    return table(COLLECTIVES, item.collectives)


def operations(item: Prediction) -> Table:
    """Return every computation of a step on one device, the longest first."""
    columns = [
        Column("task", "computation", lambda cost: cost.task.name),
        Column("kind", "kind", lambda cost: cost.task.kind),
        Column("block", "in", lambda cost: cost.block),
        Column("count", "times", lambda cost: float(cost.count), ",.0f"),
        Column("time_s", "seconds", lambda cost: float(cost.time_s), ".4g"),
        Column("share", "share", lambda cost: float(cost.time_s) / item.step_time_s, ".1f", "%"),
        Column("hbm_bound_s", "waiting for HBM", lambda cost: float(cost.memory_s), ".4g", "s"),
        Column("flops", "FLOP", lambda cost: float(cost.flops), ".4g"),
    ]
    costs = [cost for cost in item.price.computes if float(cost.count) > 0]
    return table(columns, sorted(costs, key=lambda cost: -float(cost.time_s)))
