"""The collectives of a trainer's compiled step beside the plan's, by kind and mesh axes.

A trainer leaves partitioning to the compiler, so the two need not be the same: where the compiler
splits a gather into a ring of permutes, or reduces where the plan scatters, both rows show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsim.plan import Plan
from shardsim.xla.compare import Key, Sums, Traffic, planned, table
from shardsim.xla.hlo import HloError, read_hlo


def collective_rows(
    plan: Plan, text: str | None, mesh: Mapping[str, int]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return a row per kind and mesh axes, and remarks if the program cannot be read.

    `mesh` is axis: size, major to minor, with the plan's names. Bytes are those that one device
    sends in a step. What goes over the data-center network is in no plan's row.
    """
    if text is None:
        return [], ("collectives: the compiled program was not left behind",)
    try:
        program = read_hlo(text, {name: size for name, size in mesh.items() if size > 1})
    except HloError as error:
        return [], (f"collectives: the compiled program is not understood: {error}",)
    wanted: Sums = {}
    found: Sums = {}
    for key, traffic in planned(plan).items():
        _add(wanted, key.kind, key.mesh_axes, traffic.bytes, traffic.count)
    for entry in program.collectives:
        sent = entry.sent_bytes * entry.count
        _add(found, entry.kind, entry.mesh_axes, sent, entry.count)
    return table(wanted, found), ()


def _add(sums: Sums, kind: str, axes: tuple[str, ...], sent: float, count: float) -> None:
    traffic = sums.setdefault(Key(kind, axes, "all"), Traffic())
    traffic.bytes += sent
    traffic.count += count
