"""All that a report needs to know about one plan, computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from shardsim.answers.training import SECONDS_PER_DAY, TRILLION, Training
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.sensitivity import Sensitivity, sensitivity
from shardsim.errors import ShardsimError
from shardsim.machine import Machine, scaled
from shardsim.plan import Plan
from shardsim.planner.found import SearchResult
from shardsim.planner.prices import Prices, price_of
from shardsim.planner.search import search
from shardsim.planner.whatif import Ablation, ablate
from shardsim.validate.runs import Validation, published_runs, validate

RUNNERS_UP = 6
Progress = Callable[[int, int], None]  # told (done, of how many)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One plan with everything that is said about it."""

    plan: Plan
    path: str  # what the commands call it
    page: tuple[str, ...]  # the same of all plans of the report
    prediction: Prediction
    ablations: list[Ablation]
    sensitivities: list[Sensitivity]
    search: SearchResult | None  # the same model, slice and batch searched anew
    validation: Validation
    tokens: float | None  # to train on, or None
    simulation: Any = None  # a `Simulation` of the same plan, where SimPy is installed
    chip_hour_price: float | None = None
    sizes: tuple[Prediction, ...] = ()  # the best plans on half and twice as many chips

    @property
    def tokens_per_day(self) -> float:
        """Tokens that all chips train on in a day."""
        return self.plan.tokens / self.prediction.step_time_s * SECONDS_PER_DAY

    @property
    def days(self) -> float | None:
        """Days that training on `tokens` takes, without failures and pauses."""
        return None if self.tokens is None else self.training.days(self.prediction)

    @property
    def chip_hours(self) -> float | None:
        """Chip-hours of the same."""
        return None if self.tokens is None else self.training.chip_hours(self.prediction)

    @property
    def training(self) -> Training:
        """Training on `tokens`, or a trillion."""
        prices = {"": self.chip_hour_price} if self.chip_hour_price else {}
        return Training(tokens=self.tokens or TRILLION, prices=prices)

    def cost(self, item: Prediction) -> float:
        """Return the price of training on `tokens` (or a trillion) with a plan of this model."""
        return self.training.cost(item) or 0.0

    @property
    def images(self) -> bool:
        """Whether the model trains on images."""
        return self.plan.model.family == "vit"


def headline(study: Study) -> dict[str, Any]:
    """Return the headline numbers of a plan as plain data."""
    item = study.prediction
    return {
        "name": study.plan.name,
        "model": study.plan.model.name,
        "machine": study.plan.machine.name,
        "chips": study.plan.machine.chips,
        "batch": study.plan.batch,
        "mfu": item.mfu,
        "hfu": item.hfu,
        "step_time_s": item.step_time_s,
        "tokens_per_s_per_chip": item.tokens_per_s_per_chip,
        "hbm_peak_bytes": item.hbm["peak_bytes"],
        "hbm_capacity_bytes": item.hbm["capacity_bytes"],
        "fits": item.fits,
        "limited_by": item.limited_by,
        "tokens": study.tokens,
        "days": study.days,
        "chip_hours": study.chip_hours,
        "chip_hour_price": study.chip_hour_price,
        "cost": None if study.tokens is None else study.training.cost(item),
        "events_mfu": study.simulation.mfu if study.simulation else None,
        "best_found_mfu": study.search.best.mfu if study.search else None,
    }


@dataclass(kw_only=True)
class Studies:
    """Makes studies; searches that answer the same question are done once."""

    tokens: float | None = None
    images: float | None = None
    chip_hour_price: float | Prices | None = None
    searched: dict[Any, SearchResult | None] = field(default_factory=dict)
    progress: Progress | None = None  # of a search

    def of(self, plan: Plan, path: str, page: tuple[str, ...], validation: Validation) -> Study:
        """Return the study of one plan."""
        item = predict(plan)
        tokens = self.tokens
        if self.images is not None:
            tokens = self.images * plan.sequence
        return Study(
            plan=plan,
            path=path,
            page=page,
            prediction=item,
            ablations=ablate(plan),
            sensitivities=sensitivity(plan),
            search=self._search(plan),
            validation=validation,
            tokens=tokens,
            simulation=_simulated(plan),
            chip_hour_price=self._price(plan),
            sizes=() if self.chip_hour_price is None else self._sizes(plan),
        )

    def _price(self, plan: Plan) -> float | None:
        price = self.chip_hour_price
        return price_of(price, plan.machine.chip.name) if isinstance(price, Mapping) else price

    def _sizes(self, plan: Plan) -> tuple[Prediction, ...]:
        """Return the best plans for the same question on half and on twice as many chips."""
        found = []
        for machine in (scaled(plan.machine, 0.5), plan.machine, scaled(plan.machine, 2.0)):
            result = None if machine is None else self._search(plan, machine)
            if result is not None:
                found.append(result.best)
        return tuple(found)

    def _search(self, plan: Plan, machine: Machine | None = None) -> SearchResult | None:
        machine = machine or plan.machine
        key = (
            plan.model.name,
            plan.model,
            machine,
            plan.batch,
            plan.sequence,
            plan.optimizer,
            plan.attention,
            plan.precision,
            plan.op_costs,
        )
        if key not in self.searched:
            try:
                result = search(
                    plan.model,
                    machine,
                    plan.batch,
                    sequence=plan.sequence,
                    top=RUNNERS_UP,
                    optimizer=plan.optimizer,
                    attention=plan.attention,
                    precision=plan.precision,
                    costs=plan.op_costs,
                    progress=self.progress,
                )
            except ShardsimError:
                self.searched[key] = None
            else:
                if not result.complete:  # an interrupt ends the report, not one search of it
                    raise KeyboardInterrupt
                self.searched[key] = result if result.predictions else None
        return self.searched[key]


def _simulated(plan: Plan) -> Any:
    """Return the event simulation of a plan; None where it is not installed or cannot run."""
    if find_spec("simpy") is None or find_spec("networkx") is None:
        return None
    from shardsim.simulate import simulate_plan

    try:
        return simulate_plan(plan)
    except ShardsimError:
        return None


def family_range(family: str) -> dict[str, tuple[float, float]]:
    """Return what the published runs of a chip family span: parameters, chips, sequence."""
    runs = [run for run in published_runs() if run.family == family]
    spans: dict[str, list[float]] = {"parameters": [], "chips": [], "sequence": []}
    for run in runs:
        spans["parameters"].append(float(run.model.parameters))
        spans["sequence"].append(float(run.sequence))
        spans["chips"].append(float(run.plans[0].machine.chips))
    return {name: (min(values), max(values)) for name, values in spans.items() if values}


def validated(chips: Collection[str]) -> Validation:
    """Return the predictions of all published runs on some chips beside what was measured."""
    return validate(chips=chips)
