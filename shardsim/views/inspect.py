"""Tables of anyone's compiled program: its step, its operations, what it sends and lays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shardsim.units import show_bytes, show_percent, show_time
from shardsim.views.table import Column, Table, names, table

if TYPE_CHECKING:
    from shardsim.xla.inspect.inspected import Inspected, Row

SHOWN, EXPLAINED = 12, 6


def headline(found: Inspected) -> list[str]:
    """Return what the program is, and its step in a line each."""
    where = found.machine.name if found.machine else f"{found.devices} devices"
    axes = []
    for axis in found.mesh:
        torus = " ".join(f"{name}{factor}" for name, factor in axis.torus.items())
        axes.append(f"{axis.name}={axis.size}" + (f" ({torus})" if torus else ""))
    guessed = "" if found.mesh_named else "; axes by its groups, --mesh names them"
    lines = [f"{found.name} on {where}, mesh {', '.join(axes)}{guessed}"]
    if found.step_time_s is not None and found.time is not None:
        exposed = found.time["exposed_comm_s"]
        lines.append(
            f"step {show_time(found.step_time_s)} as the compiler scheduled it, of which "
            f"{show_time(exposed)} wait for collectives; HFU {show_percent(found.hfu or 0.0)}"
        )
    if found.peak_bytes is not None:
        lines.append(f"HBM peak {show_bytes(found.peak_bytes)} of a device")
    else:
        lines.append(f"arguments take {show_bytes(found.arguments_bytes)} of a device's HBM")
    return lines


def operations(found: Inspected) -> Table:
    """Return the operations of a step by kind, the longest first."""
    columns = [
        Column("kind", "operations", lambda one: one.kind),
        Column("count", "times", lambda one: one.count, ",d"),
        Column("time_s", "seconds", lambda one: one.time_s, ".4g"),
        Column("share", "share", lambda one: one.time_s / (found.step_time_s or 1.0), ".1f", "%"),
        Column("flops", "FLOP", lambda one: one.flops, ".4g"),
    ]
    return table(columns, found.operations)


def sent(rows: Sequence[Row]) -> Table:
    """Return collectives, copies and host transfers, costliest first, and the sum of the rest."""
    columns = [
        Column("kind", "collective or copy", lambda row: row.kind),
        Column("mesh_axes", "mesh axes", lambda row: row.mesh_axes, show=names),
        Column("torus_axes", "torus", lambda row: row.torus_axes, show=names),
        Column("array", "array", lambda row: row.array),
        Column("count", "times", lambda row: row.count, ",d"),
        Column("bytes", "bytes", lambda row: row.bytes, "bytes"),
        Column("time_s", "alone", lambda row: row.time_s, "time"),
        Column("exposed_s", "exposed", lambda row: row.exposed_s, "time"),
        Column("unexpected", "", lambda row: "unexpected" if row.reason.why else ""),
        Column("source", "from", _place),
    ]
    shown, rest = list(rows[:SHOWN]), rows[SHOWN:]
    if rest:
        shown.append(
            replace(
                rest[0],
                kind=f"{len(rest)} more",
                mesh_axes=(),
                torus_axes=(),
                array="",
                bytes=sum(row.bytes for row in rest),
                count=sum(row.count for row in rest),
                time_s=_sum([row.time_s for row in rest]),
                exposed_s=_sum([row.exposed_s for row in rest]),
                source="",
                op_name="",
                reason=replace(rest[0].reason, why="", argument=""),
            )
        )
    return table(columns, shown)


def constraints(rows: Sequence[Row]) -> list[str]:
    """Return for the costliest unexpected ones why they are there and what would remove them."""
    lines = []
    for number, row in enumerate(rows[:EXPLAINED], 1):
        cost = row.time_s if row.exposed_s is None else row.exposed_s
        costs = show_bytes(row.bytes) if cost is None else show_time(cost)
        lines += [
            f"{number}. {row.kind} of {row.array} at {_place(row) or 'no known line'} ({costs}): "
            f"{row.reason.why}",
            f"   {row.reason.constraint}",
        ]
    if len(rows) > EXPLAINED:
        lines.append(f"and {len(rows) - EXPLAINED} more (--json has all)")
    return lines


def _place(row: Row) -> str:
    """Return where a row comes from, and which argument it moves."""
    return f"{row.source} {row.reason.argument}".strip()


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
