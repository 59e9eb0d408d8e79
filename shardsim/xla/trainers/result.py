"""What a trainer made of an exported plan, beside the plan: the JSON of `shardsim verify`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardsim.cost.predict import predict
from shardsim.plan import Plan
from shardsim.xla.compare import Account, Comparison, answer
from shardsim.xla.hlo import HloError, read_hlo

STATE_TOLERANCE = 0.01


Spec = tuple[tuple[str, ...], ...]  # of each dimension, the mesh axes that split it


def spec_of(
    dimensions: Iterable[Iterable[str]], sizes: Mapping[str, int] | None = None, rank: int = 0
) -> Spec:
    """Return a spec of `rank` dimensions or more.

    With the `sizes` of mesh axes, those of one device or without a size are left out.
    """
    spec = tuple(
        tuple(axis for axis in axes if sizes is None or sizes.get(axis, 1) > 1)
        for axes in dimensions
    )
    return spec + ((),) * (rank - len(spec))


@dataclass(frozen=True)
class Placed:
    """One parameter (or its moments): where the plan, the export and the trainer put it.

    Specs name the trainer's mesh axes; `exported` is what our own resolver expects of the rules.
    """

    name: str
    planned: Spec
    exported: Spec
    found: Spec

    @property
    def as_exported(self) -> bool:
        """Whether the trainer resolved the rules as expected."""
        return self.found == self.exported

    def to_data(self) -> dict[str, Any]:
        """Return the row of `verify --json`."""
        return {
            "name": self.name,
            "planned": [list(axes) for axes in self.planned],
            "found": [list(axes) for axes in self.found],
            "same": self.found == self.planned,
        }


@dataclass
class TrainerResult:
    """What came out of a trainer's own run or compile."""

    against: str
    plan: Plan  # with the model that the trainer trains
    versions: Mapping[str, str]
    parameters: Sequence[Placed] = ()
    missing: Sequence[str] = ()  # parameters that the trainer never showed
    state_bytes: float | None = None  # one device's, as compiled
    exported_state_bytes: float | None = None
    peak_bytes: float | None = None  # in use at the compiled step's peak, state included
    allocated_bytes: float | None = None  # for temporaries, with the gaps between them
    losses: Sequence[float] = ()
    differences: Sequence[str] = ()
    remarks: Sequence[str] = ()
    collectives: Sequence[Account] = ()

    def remarked(self, text: str) -> TrainerResult:
        """Return the result with one more remark."""
        return replace(self, remarks=(*self.remarks, text))

    @property
    def ok(self) -> bool:
        """Whether every parameter lies as exported and the state has the expected bytes."""
        placed = bool(self.parameters) and all(one.as_exported for one in self.parameters)
        error = self.state_error
        finite = all(math.isfinite(loss) for loss in self.losses)
        small = error is None or abs(error) <= STATE_TOLERANCE
        return placed and not self.missing and small and finite

    @property
    def state_error(self) -> float | None:
        """Compiled state over the exported specs' minus one; None if it was not compiled."""
        if self.state_bytes is None or not self.exported_state_bytes:
            return None
        return self.state_bytes / self.exported_state_bytes - 1.0

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim verify`, with a trainer's own keys after the common ones."""
        predicted = predict(self.plan).hbm
        state = predicted["parameters_bytes"] + predicted["optimizer_bytes"]
        compiled = self.state_bytes is not None
        beside = None
        if self.peak_bytes is not None and self.state_bytes is not None:
            beside = self.peak_bytes - self.state_bytes
        return answer(
            self.against,
            self.ok,
            hbm={
                "predicted_peak_bytes": predicted["peak_bytes"] if compiled else None,
                "compiled_peak_bytes": self.peak_bytes,
            },
            collectives=[one.to_data() for one in self.collectives],
            model=self.plan.model.name,
            machine=self.plan.machine.name,
            mesh={axis.name: axis.size for axis in self.plan.mesh},
            versions=dict(self.versions),
            state={
                "planned_bytes": state if compiled else None,
                "exported_bytes": self.exported_state_bytes,
                "compiled_bytes": self.state_bytes,
                "error": self.state_error,
            },
            temporaries={
                "predicted_bytes": predicted["peak_bytes"] - state if compiled else None,
                "compiled_bytes": beside,
                "allocated_bytes": self.allocated_bytes,
            },
            losses=list(self.losses),
            parameters=[one.to_data() for one in self.parameters],
            not_as_exported=[one.name for one in self.parameters if not one.as_exported],
            missing=list(self.missing),
            differences=list(self.differences),
            remarks=list(self.remarks),
        )


def with_collectives(
    result: TrainerResult, text: str | None, mesh: Mapping[str, int]
) -> TrainerResult:
    """Return a result with the collectives of the compiled program `text`, beside the plan's.

    `mesh` is axis: size, major to minor, with the plan's names. A trainer leaves partitioning to
    the compiler, so the two need not be the same. What goes over the data-center network is in no
    plan's row. A program that cannot be read is a remark.
    """
    if text is None:
        return result.remarked("collectives: the compiled program was not left behind")
    try:
        program = read_hlo(text, {name: size for name, size in mesh.items() if size > 1})
    except HloError as error:
        return result.remarked(f"collectives: the compiled program is not understood: {error}")
    return replace(result, collectives=Comparison(result.plan, program, purposes=False).table)
