"""What a trainer made of an exported plan, beside the plan: the JSON of `shardsim verify`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardsim.cost.predict import predict
from shardsim.plan import Plan

STATE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Placed:
    """One parameter (or its moments): where the plan, the export and the trainer put it.

    Specs name the trainer's mesh axes; `exported` is what our own resolver expects of the rules.
    """

    name: str
    planned: tuple[tuple[str, ...], ...]
    exported: tuple[tuple[str, ...], ...]
    found: tuple[tuple[str, ...], ...]

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
    collectives: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

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
        return {
            "ok": self.ok,
            "against": self.against,
            "loss_rel_error": None,
            "grad_rel_error": None,
            "hbm": {
                "predicted_peak_bytes": predicted["peak_bytes"] if compiled else None,
                "compiled_peak_bytes": self.peak_bytes,
            },
            "compute": {"predicted_s": None, "compiled_s": None},
            "step": {"predicted_s": None, "replayed_s": None, "measured_s": None},
            "collectives": list(self.collectives),
            "unplanned": [],
            "model": self.plan.model.name,
            "machine": self.plan.machine.name,
            "mesh": {axis.name: axis.size for axis in self.plan.mesh},
            "versions": dict(self.versions),
            "state": {
                "planned_bytes": state if compiled else None,
                "exported_bytes": self.exported_state_bytes,
                "compiled_bytes": self.state_bytes,
                "error": self.state_error,
            },
            "temporaries": {
                "predicted_bytes": predicted["peak_bytes"] - state if compiled else None,
                "compiled_bytes": beside,
                "allocated_bytes": self.allocated_bytes,
            },
            "losses": list(self.losses),
            "parameters": [one.to_data() for one in self.parameters],
            "not_as_exported": [one.name for one in self.parameters if not one.as_exported],
            "missing": list(self.missing),
            "differences": list(self.differences),
            "remarks": list(self.remarks),
        }
