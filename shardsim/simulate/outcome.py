"""What only the event simulation shows of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shardsim.cost.predict import CollectiveUse, Prediction
from shardsim.errors import PlanError
from shardsim.simulate.engine import CONTENTION_SHARE, Contention, Engine
from shardsim.simulate.perturb import Perturbation


@dataclass(frozen=True, kw_only=True)
class Queued:
    """Collectives that the closed form lets wait for others on their links, and for how much less
    they were waited for as they shared those."""

    collective: str  # "all-gather over fsdp, context"
    less_s: float  # over the step


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of the event simulation tells beside the times of a step."""

    contention: tuple[Contention, ...] = ()
    queued: tuple[Queued, ...] = ()  # in the closed form alone, longest first
    utilisation: dict[str, float] = field(default_factory=dict)  # busiest link of each port
    link_bytes: dict[str, float] = field(default_factory=dict)  # on that link
    classes: dict[str, int] = field(default_factory=dict)
    events: int = 0
    transfers: int = 0
    seconds: float = 0.0  # of simulating
    analytic_step_time_s: float = 0.0
    healthy_step_time_s: float | None = None  # of the same step with nothing slow or broken
    perturbation: Perturbation = field(default_factory=Perturbation)
    engine: Engine | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "engine": None}  # an engine stays in the process where it ran

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data: the `events` part of a prediction."""
        return {
            "analytic_step_time_s": self.analytic_step_time_s,
            "healthy_step_time_s": self.healthy_step_time_s,
            "perturbation": dataclasses.asdict(self.perturbation),
            "perturbed": self.perturbation != Perturbation(),
            "contention": [dataclasses.asdict(item) for item in self.contention],
            "closed_form_queues": [dataclasses.asdict(item) for item in self.queued],
            "link_utilisation": dict(self.utilisation),
            "link_bytes": dict(self.link_bytes),
            "classes": dict(self.classes),
            "events": self.events,
            "transfers": self.transfers,
            "seconds": self.seconds,
        }


def outcome(engine: Engine, analytic_step_time_s: float, seconds: float) -> Outcome:
    """Return what `engine` has seen, in `seconds` of simulating."""
    utilisation, carried = engine.utilisation()
    return Outcome(
        contention=engine.contention(),
        utilisation=utilisation,
        link_bytes=carried,
        classes=engine.classes(),
        events=engine.clock.events,
        transfers=engine.links.transfers,
        seconds=seconds,
        analytic_step_time_s=analytic_step_time_s,
        perturbation=engine.wanted,
        engine=engine,
    )


def queued(analytic: Prediction, uses: Iterable[CollectiveUse]) -> tuple[Queued, ...]:
    """Return which collectives are waited for less, in `uses`, than the closed form says."""
    waited = {(use.kind, use.mesh_axes, use.purpose): use.exposed_s for use in uses}
    rows = [
        Queued(
            collective=f"{use.kind} over {', '.join(use.mesh_axes) or 'the host link'}",
            less_s=use.exposed_s - waited.get((use.kind, use.mesh_axes, use.purpose), 0.0),
        )
        for use in analytic.collectives
    ]
    found = [row for row in rows if row.less_s >= CONTENTION_SHARE * analytic.step_time_s]
    return tuple(sorted(found, key=lambda row: -row.less_s))


def engine_of(item: Prediction) -> Engine:
    """Return the run behind a prediction from events."""
    if not isinstance(item.events, Outcome) or item.events.engine is None:
        raise PlanError(f"{item.plan.name}: predicted at fidelity {item.fidelity}, not from events")
    return item.events.engine


def straight(warnings: Iterable[str]) -> tuple[str, ...]:
    """Return warnings without the one that only holds for closed forms."""
    return tuple(text for text in warnings if "twisted torus is priced" not in text)
