"""A plan beside what the TPU compiler made of it: HBM, FLOPs, time, every collective."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.plan import Plan, resolve
from shardsim.xla.compare import Comparison, Key, answer
from shardsim.xla.hlo import CompiledProgram, read_hlo
from shardsim.xla.replay import Replay, replay
from shardsim.xla.tpu.rows import as_compiled
from shardsim.xla.tpu.service import Compilation, TpuCompiler

_PLACE = re.compile(r"^train\.py:(\d+)")
LONGEST_LINE = 90  # of code that is shown

Sums = list[float]  # bytes, seconds on their own, seconds that nothing hides


def _nothing() -> Sums:
    return [0.0, 0.0, 0.0]


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
        model, layout = self.plan.model, resolve(self.plan)
        self.compiled: CompiledProgram = read_hlo(
            compilation.text,
            mesh,
            causal=model.causal,
            windows=model.windows,
            chunked=model.chunked,
            striped=bool(layout.striped),
            pieces=bool(layout.spread.passed),
        )
        self.replayed: Replay = replay(self.plan.machine, self.costed, self.compiled)
        self.collectives = Comparison(self.plan, self.compiled)

    @property
    def peak_bytes(self) -> float:
        """HBM of one device at its fullest moment, as compiled."""
        return float(self.compilation.peak_bytes or 0.0)

    @property
    def compute_s(self) -> tuple[float, float]:
        """Seconds of all operations but collectives: predicted, and from the compiler's cycles."""
        parts = ("compute_s", "hbm_bound_s", "overhead_s")
        return self.predicted.operations_s, sum(self.replayed.time[name] for name in parts)

    @property
    def ok(self) -> bool:
        """Whether, in the explicit way, nothing is sent that is not planned; it does fit."""
        return self.plan.execution == "partitioned" or not any(
            one.beyond_bytes > 0 for one in self.collectives.differences
        )

    @cached_property
    def unplanned(self) -> tuple[Unplanned, ...]:
        """What was compiled beyond the plan: collectives and copies, costliest first."""
        rows = [*self._collectives(), *self._copies()]
        return tuple(sorted(rows, key=lambda row: (-row.exposed_s, -row.time_s, row.source)))

    def _collectives(self) -> Iterable[Unplanned]:
        costs = {cost.task.name: cost for cost in self.replayed.collective_costs}
        beyond = {
            one.key: one.beyond_bytes / one.compiled_bytes
            for one in self.collectives.differences
            if one.beyond_bytes > 0
        }
        by_source: dict[tuple[Key, str], Sums] = defaultdict(_nothing)
        for item in self.compiled.collectives:
            key = item.kind, item.mesh_axes, item.purpose
            if (share := beyond.get(key)) is None:
                continue
            instead = f", in place of a planned {item.origin}" if item.origin else ""
            sums = by_source[key, self._shown(item.source) + instead]
            cost = costs[item.name]
            sums[0] += item.sent_bytes * item.count * share
            sums[1] += float(cost.time_s) * share
            sums[2] += float(cost.exposed_s) * share
        for ((kind, axes, _), source), sums in by_source.items():
            yield self._row(kind, axes, sums, source)

    def _copies(self) -> Iterable[Unplanned]:
        times = {cost.task.name: float(cost.time_s) for cost in self.replayed.computes}
        by_source: dict[str, Sums] = defaultdict(_nothing)
        for copy in self.compiled.copies:
            time_s = times.get(copy.name, 0.0)
            sums = by_source[self._shown(copy.source)]
            sums[0] += copy.hbm_bytes * copy.trips
            sums[1] += time_s
            sums[2] += time_s  # nothing hides a copy
        for source, sums in by_source.items():
            yield self._row("copy", (), sums, source)

    def _row(self, kind: str, mesh_axes: tuple[str, ...], sums: Sums, source: str) -> Unplanned:
        moved_bytes, time_s, exposed_s = sums
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
        hbm = self.predicted.hbm
        return answer(
            "tpu",
            self.ok,
            hbm={
                "predicted_peak_bytes": hbm["peak_bytes"],
                "compiled_peak_bytes": self.peak_bytes,
                "capacity_bytes": hbm["capacity_bytes"],
                "predicted_state_bytes": hbm["parameters_bytes"] + hbm["optimizer_bytes"],
                "compiled_state_bytes": float(memory["alias_size"]),
                "compiled_batch_bytes": float(memory["argument_size"] - memory["alias_size"]),
            },
            flops={
                "predicted": float(self.predicted.price.flops),
                "compiled": float(self.compiled.flops),
            },
            compute={"predicted_s": predicted_s, "compiled_s": compiled_s},
            step={
                "predicted_s": self.predicted.step_time_s,
                "replayed_s": self.replayed.step_time_s,
            },
            mfu={"predicted": self.predicted.mfu, "replayed": self.replayed.mfu},
            exposed_comm={
                "predicted_s": self.predicted.time["exposed_comm_s"],
                "replayed_s": self.replayed.time["exposed_comm_s"],
            },
            collectives=[one.to_data() for one in self.collectives.table],
            unplanned=[row.to_data() for row in self.unplanned],
            versions=self.compilation.versions,
            warnings=list(self.replayed.warnings),
        )


def refused(compilation: Compilation) -> dict[str, Any]:
    """Return the JSON of `shardsim verify --against tpu` for a plan that did not compile."""
    predicted = predict(as_compiled(compilation.plan))
    return answer(
        "tpu",
        False,
        problem=compilation.problem,
        hbm={
            "predicted_peak_bytes": predicted.hbm["peak_bytes"],
            "compiled_peak_bytes": compilation.peak_bytes,
            "capacity_bytes": predicted.hbm["capacity_bytes"],
        },
        flops={"predicted": float(predicted.price.flops), "compiled": None},
        compute={"predicted_s": predicted.operations_s},
        step={"predicted_s": predicted.step_time_s},
        mfu={"predicted": predicted.mfu, "replayed": None},
        versions=compilation.versions,
        warnings=list(predicted.warnings),
    )


def verify_tpu(plan: Plan, compiler: TpuCompiler) -> dict[str, Any]:
    """Compile `plan` for its slice; return the JSON of `shardsim verify --against tpu`."""
    made = compiler.compile(plan)
    return Evidence(made).to_data() if made.ok else refused(made)
