"""Simulating a whole training step of a plan."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardsim.cost.predict import Prediction, predict
from shardsim.plan.plan import Plan
from shardsim.plan.resolve import resolve
from shardsim.simulate.collective import Span
from shardsim.simulate.engine import Contention
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.planned import StepEngine
from shardsim.simulate.spare import refuse_broken


@dataclass(frozen=True, kw_only=True)
class Simulation(Prediction):
    """A prediction from events; the fields of `Prediction`, and what only events show."""

    contention: tuple[Contention, ...] = ()
    utilisation: dict[str, float] = field(default_factory=dict)  # busiest link of each port
    link_bytes: dict[str, float] = field(default_factory=dict)  # on that link
    classes: dict[str, int] = field(default_factory=dict)
    events: int = 0
    transfers: int = 0
    seconds: float = 0.0  # of simulating
    analytic_step_time_s: float = 0.0
    perturbation: Perturbation = field(default_factory=Perturbation)
    engine: StepEngine | None = field(default=None, repr=False, compare=False)

    def to_data(self) -> dict[str, Any]:
        """Return the prediction as plain data, with an `events` part."""
        return super().to_data() | {
            "fidelity": "events",
            "events": {
                "analytic_step_time_s": self.analytic_step_time_s,
                "perturbation": dataclasses.asdict(self.perturbation),
                "contention": [dataclasses.asdict(item) for item in self.contention],
                "link_utilisation": dict(self.utilisation),
                "link_bytes": dict(self.link_bytes),
                "classes": dict(self.classes),
                "events": self.events,
                "transfers": self.transfers,
                "seconds": self.seconds,
            },
        }


def simulate_plan(
    plan: Plan,
    *,
    unfold: bool = False,
    perturbation: Perturbation | None = None,
    straggler: tuple[int, float] | None = None,
    dead_link: tuple[int, int] | None = None,
    jitter: float | None = None,
    seed: int = 0,
    watch: Callable[[Span], None] | None = None,
) -> Simulation:
    """Simulate one step of `plan`.

    `straggler` is (device, slowdown): (0, 1.1) makes device 0 take 10 % longer for everything it
    computes. `dead_link` is (device, port), see `topology.py`. `jitter` is the relative standard
    deviation of each device's time for each layer, drawn from `seed`. `perturbation` takes all of
    these and more; `what_if` reads one from words. `unfold` simulates every chip and every link
    for itself. `watch` is told of every collective and operation of one chip of each class.
    """
    began = time.perf_counter()
    wanted = (perturbation or Perturbation()).also(
        straggler=straggler, dead_link=dead_link, jitter=jitter, seed=seed
    )
    refuse_broken(plan.machine, wanted.broken)
    analytic = predict(plan)
    layout = resolve(plan)
    engine = StepEngine(plan.machine, layout, analytic, wanted, unfold, watch)
    engine.run()
    step_time_s = engine.step_time_s
    slower = step_time_s / analytic.step_time_s
    parts = dict(analytic.time)
    parts["bubble_s"] = engine.bubble_s() if analytic.time["bubble_s"] > 0 else 0.0
    parts["exposed_comm_s"] = step_time_s - sum(
        parts[name] for name in ("compute_s", "hbm_bound_s", "overhead_s", "bubble_s")
    )
    values = {item.name: getattr(analytic, item.name) for item in dataclasses.fields(analytic)}
    values |= {
        "step_time_s": step_time_s,
        "tokens_per_s_per_chip": analytic.tokens_per_s_per_chip / slower,
        "mfu": analytic.mfu / slower,
        "hfu": analytic.hfu / slower,
        "time": parts,
        "collectives": engine.uses(analytic),
        "warnings": tuple(
            text for text in analytic.warnings if "twisted torus is priced" not in text
        ),
    }
    utilisation, carried = engine.utilisation()
    return Simulation(
        **values,
        contention=engine.contention(),
        utilisation=utilisation,
        link_bytes=carried,
        classes=engine.classes(),
        events=engine.env.events,
        transfers=engine.links.transfers,
        seconds=time.perf_counter() - began,
        analytic_step_time_s=analytic.step_time_s,
        perturbation=wanted,
        engine=engine,
    )
