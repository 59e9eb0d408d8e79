"""Planned collectives beside compiled ones, by kind, mesh axes and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardsim.plan import Plan, resolve
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.schedule import Move
from shardsim.program.shapes import Workload
from shardsim.xla.entries import Compiled, sent_bytes

TOLERANCE = 1e-6  # of the planned bytes: rounding of sums

# The scopes of the emitted code, outermost first, and what each is for.
SCOPES: Mapping[str, str] = {
    "reduce_small_gradients": "small gradients",
    "reduce_shared_gradients": "shared gradients",
    "reduce_gradients": "gradient reduction",
    "update": "updated parameters",
    "optimizer_update": "optimizer",
    "loss": "loss",
    "tables": "tables",
    "end_weights": "ends",
    "gather_weights": "weights",
    "pooling": "pooling",
    "loss_statistics": "loss statistics",
    "norm_statistics": "norm statistics",
    "look_up": "vocabulary",
    "head": "vocabulary",
    "keys": "keys and values",
    "second_axis": "second axis",
    "output_gradient": "block",
    "input_gradient": "block",
    "tensor_output": "block",
    "tensor_input": "block",
}
# What no plan says, by purpose.
UNPLANNED: Mapping[str, str] = {
    "loss": "the loss itself, one number",
    "optimizer": "the optimizer's own statistics",
}


@dataclass(frozen=True)
class Key:
    """What collectives are summed by."""

    kind: str
    mesh_axes: tuple[str, ...]
    purpose: str


@dataclass
class Traffic:
    """Bytes that one device sends in a step, and in how many collectives."""

    bytes: float = 0.0
    count: float = 0.0

    def add(self, each_bytes: float, count: float) -> None:
        """Add `count` collectives of `each_bytes`."""
        self.bytes += each_bytes * count
        self.count += count


Sums = dict[Key, Traffic]


def compiled_purpose(op_name: str) -> str:
    """Return what a compiled operation is for, from the scopes of the code it comes from.

    >>> compiled_purpose("jit(step)/transpose(jvp(pooling))/tensor_input/all_gather")
    'pooling'
    """
    parts = set(op_name.replace("(", "/").replace(")", "/").split("/"))
    return next((purpose for name, purpose in SCOPES.items() if name in parts), "other")


def planned(plan: Plan) -> Sums:
    """Return the planned traffic of a step, as the emitted code does it.

    What a schedule does in two stages, inside slices and between them, is one collective.
    """
    layout = resolve(plan)
    schedule = overlap(partition(Workload.of(plan), layout, plan.remat), layout)
    mesh = {axis.name: axis.size for axis in plan.mesh}
    sums: Sums = {}
    for _, task, times in schedule.runs():
        if not isinstance(task, Move) or task.stage == "dcn":
            continue
        axes = tuple(a for a in mesh if a in layout.mesh_axes(task.role) and mesh[a] > 1)
        size = int(np.prod([mesh[axis] for axis in axes]))
        arrays = task.ways or float(task.messages)
        count = float(task.count) * float(times) * arrays
        if count == 0 or size == 1:
            continue
        each = sent_bytes(task.kind, float(task.bytes) / arrays, size)
        sums.setdefault(Key(task.kind, axes, task.purpose), Traffic()).add(each, count)
    return sums


def key_of(entry: Compiled) -> Key:
    """Return what a compiled collective is summed by."""
    return Key(entry.kind, entry.mesh_axes, compiled_purpose(entry.op_name))


def compiled(entries: Iterable[Compiled]) -> Sums:
    """Return the compiled traffic of a step."""
    sums: Sums = {}
    for entry in entries:
        sums.setdefault(key_of(entry), Traffic()).add(entry.sent_bytes, entry.count)
    return sums


def table(plan: Sums, found: Sums) -> list[dict[str, Any]]:
    """Return one row per kind and mesh axes with both sides, largest first.

    Compiled traffic whose purpose no plan covers is left to `unplanned`.
    """
    rows: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for side, sums in (("planned", plan), ("compiled", found)):
        for key, traffic in sums.items():
            if key.purpose in UNPLANNED and not any(k.purpose == key.purpose for k in plan):
                continue
            row = rows.setdefault(
                (key.kind, key.mesh_axes),
                {
                    "kind": key.kind,
                    "mesh_axes": list(key.mesh_axes),
                    "planned_bytes": 0.0,
                    "compiled_bytes": 0.0,
                    "planned_count": 0.0,
                    "compiled_count": 0.0,
                },
            )
            row[f"{side}_bytes"] += traffic.bytes
            row[f"{side}_count"] += traffic.count
    return sorted(
        rows.values(), key=lambda row: (-max(row["planned_bytes"], row["compiled_bytes"]), str(row))
    )


def differences(plan: Sums, found: Sums) -> dict[Key, tuple[float, float]]:
    """Return (planned, compiled) bytes wherever they are not the same, to `TOLERANCE`."""
    result = {}
    for key in {*plan, *found}:
        wanted, got = (sums.get(key, Traffic()).bytes for sums in (plan, found))
        if abs(wanted - got) > TOLERANCE * wanted:
            result[key] = (wanted, got)
    return result
