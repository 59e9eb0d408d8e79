"""Simulating a whole training step of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from shardsim.cost.predict import Prediction, predict
from shardsim.plan.io import PlanOrPath, as_plan
from shardsim.plan.resolve import resolve
from shardsim.simulate.collective import Span
from shardsim.simulate.outcome import outcome, queued, straight
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.planned import StepEngine
from shardsim.simulate.spare import refuse_broken

PARTS = 10_000  # of a step, as progress counts them


def simulate_plan(
    plan: PlanOrPath,
    *,
    costs: str | None = None,
    implementation: str | None = None,
    unfold: bool = False,
    perturbation: Perturbation | None = None,
    straggler: tuple[int, float] | None = None,
    dead_link: tuple[int, int] | None = None,
    jitter: float | None = None,
    seed: int = 0,
    watch: Callable[[Span], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Simulate one step of `plan`, with `costs` and as `implementation` says (see `predict`).

    `straggler` is (device, slowdown): (0, 1.1) makes device 0 take 10 % longer for everything it
    computes. `dead_link` is (device, port), see `topology.py`. `jitter` is the relative standard
    deviation of each device's time for each layer, drawn from `seed`. `perturbation` takes all of
    these and more; `what_if` reads one from words. `unfold` simulates every chip and every link
    for itself. `watch` is told of every collective and operation of one chip of each class,
    `progress(done, total)` now and then of how far the step is.
    """
    began, plan = time.perf_counter(), as_plan(plan)
    wanted = (perturbation or Perturbation()).also(
        straggler=straggler, dead_link=dead_link, jitter=jitter, seed=seed
    )
    refuse_broken(plan.machine, wanted.broken)
    layout = resolve(plan)
    analytic = predict(plan, layout, costs=costs, implementation=implementation)
    engine = StepEngine(plan.machine, layout, analytic, wanted, unfold, watch)
    if progress is not None:
        whole_s = analytic.step_time_s
        engine.clock.tell = lambda now: progress(round(PARTS * min(now / whole_s, 0.99)), PARTS)
    engine.run()
    if progress is not None:
        progress(PARTS, PARTS)
    step_time_s = engine.step_time_s
    slower = step_time_s / analytic.step_time_s
    parts = dict(analytic.time)
    parts["bubble_s"] = engine.bubble_s() if analytic.time["bubble_s"] > 0 else 0.0
    parts["exposed_comm_s"] = step_time_s - sum(
        parts[name] for name in ("compute_s", "hbm_bound_s", "overhead_s", "bubble_s")
    )
    uses = engine.uses(analytic)
    seen = outcome(engine, analytic.step_time_s, time.perf_counter() - began)
    if wanted == Perturbation():
        seen = replace(seen, queued=queued(analytic, uses))
    return replace(
        analytic,
        fidelity="events",
        step_time_s=step_time_s,
        tokens_per_s_per_chip=analytic.tokens_per_s_per_chip / slower,
        mfu=analytic.mfu / slower,
        hfu=analytic.hfu / slower,
        time=parts,
        collectives=uses,
        warnings=straight(analytic.warnings),
        events=seen,
    )
