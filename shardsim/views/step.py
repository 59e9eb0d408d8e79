"""Tables of one predicted step: its parts, HBM, collectives and operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardsim.cost.words import HBM, PARTS
from shardsim.units import GIB, show_bytes, show_percent
from shardsim.views.table import Column, Table, names, table

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction


def parts(item: Prediction) -> Table:
    """Return what the step time is made of."""
    columns = [
        Column("part", "step time", lambda part: PARTS[part]),
        Column("time_s", "seconds", lambda part: item.time[part], ".4g"),
        Column(
            "share",
            "share",
            lambda part: item.time[part] / item.step_time_s,
            show=show_percent,
            right=True,
        ),
    ]
    return table(columns, item.time)


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
    Column(
        "bytes_per_chip",
        "sent per device",
        lambda use: use.bytes_per_chip,
        show=show_bytes,
        right=True,
    ),
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
