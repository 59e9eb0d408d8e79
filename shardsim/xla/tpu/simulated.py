"""What the TPU compiler scheduled, simulated event by event on the machine as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardsim.plan import Plan
from shardsim.simulate.compiled import simulate_compiled
from shardsim.simulate.outcome import Outcome, fields_of
from shardsim.xla.replay import replay_of
from shardsim.xla.tpu.compiled import CompiledPrediction, values_of
from shardsim.xla.tpu.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class SimulatedPrediction(CompiledPrediction, Outcome):
    """A compiled prediction from events; `analytic_step_time_s` is the replay in closed form."""

    def to_data(self) -> dict[str, Any]:
        """Return the prediction as plain data, with a `compiled` and an `events` part."""
        return super().to_data() | {"fidelity": "events", "events": self.events_data()}


def simulate_evidence(evidence: Evidence, **options: Any) -> SimulatedPrediction:
    """Simulate a compiled step; `options` are those of `simulate_plan`."""
    plan: Plan = evidence.costed
    found = simulate_compiled(plan.machine, plan, evidence.compiled.schedule, **options)
    replay = replay_of(plan.machine, plan, evidence.compiled, found.replayed)
    values = values_of(evidence, replay) | fields_of(found, Outcome)
    warnings = tuple(text for text in values["warnings"] if "twisted torus is priced" not in text)
    return SimulatedPrediction(**values | {"warnings": warnings}, evidence=evidence)
