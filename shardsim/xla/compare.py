"""What a plan sends in a step beside what a compiled program sends: host devices, TPUs, trainers.

Both are lists of accounts, lined up by kind, mesh axes and purpose. Compilers write some planned
collectives in another form; `settle` sees through those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shardsim.plan import Plan, resolve
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.schedule import Move
from shardsim.program.shapes import Workload
from shardsim.xla.hlo import CompiledProgram
from shardsim.xla.hlo.collect import sent_bytes

TOLERANCE = 1e-6  # of what is compared: rounding of sums

Key = tuple[str, tuple[str, ...], str]  # kind, mesh axes, purpose

# What no plan says, by purpose.
UNPLANNED: Mapping[str, str] = {
    "loss": "the loss itself, one number",
    "optimizer": "the optimizer's own statistics",
}

# Planned kind, the kind that compilers make of it, and bytes sent instead of one. The TPU compiler
# makes all-reduces of reduce-scatters over a whole slice, and of gathers that nothing overlaps; its
# partitioner splits gathers and scatters beside a matmul into a ring of permutes.
REWRITES: tuple[tuple[str, str, float], ...] = (
    ("reduce-scatter", "all-reduce", 2.0),
    ("all-gather", "all-reduce", 2.0),
    ("reduce-scatter", "permute", 1.0),
    ("all-gather", "permute", 1.0),
)


@dataclass(frozen=True, kw_only=True)
class Account:
    """What one device sends in a step in collectives of one kind, and in how many of them."""

    kind: str
    mesh_axes: tuple[str, ...]
    purpose: str = ""  # as of `Move`; empty where purposes are not told apart
    planned_bytes: float = 0.0
    compiled_bytes: float = 0.0
    planned_count: float = 0.0
    compiled_count: float = 0.0

    @property
    def key(self) -> Key:
        """What accounts are lined up by."""
        return self.kind, self.mesh_axes, self.purpose

    @property
    def beyond_bytes(self) -> float:
        """Bytes that are compiled beyond the plan; negative where less is sent than planned."""
        return self.compiled_bytes - self.planned_bytes

    @property
    def same(self) -> bool:
        """Whether the planned bytes are sent, to `TOLERANCE`."""
        return abs(self.beyond_bytes) <= TOLERANCE * self.planned_bytes

    def __add__(self, other: Account) -> Account:
        return replace(
            self,
            planned_bytes=self.planned_bytes + other.planned_bytes,
            compiled_bytes=self.compiled_bytes + other.compiled_bytes,
            planned_count=self.planned_count + other.planned_count,
            compiled_count=self.compiled_count + other.compiled_count,
        )

    def to_data(self) -> dict[str, Any]:
        """Return the row of `shardsim verify --json`."""
        row = {**vars(self), "mesh_axes": list(self.mesh_axes)}
        del row["purpose"]
        return row

    @classmethod
    def of_data(cls, row: Mapping[str, Any]) -> Account:
        """Return what `to_data` wrote."""
        return cls(**{**row, "mesh_axes": tuple(row["mesh_axes"])})


def planned(plan: Plan) -> list[Account]:
    """Return the traffic of a step as the plan says it, without what an implementation adds.

    What a schedule does in two stages, inside slices and between them, is one collective.
    """
    layout = resolve(plan)
    schedule = overlap(partition(Workload.of(plan), layout), layout)
    mesh = {axis.name: axis.size for axis in plan.mesh}
    accounts = []
    for block, task, times in schedule.runs():
        if not isinstance(task, Move) or task.stage == "dcn":
            continue
        if schedule.blocks[block].phase in ("forward", "backward", "boundary"):
            times = times * schedule.pipeline.ticks
        axes = tuple(a for a in mesh if a in layout.mesh_axes(task.role) and mesh[a] > 1)
        arrays = max(task.ways, 1) * float(task.messages)
        count = float(task.count) * float(times) * arrays
        if count == 0 or not axes:
            continue
        members = math.prod(mesh[axis] for axis in axes)
        each = sent_bytes(task.kind, float(task.bytes) / arrays, members)
        accounts.append(
            Account(
                kind=task.kind,
                mesh_axes=axes,
                purpose=task.purpose,
                planned_bytes=each * count,
                planned_count=count,
            )
        )
    return line_up(accounts)


def found(program: CompiledProgram) -> list[Account]:
    """Return the traffic of a compiled step."""
    return line_up(
        Account(
            kind=item.kind,
            mesh_axes=item.mesh_axes,
            purpose=item.purpose,
            compiled_bytes=item.sent_bytes * item.count,
            compiled_count=float(item.count),
        )
        for item in program.collectives
    )


def line_up(accounts: Iterable[Account]) -> list[Account]:
    """Return one account for each kind, mesh axes and purpose."""
    sums: dict[Key, Account] = {}
    for one in accounts:
        sums[one.key] = sums[one.key] + one if one.key in sums else one
    return list(sums.values())


class Comparison:
    """The planned collectives of a step beside those of its compiled program.

    Where `purposes` are not told apart, everything that is sent counts: nothing says what the
    collectives of others' code are for.
    """

    def __init__(self, plan: Plan, program: CompiledProgram, *, purposes: bool = True) -> None:
        both = [*planned(plan), *found(program)]
        if not purposes:
            both = [replace(one, purpose="") for one in both]
        self.accounts = line_up(both)
        self._covered = {one.purpose for one in self.accounts if one.planned_count}

    def covered(self, account: Account) -> bool:
        """Whether plans say anything of such traffic."""
        return account.purpose in self._covered or account.purpose not in UNPLANNED

    @cached_property
    def differences(self) -> list[Account]:
        """Where other bytes are sent than planned, unless no plan covers the purpose."""
        return [one for one in self.accounts if self.covered(one) and not one.same]

    @cached_property
    def table(self) -> list[Account]:
        """One account for each kind and mesh axes, largest first; the rest is in `accounts`."""
        sums = line_up(replace(one, purpose="") for one in self.accounts if self.covered(one))
        return sorted(
            sums, key=lambda one: (-max(one.planned_bytes, one.compiled_bytes), str(one.to_data()))
        )


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """Planned collectives that were compiled in another form."""

    planned: str
    compiled: str
    mesh_axes: tuple[str, ...]
    planned_bytes: float


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A table in which what was compiled in another form counts as what it stands for.

    The collectives of a plan in the explicit way should leave nothing over.
    """

    accounts: tuple[Account, ...]
    renamed: tuple[Renamed, ...]
    compiled_bytes: float  # as they were compiled

    @cached_property
    def beyond_bytes(self) -> float:
        """Bytes that are sent and not planned."""
        return sum(max(one.beyond_bytes, 0.0) for one in self.accounts if not self._small(one))

    @cached_property
    def missing_bytes(self) -> float:
        """Bytes that are planned and not sent."""
        return sum(max(-one.beyond_bytes, 0.0) for one in self.accounts if not self._small(one))

    def _small(self, account: Account) -> bool:
        return abs(account.beyond_bytes) <= TOLERANCE * self.compiled_bytes

    @property
    def share(self) -> float:
        """The share of the compiled bytes that the plan accounts for."""
        return 1.0 - self.beyond_bytes / self.compiled_bytes if self.compiled_bytes else 1.0


def settle(table: Iterable[Account]) -> Settled:
    """Return a table with all that `REWRITES` explain, as far as planned bytes are missing.

    >>> scatter = Account(kind="reduce-scatter", mesh_axes=("fsdp",), planned_bytes=10.0)
    >>> made = Account(kind="all-reduce", mesh_axes=("fsdp",), planned_bytes=8, compiled_bytes=28)
    >>> settle([scatter, made]).share, settle([scatter, made]).renamed[0].planned_bytes
    (1.0, 10.0)
    """
    left = {(one.kind, one.mesh_axes): one for one in table}
    total = sum(one.compiled_bytes for one in left.values())
    renamed = []
    for wanted, made, factor in REWRITES:
        for kind, axes in left:
            if kind != wanted or (other := left.get((made, axes))) is None:
                continue
            one = left[kind, axes]
            moved = min(-one.beyond_bytes, other.beyond_bytes / factor)
            if moved > TOLERANCE * total:
                left[kind, axes] = replace(one, compiled_bytes=one.compiled_bytes + moved)
                rest = other.compiled_bytes - moved * factor
                left[made, axes] = replace(other, compiled_bytes=rest)
                renamed.append(
                    Renamed(planned=wanted, compiled=made, mesh_axes=axes, planned_bytes=moved)
                )
    return Settled(accounts=tuple(left.values()), renamed=tuple(renamed), compiled_bytes=total)


# The JSON of `shardsim verify` that every way of verifying has; what one cannot say is null.
_UNKNOWN: Mapping[str, Mapping[str, None]] = {
    "hbm": dict.fromkeys(("predicted_peak_bytes", "compiled_peak_bytes")),
    "compute": dict.fromkeys(("predicted_s", "compiled_s")),
    "step": dict.fromkeys(("predicted_s", "replayed_s", "measured_s")),
}


def answer(against: str, ok: bool, **more: Any) -> dict[str, Any]:
    """Return the JSON of `shardsim verify`: what is known under the common keys, then the rest."""
    common: dict[str, Any] = {
        "ok": ok,
        "against": against,
        "loss_rel_error": None,
        "grad_rel_error": None,
        **{key: dict(parts) for key, parts in _UNKNOWN.items()},
        "collectives": [],
        "unplanned": [],
    }
    nested = {key: {**_UNKNOWN[key], **more[key]} for key in _UNKNOWN if key in more}
    return {**common, **more, **nested}
