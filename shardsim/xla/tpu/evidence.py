"""A plan beside what the TPU compiler made of it: HBM, FLOPs, time, every collective."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan
from shardsim.xla.compare import UNPLANNED, Key, compiled, differences, key_of, planned, table
from shardsim.xla.hlo import CompiledProgram, read_hlo
from shardsim.xla.replay import Replay, replay
from shardsim.xla.tpu.rows import as_compiled
from shardsim.xla.tpu.service import Compilation, TpuCompiler

_PLACE = re.compile(r"^train\.py:(\d+)")
LONGEST_LINE = 90  # of code that is shown


@dataclass(frozen=True, kw_only=True)
class Unplanned:
    """Something compiled that the plan does not have, over a whole step of one device."""

    kind: str  # of a collective, or "copy" for laying an array out anew
    mesh_axes: tuple[str, ...]
    bytes: float  # sent beyond the plan, or copied
    time_s: float  # on its own
    exposed_s: float  # of that, what nothing hides
    mfu_points: float  # points of 100 that the step would gain without what is exposed
    source: str  # where in the emitted program

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "mesh_axes": list(self.mesh_axes)}


class Evidence:
    """One plan and its compilation, which must have succeeded."""

    def __init__(self, compilation: Compilation) -> None:
        assert compilation.text is not None
        self.compilation = compilation
        self.plan: Plan = compilation.plan
        mesh = {axis.name: axis.size for axis in self.plan.mesh}
        self.costed: Plan = as_compiled(self.plan)
        self.predicted: Prediction = predict(self.costed)
        model = self.plan.model
        self.compiled: CompiledProgram = read_hlo(
            compilation.text, mesh, causal=model.causal, windows=model.windows
        )
        self.replayed: Replay = replay(self.plan.machine, self.costed, self.compiled)
        self.planned_sums = planned(self.plan)
        self.compiled_sums = compiled(self.compiled.collectives)

    @property
    def peak_bytes(self) -> float:
        """HBM of one device at its fullest moment, as compiled."""
        return float(self.compilation.peak_bytes or 0.0)

    @property
    def compute_s(self) -> tuple[float, float]:
        """Seconds of all operations but collectives: predicted, and from the compiler's cycles."""
        parts = ("compute_s", "hbm_bound_s", "overhead_s")
        return self.predicted.operations_s, sum(self.replayed.time[name] for name in parts)

    @cached_property
    def differences(self) -> dict[Key, tuple[float, float]]:
        """Planned and compiled bytes where they differ, unless no plan covers the purpose."""
        covered = {key.purpose for key in self.planned_sums}
        return {
            key: sides
            for key, sides in differences(self.planned_sums, self.compiled_sums).items()
            if key.purpose in covered or key.purpose not in UNPLANNED
        }

    @property
    def ok(self) -> bool:
        """Whether, in the explicit way, nothing is sent that is not planned; it does fit."""
        return self.plan.execution == "partitioned" or not any(
            got > wanted for wanted, got in self.differences.values()
        )

    @cached_property
    def unplanned(self) -> tuple[Unplanned, ...]:
        """What was compiled beyond the plan: collectives and copies, costliest first."""
        rows = [*self._collectives(), *self._copies()]
        return tuple(sorted(rows, key=lambda row: (-row.exposed_s, -row.time_s, row.source)))

    def _collectives(self) -> Iterable[Unplanned]:
        costs = {cost.task.name: cost for cost in self.replayed.collective_costs}
        beyond = {key: (w, got) for key, (w, got) in self.differences.items() if got > w}
        by_source: dict[tuple[Key, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for entry in self.compiled.collectives:
            key = key_of(entry)
            if key not in beyond:
                continue
            wanted, got = beyond[key]
            share = 1.0 - wanted / got
            instead = f", in place of a planned {entry.origin}" if entry.origin else ""
            sums = by_source[key, self._shown(entry.source) + instead]
            cost = costs[entry.name]
            sums[0] += entry.sent_bytes * entry.count * share
            sums[1] += float(cost.time_s) * share
            sums[2] += float(cost.exposed_s) * share
        for (key, source), (sent_bytes, time_s, exposed_s) in by_source.items():
            yield self._row(key.kind, key.mesh_axes, sent_bytes, time_s, exposed_s, source)

    def _copies(self) -> Iterable[Unplanned]:
        times = {cost.task.name: float(cost.time_s) for cost in self.replayed.computes}
        by_source: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for copy in self.compiled.copies:
            sums = by_source[self._shown(copy.source)]
            sums[0] += copy.hbm_bytes * copy.trips
            sums[1] += times.get(copy.name, 0.0)
        for source, (copied_bytes, time_s) in by_source.items():
            yield self._row("copy", (), copied_bytes, time_s, time_s, source)

    def _row(
        self,
        kind: str,
        mesh_axes: tuple[str, ...],
        moved_bytes: float,
        time_s: float,
        exposed_s: float,
        source: str,
    ) -> Unplanned:
        step_s, mfu = self.replayed.step_time_s, self.replayed.mfu or 0.0
        return Unplanned(
            kind=kind,
            mesh_axes=mesh_axes,
            bytes=moved_bytes,
            time_s=time_s,
            exposed_s=exposed_s,
            mfu_points=100.0 * mfu * exposed_s / max(step_s - exposed_s, 1e-12),
            source=source,
        )

    def _shown(self, source: str) -> str:
        """Return a place in the emitted program with the line that stands there."""
        place = _PLACE.match(source)
        if place is None:
            return source or "the compiler's own"
        line = self.compilation.code.splitlines()[int(place[1]) - 1].strip()
        return f"{source}: {line[:LONGEST_LINE]}"

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim verify --against tpu`."""
        memory = self.compilation.result["memory"]
        predicted_s, compiled_s = self.compute_s
        state_bytes = self.predicted.hbm["parameters_bytes"] + self.predicted.hbm["optimizer_bytes"]
        return {
            "ok": self.ok,
            "against": "tpu",
            "loss_rel_error": None,
            "grad_rel_error": None,
            "hbm": {
                "predicted_peak_bytes": self.predicted.hbm["peak_bytes"],
                "compiled_peak_bytes": self.peak_bytes,
                "capacity_bytes": self.predicted.hbm["capacity_bytes"],
                "predicted_state_bytes": state_bytes,
                "compiled_state_bytes": float(memory["alias_size"]),
                "compiled_batch_bytes": float(memory["argument_size"] - memory["alias_size"]),
            },
            "flops": {
                "predicted": float(self.predicted.price.flops),
                "compiled": float(self.compiled.flops),
            },
            "compute": {"predicted_s": predicted_s, "compiled_s": compiled_s},
            "step": {
                "predicted_s": self.predicted.step_time_s,
                "replayed_s": self.replayed.step_time_s,
                "measured_s": None,
            },
            "mfu": {"predicted": self.predicted.mfu, "replayed": self.replayed.mfu},
            "exposed_comm": {
                "predicted_s": self.predicted.time["exposed_comm_s"],
                "replayed_s": self.replayed.time["exposed_comm_s"],
            },
            "collectives": table(self.planned_sums, self.compiled_sums),
            "unplanned": [row.to_data() for row in self.unplanned],
            "versions": self.compilation.versions,
            "warnings": list(self.replayed.warnings),
        }


def refused(compilation: Compilation) -> dict[str, Any]:
    """Return the JSON of `shardsim verify --against tpu` for a plan that did not compile."""
    predicted = predict(as_compiled(compilation.plan))
    return {
        "ok": False,
        "against": "tpu",
        "problem": compilation.problem,
        "loss_rel_error": None,
        "grad_rel_error": None,
        "hbm": {
            "predicted_peak_bytes": predicted.hbm["peak_bytes"],
            "compiled_peak_bytes": compilation.peak_bytes,
            "capacity_bytes": predicted.hbm["capacity_bytes"],
        },
        "flops": {"predicted": float(predicted.price.flops), "compiled": None},
        "compute": {"predicted_s": predicted.operations_s, "compiled_s": None},
        "step": {
            "predicted_s": predicted.step_time_s,
            "replayed_s": None,
            "measured_s": None,
        },
        "mfu": {"predicted": predicted.mfu, "replayed": None},
        "collectives": [],
        "unplanned": [],
        "versions": compilation.versions,
        "warnings": list(predicted.warnings),
    }


def verify_tpu(plan: Plan, compiler: TpuCompiler) -> dict[str, Any]:
    """Compile `plan` for its slice; return the JSON of `shardsim verify --against tpu`."""
    made = compiler.compile(plan)
    return Evidence(made).to_data() if made.ok else refused(made)
