"""The compiled level of fidelity: predictions from what the TPU compiler scheduled."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.cost.replay import BlockTime
from shardsim.errors import ShardsimError
from shardsim.plan import Plan
from shardsim.xla.replay import Replay
from shardsim.xla.tpu.evidence import Evidence
from shardsim.xla.tpu.service import Compilation, TpuCompiler


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What only a compilation shows of a step; `compiled` of a prediction from it."""

    evidence: Evidence = field(repr=False, compare=False)
    blocks: tuple[BlockTime, ...] = field(repr=False)

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data: the `compiled` part of a prediction."""
        planned = self.evidence.predicted
        return {
            "analytic_step_time_s": planned.step_time_s,
            "analytic_peak_bytes": planned.hbm["peak_bytes"],
            "flops": float(self.evidence.compiled.flops),
            "blocks": [
                {"name": block.name, "phase": block.phase, "trips": block.trips}
                | {name: float(value) for name, value in block.time.items()}
                for block in self.blocks
            ],
            "versions": self.evidence.compilation.versions,
        }


def predict_compiled(plan: Plan, compiler: TpuCompiler) -> Prediction:
    """Compile `plan` and replay what came back.

    Raises `ShardsimError` if it does not compile, also for want of HBM.
    """
    return as_replayed(evidence_of(plan, compiler))


def evidence_of(plan: Plan, compiler: TpuCompiler) -> Evidence:
    """Compile `plan`; raises `ShardsimError` if it does not compile, also for want of HBM."""
    made = compiler.compile(plan)
    if not made.ok:
        raise ShardsimError(f"{plan.name or 'the plan'}: {made.problem}{_expected(made)}")
    return Evidence(made)


def as_replayed(evidence: Evidence, replayed: Replay | None = None) -> Prediction:
    """Return the prediction of a compiled step as it was replayed, in closed form if left out.

    Operations, schedule and HBM peak are the compiler's; the other classes of HBM the plan's.
    """
    replayed = replayed or evidence.replayed
    planned = evidence.predicted
    faster = planned.step_time_s / replayed.step_time_s
    return dataclasses.replace(
        planned,
        fidelity="compiled",
        step_time_s=replayed.step_time_s,
        tokens_per_s_per_chip=planned.tokens_per_s_per_chip * faster,
        mfu=replayed.mfu or 0.0,
        hfu=replayed.hfu,
        hbm={**planned.hbm, "peak_bytes": evidence.peak_bytes},
        peak_moment="fullest moment that the compiler found",
        fits=True,
        time=replayed.time,
        collectives=replayed.collectives,
        warnings=(*planned.warnings, *replayed.warnings),
        compiled=Compiled(evidence=evidence, blocks=replayed.blocks),
    )


def _expected(made: Compilation) -> str:
    """Return what was predicted of a plan that did not fit, for the error message."""
    if not made.does_not_fit:
        return ""
    return f"; predicted were {predict(made.plan).hbm['peak_bytes'] / 2**30:.2f} GiB"


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One of the best plans of a search, as the compiler sees it."""

    searched: Prediction
    compiled: Prediction | None
    problem: str  # why there is no compiled one

    def to_data(self) -> dict[str, Any]:
        """Return both predictions' main figures as plain data."""
        return {
            "analytic_step_time_s": self.searched.step_time_s,
            "analytic_mfu": self.searched.mfu,
            "analytic_peak_bytes": self.searched.hbm["peak_bytes"],
            "replayed_step_time_s": self.compiled and self.compiled.step_time_s,
            "replayed_mfu": self.compiled and self.compiled.mfu,
            "compiled_peak_bytes": self.compiled and self.compiled.hbm["peak_bytes"],
            "problem": self.problem or None,
        }


def compile_top(predictions: Sequence[Prediction], compiler: TpuCompiler) -> list[Ranked]:
    """Compile plans that a search found; return them fastest first, failures last.

    An interrupt ends the compiling; what is done by then is returned.
    """
    done: dict[int, Ranked] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for index, made in compiler.compile_all([item.plan for item in predictions]):
            replayed, problem = None, made.problem if not made.ok else ""
            if made.ok:
                try:
                    replayed = as_replayed(Evidence(made))
                except ShardsimError as error:
                    problem = str(error)
            done[index] = Ranked(searched=predictions[index], compiled=replayed, problem=problem)
    return sorted((done[index] for index in sorted(done)), key=_step_time)


def _step_time(item: Ranked) -> float:
    return item.compiled.step_time_s if item.compiled else math.inf
