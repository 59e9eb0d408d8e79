"""Why a plan fits or not, what limits it, what would help, and what a measured step says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from shardsim.answers.gap import Cause, causes
from shardsim.answers.host import Instead, instead_of_host
from shardsim.answers.nearest import NearestRun, nearest_runs
from shardsim.answers.trials import Trial, trials
from shardsim.cost.account import Held
from shardsim.cost.mfu import least_step_s, mfu_of, step_at_mfu
from shardsim.cost.predict import LIMITING, Prediction, predict
from shardsim.cost.sensitivity import Sensitivity
from shardsim.cost.words import figure_words
from shardsim.errors import PlanError, expect
from shardsim.model import Accounting
from shardsim.plan.io import PlanOrPath, as_plan
from shardsim.units import show_time

LONGEST_S = 1e7  # of a step that somebody waited for: four months


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured step beside the predicted one."""

    step_time_s: float
    mfu: float  # as PaLM counts it
    ratio: float  # measured over predicted
    at_peak_s: float  # what the predicted program executes, at the chip's peak
    causes: tuple[Cause, ...]  # that which explains most first
    runs: tuple[NearestRun, ...]  # the most like first

    @property
    def usual_error(self) -> float | None:
        """The median absolute error of the predicted rate over `runs`; None where there are none.

        A gap that is smaller says nothing about the run.
        """
        errors = [abs(run.error) for run in self.runs]
        return median(errors) if errors else None


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """What is to know about one plan."""

    prediction: Prediction
    limits: tuple[Sensitivity, ...]  # that whose elasticity is largest first
    trials: tuple[Trial, ...]  # that fit first, cheapest first
    measured: Measured | None = None
    instead_of_host: tuple[Instead, ...] = ()  # of what lies in the host's memory

    @property
    def fits(self) -> bool:
        """Whether the plan fits in HBM."""
        return self.prediction.fits

    @property
    def at_peak(self) -> tuple[Held, ...]:
        """What HBM of a device holds at its peak, largest first."""
        return self.prediction.use.at_peak

    def __repr__(self) -> str:
        best = next((one for one in self.trials if one.has_room), None)
        helps = f"; {best.text} saves {100 * best.gain:.1f} %" if best and best.gain > 0 else ""
        return f"Explanation({self.prediction!r}, limited by {self.prediction.limited_by}{helps})"

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim explain`."""
        item, measured = self.prediction, self.measured
        data: dict[str, Any] = {
            "fits": item.fits,
            "limited_by": [
                {
                    "what": figure_words(limit.figure, item.plan.machine.chip),
                    "figure": limit.figure,
                    "elasticity": limit.elasticity,
                }
                for limit in self.limits
            ],
            "changes": [trial.to_data() for trial in self.trials],
            "gap": [cause.to_data() for cause in measured.causes] if measured else [],
            "at_peak": [{"what": held.name, "bytes": held.size_bytes} for held in self.at_peak],
            "instead_of_host": [one.to_data() for one in self.instead_of_host],
            "prediction": item.to_data(),
        }
        if measured is not None:
            data["measured"] = {
                "step_time_s": measured.step_time_s,
                "mfu": measured.mfu,
                "ratio": measured.ratio,
                "at_peak_s": measured.at_peak_s,
                "usual_error": measured.usual_error,
                "nearest_runs": [run.to_data() for run in measured.runs],
            }
        return data


def explain(
    plan: PlanOrPath,
    *,
    measured_step_s: float | None = None,
    measured_mfu: float | None = None,
    accounting: Accounting = Accounting.PALM,
    costs: str | None = None,
    implementation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Explain one plan: what limits it, and the cheapest single changes.

        explain("vit-22b-published-tp8").trials[0].text  # "mesh.fsdp=512"

    `measured_step_s` (or `measured_mfu`, a fraction counted by `accounting`) is what a real run of
    it took: then also what may explain the gap, and the published runs most like it. `costs` and
    `implementation` are those of `predict`; `progress(done, total)` is told of changes tried.
    Raises `PlanError` for a measurement that is none.
    """
    plan = as_plan(plan)
    item = predict(plan, costs=costs, implementation=implementation)
    for value in (measured_mfu, measured_step_s):
        expect(value, float | int | None, "measured: expected a number")
    if measured_mfu is not None:
        if measured_step_s is not None:
            raise PlanError("measured: give a step or an MFU, not both")
        if not 0 < measured_mfu <= 2:
            raise PlanError(f"measured MFU: expected a fraction above 0, found {measured_mfu:g}")
        measured_step_s = step_at_mfu(plan, measured_mfu, accounting)
    if measured_step_s is not None:
        if not 0 < measured_step_s < LONGEST_S:
            raise PlanError(
                f"measured step: expected seconds above 0 and below {LONGEST_S:g}, found "
                f"{measured_step_s:g}"
            )
        if measured_step_s < (least_s := least_step_s(plan)):
            raise PlanError(
                f"measured: a step of {show_time(measured_step_s)} cannot be: {plan.model.name}'s "
                f"matmuls for {plan.batch:,} x {plan.sequence:,} tokens take {show_time(least_s)} "
                f"at the peak of {plan.machine.name}; is it of this batch, in seconds?"
            )
    return Explanation(
        prediction=item,
        limits=tuple(one for one in item.elasticities if abs(one.elasticity) >= LIMITING),
        trials=tuple(trials(item, progress)),
        measured=None if measured_step_s is None else _measured(item, measured_step_s),
        instead_of_host=instead_of_host(item),
    )


def _measured(item: Prediction, step_s: float) -> Measured:
    return Measured(
        step_time_s=step_s,
        mfu=mfu_of(item.plan, step_s),
        ratio=step_s / item.step_time_s,
        at_peak_s=item.hfu * item.step_time_s,
        causes=tuple(causes(item, step_s)),
        runs=tuple(nearest_runs(item.plan)),
    )
