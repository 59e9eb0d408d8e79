"""Simulating what a compiler scheduled: the Schedule of `xla.hlo.read_hlo`, on the torus."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from shardsim.cost.costs import Costs
from shardsim.cost.meshlinks import MeshLinks
from shardsim.cost.replay import Replayed, replay_schedule, summed, usual_costs
from shardsim.cost.task_times import TaskTimes
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.plan.plan import Plan
from shardsim.program.schedule import Schedule
from shardsim.simulate.collective import Span
from shardsim.simulate.operations import Spec
from shardsim.simulate.outcome import Outcome, outcome
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.player import TapeEngine
from shardsim.simulate.spare import refuse_broken


@dataclass(frozen=True, kw_only=True)
class CompiledSimulation:
    """A compiled step on the machine as it is. The parts of `replayed.price` are means over all
    chips and add up to the step; `closed` is the replay in closed form, on a healthy machine."""

    events: Outcome
    replayed: Replayed = field(repr=False)
    closed: Replayed = field(repr=False)

    @property
    def step_time_s(self) -> float:
        """Seconds of the step."""
        return float(self.replayed.price.step_time_s)


def simulate_compiled(
    machine: Machine,
    where: Plan | Layout,
    schedule: Schedule,
    *,
    costs: Costs | None = None,
    unfold: bool = False,
    perturbation: Perturbation | None = None,
    watch: Callable[[Span], None] | None = None,
) -> CompiledSimulation:
    """Simulate one step of `schedule`, compiled for the mesh of a plan (or layout) on `machine`.

    Operations take `costs`, the plan's if left out. `unfold` and `watch` are as in
    `simulate_plan`; jitter is of each device's time for each trip through a block of the schedule.
    Operations and copies take what `replay_schedule` says; moves share the links that they cross
    instead of queueing for them.
    """
    began = time.perf_counter()
    wanted = perturbation or Perturbation()
    refuse_broken(machine, wanted.broken)
    costs = costs or usual_costs(machine, where)
    times = TaskTimes(costs, MeshLinks(machine, where))
    closed = replay_schedule(machine, where, schedule, costs)
    engine = TapeEngine(machine, times, schedule, wanted, unfold, watch)
    engine.run()
    seen = outcome(engine, float(closed.price.step_time_s), time.perf_counter() - began)
    replayed = _with_flights(summed(times, schedule, engine.spent), engine)
    return CompiledSimulation(events=seen, replayed=replayed, closed=closed)


def _with_flights(replayed: Replayed, engine: TapeEngine) -> Replayed:
    """Return a replay in which collectives take as long as they were under way."""
    flown: dict[str, float] = defaultdict(float)
    for spec, seconds in engine.flown.items():
        if isinstance(spec, Spec):
            flown[spec.name] += seconds
    price = replayed.price
    price.collectives = [
        dataclasses.replace(cost, time_s=flown.get(cost.task.name, cost.time_s))
        for cost in price.collectives
    ]
    return replayed
