"""What a search finds: the best plans, how many were looked at, and plans out of its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from operator import attrgetter
from typing import Any

import numpy as np

from shardsim.cost.predict import Prediction
from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.plan.layout import ROLES, AxisLayout, Layout, Spread
from shardsim.plan.plan import (
    EXCHANGES,
    MATMUL_OVERLAP,
    Context,
    Overlap,
    Plan,
    Routing,
)
from shardsim.plan.remat import Remat
from shardsim.plan.resolve import mesh_of, rules_of
from shardsim.planner.fixed import FLAGS
from shardsim.planner.rank import Cell
from shardsim.planner.space import Part
from shardsim.program.shapes import Workload


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound on the step time of all plans that fit."""

    step_time_s: float
    why: str


@dataclass(frozen=True, kw_only=True)
class OfSlice:
    """What a search found on one slice: its fastest plan, or None where none fits."""

    machine: Machine
    best: Prediction | None
    searched: int
    fit: int
    smallest_peak_bytes: float


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchResult:
    """The best plans, best first, and how many were looked at."""

    predictions: tuple[Prediction, ...]
    searched: int  # legal plans considered
    fit: int  # of those, fitting in HBM
    priced: int  # of those, priced in full
    seconds: float
    smallest_peak_bytes: float  # the least HBM that any considered plan needs on a device
    bound: Bound | None = None  # of an empty or interrupted search none
    complete: bool = True
    slices: tuple[OfSlice, ...] = ()  # each that was searched, as they were named

    @property
    def pruned(self) -> int:
        """How many plans that fit were not priced: by their bound none is among the best."""
        return self.fit - self.priced

    @property
    def best(self) -> Prediction:
        """The best plan's prediction."""
        if not self.predictions:
            raise PlanError("no plan fits in HBM")
        return self.predictions[0]

    def __repr__(self) -> str:
        best = f", best {self.best!r}" if self.predictions else ""
        return f"SearchResult({self.searched:,} plans considered, {self.fit:,} fit{best})"

    def frame(self) -> Any:
        """Return the plans as a pandas frame (needs pandas), best first."""
        # Reports stand above the planner and need more: looked up only when asked.
        return import_module("shardsim.report").plans_frame(self)

    def _repr_html_(self) -> str:
        # Views stand above: looked up only when a notebook asks.
        return str(import_module("shardsim.views.notebook").shown(self))

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim plan`."""
        from shardsim.plan.io import plan_to_data

        return {
            "plans": [
                {**item.to_data(), "plan": plan_to_data(item.plan)} for item in self.predictions
            ],
            "searched": self.searched,
            "fit": self.fit,
            "pruned": self.pruned,
            "priced": self.priced,
            "bound": None if self.bound is None else asdict(self.bound),
            "seconds": self.seconds,
            "smallest_peak_bytes": self.smallest_peak_bytes,
            "complete": self.complete,
        }


def joined(
    results: Sequence[SearchResult], best: Sequence[Prediction], complete: bool, seconds: float
) -> SearchResult:
    """Return one result of several searches: the sums of what they looked at, and their least
    bound and peak, where all of them are `complete`."""
    bounds = [result.bound for result in results if result.bound is not None]
    return SearchResult(
        predictions=tuple(best),
        searched=sum(result.searched for result in results),
        fit=sum(result.fit for result in results),
        priced=sum(result.priced for result in results),
        bound=min(bounds, key=attrgetter("step_time_s")) if complete and bounds else None,
        seconds=seconds,
        smallest_peak_bytes=min((one.smallest_peak_bytes for one in results), default=np.inf),
        complete=complete,
        slices=tuple(of for result in results for of in result.slices),
    )


def _routing(work: Workload, layout: Layout) -> Routing:
    """Return how tokens reach the experts of a layout."""
    routing = Routing(exchange=EXCHANGES[int(layout.spread.ring)])
    if work.model.experts and work.model.experts.dropless and int(layout.expert.size) > 1:
        return replace(routing, imbalance=work.imbalance, padding=work.padding)
    return routing


def _context(spread: Spread, striped: bool) -> Context:
    """Return how a context axis attends, if there is one."""
    keys = "ring" if spread.passed else "ulysses" if spread.by_head else "gathered"
    keys = "dsp" if spread.switched else keys
    return Context(keys=keys, order="striped" if striped else None)


def plan_at(
    work: Workload, costs: str, machine: Machine, part: Part, cell: Cell, prefetch: bool
) -> Plan:
    """Return one plan of a part of the space as a `Plan`."""
    pair, remat, option = cell
    one = part.take(slice(pair, pair + 1))
    layout = one.layout()

    def scalar(value: Any) -> Any:
        array = np.broadcast_to(value, one.shape)
        return array[0, remat, option].item()

    axes: dict[str, Any] = {
        role: AxisLayout(
            factors=tuple(scalar(item) for item in layout.role(role).factors),
            strides=tuple(scalar(item) for item in layout.role(role).strides),
            slices=scalar(layout.role(role).slices),
        )
        for role in ROLES
    }
    numbers = Layout(
        **axes,
        residual=part.choices.residual,
        optimizer_over_data=scalar(layout.optimizer_over_data),
        context_shards_parameters=part.choices.context_shards_parameters,
        spread=part.choices.spread,
    )
    mesh = mesh_of(numbers, machine)
    parameters, activations, optimizer = rules_of(numbers, mesh)
    staged = int(numbers.pipeline.size) > 1
    sizes = "-".join(f"{axis.name}{axis.size}" for axis in mesh)
    return Plan(
        name=f"{work.model.name}-{machine.name.replace(':', '-').replace('*', 'x')}-{sizes}",
        model=work.model,
        machine=machine,
        batch=work.batch,
        sequence=work.longest if work.lengths else work.sequence,
        lengths=work.lengths,
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        optimizer_rules=optimizer,
        remat=Remat((part.remats[remat],)),
        microbatches=scalar(layout.microbatches),
        overlap=Overlap(
            matmul=MATMUL_OVERLAP[scalar(layout.matmul_overlap)],
            weights=prefetch,
            gradients=bool(scalar(layout.gradients_overlap)),
        ),
        precision=work.precision,
        experts=_routing(work, numbers),
        context=_context(part.choices.spread, bool(one.striped[0])),
        optimizer=work.optimizer,
        **{name: getattr(work, name) for name in FLAGS},
        attention=work.attention,
        fused_projections=work.fused_projections,
        accumulation=part.fixed.accumulation if scalar(layout.microbatches) > 1 else "repeated",
        pipeline_schedule=part.fixed.pipeline_schedule if staged else "1f1b",
        pipeline_interleave=work.pipeline_interleave if staged else 1,
        op_costs=costs,
    )
