"""What the TPU compiler scheduled, simulated event by event on the machine as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardsim.cost.predict import Prediction
from shardsim.simulate.compiled import simulate_compiled
from shardsim.simulate.outcome import straight
from shardsim.xla.replay import replay_of
from shardsim.xla.tpu.compiled import as_replayed
from shardsim.xla.tpu.evidence import Evidence


def simulate_evidence(evidence: Evidence, **options: Any) -> Prediction:
    """Simulate a compiled step; `options` are those of `simulate_plan`.

    `analytic_step_time_s` of its `events` is the replay in closed form.
    """
    plan = evidence.costed
    found = simulate_compiled(plan.machine, plan, evidence.compiled.schedule, **options)
    item = as_replayed(evidence, replay_of(plan.machine, plan, evidence.compiled, found.replayed))
    return replace(item, fidelity="events", warnings=straight(item.warnings), events=found.events)
