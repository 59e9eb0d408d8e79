"""Whether what a compiled program sends is what its plan says, in the compiler's own forms.

The TPU compiler makes all-reduces of reduce-scatters over a whole slice, and of gathers that
nothing overlaps; each sends twice the bytes. Seen as what they stand for, the collectives of a
plan in the explicit way should leave nothing over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6  # of all bytes of a plan: the loss itself, rounding of sums


@dataclass(frozen=True, kw_only=True)
class Account:
    """The traffic of one compiled plan, in bytes that one device sends in a step."""

    compiled_bytes: float
    planned_bytes: float  # of them, as planned, also in another form
    beyond: tuple[tuple[str, tuple[str, ...], float], ...]  # kind, mesh axes, bytes not planned
    missing: tuple[tuple[str, tuple[str, ...], float], ...]  # planned, but not compiled

    @property
    def share(self) -> float:
        """The share of the compiled bytes that the plan accounts for."""
        return self.planned_bytes / self.compiled_bytes if self.compiled_bytes else 1.0


def account(table: Sequence[dict[str, Any]]) -> Account:
    """Return the account of rows as `shardsim.xla.compare.table` makes them.

    >>> row = {"mesh_axes": ["fsdp"], "planned_bytes": 10, "compiled_bytes": 0}
    >>> made = {**row, "kind": "all-reduce", "planned_bytes": 8, "compiled_bytes": 28}
    >>> account([made, {**row, "kind": "reduce-scatter"}]).share
    1.0
    """
    left = {
        (row["kind"], tuple(row["mesh_axes"])): row["compiled_bytes"] - row["planned_bytes"]
        for row in table
    }
    for (kind, axes), difference in list(left.items()):
        if kind in ("reduce-scatter", "all-gather") and difference < 0:
            over = max(left.get(("all-reduce", axes), 0.0), 0.0)
            moved = min(-2.0 * difference, over)
            if moved:
                left["all-reduce", axes] -= moved
                left[kind, axes] += moved / 2.0
    total = sum(row["compiled_bytes"] for row in table)
    beyond: list[tuple[str, tuple[str, ...], float]] = []
    missing: list[tuple[str, tuple[str, ...], float]] = []
    for key, difference in left.items():
        if abs(difference) > TOLERANCE * total:
            (beyond if difference > 0 else missing).append((*key, abs(difference)))
    return Account(
        compiled_bytes=total,
        planned_bytes=total - sum(item[2] for item in beyond),
        beyond=tuple(sorted(beyond, key=lambda item: -item[2])),
        missing=tuple(sorted(missing, key=lambda item: -item[2])),
    )
