"""The published runs that are most like a plan, and how far off predictions of them are."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

from shardsim.cost.mfu import mfu_at_rate
from shardsim.plan.plan import Plan
from shardsim.validate.rows import Run
from shardsim.validate.runs import predictions_of, published_runs


@dataclass(frozen=True, kw_only=True)
class NearestRun:
    """A published run: measured, and predicted as its trainer runs it."""

    run: Run
    tokens_per_s_per_chip: float
    mfu: float  # as PaLM counts it
    predicted_tokens_per_s_per_chip: float

    @property
    def error(self) -> float:
        """The signed error of the predicted rate, a fraction."""
        return self.predicted_tokens_per_s_per_chip / self.tokens_per_s_per_chip - 1.0

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        plan = self.run.plans[0]
        return {
            "id": self.run.id,
            "model": plan.model.name,
            "machine": plan.machine.name,
            "source": self.run.source,
            "tokens_per_s_per_chip": self.tokens_per_s_per_chip,
            "mfu": self.mfu,
            "error": self.error,
        }


def nearest_runs(plan: Plan, many: int = 3) -> list[NearestRun]:
    """Return the published runs most like `plan`, the nearest first.

    Far are another chip, another kind of model, another format of matmuls; then the sizes count by
    their ratios: parameters, chips, tokens per sequence.
    """
    runs = [(run, rate) for run in published_runs() if (rate := run.rate()) is not None]
    runs.sort(key=lambda pair: distance(plan, pair[0].plans[0]))
    return [_measured(run, rate) for run, rate in runs[:many]]


def distance(one: Plan, other: Plan) -> float:
    """Return how unlike two plans are; 0 for the same model, chip, chips and sequence."""
    ratios = (
        one.model.parameters / other.model.parameters,
        one.machine.chips / other.machine.chips,
        one.sequence / other.sequence,
    )
    unlike = (
        (4.0, one.machine.chip.name != other.machine.chip.name),
        (2.0, one.model.family != other.model.family),
        (2.0, bool(one.model.experts) != bool(other.model.experts)),
        (1.0, one.precision.compute != other.precision.compute),
    )
    return sum(abs(log(ratio)) for ratio in ratios) + sum(w for w, differs in unlike if differs)


def _measured(run: Run, rate: float) -> NearestRun:
    predicted, _ = predictions_of(run)
    rates = sorted(
        item.tokens_per_s_per_chip
        for item in ([item for item in predicted if item.fits] or predicted)
    )
    return NearestRun(
        run=run,
        tokens_per_s_per_chip=rate,
        mfu=mfu_at_rate(run.plans[0], rate),
        predicted_tokens_per_s_per_chip=rates[(len(rates) - 1) // 2],
    )
