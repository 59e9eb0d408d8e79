"""Verification against the devices that JAX finds here: a GPU, several, a TPU, or the processor."""

from __future__ import annotations

import datetime
import os
from dataclasses import replace
from typing import Any

from shardsim.cost.predict import predict
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.machine.catalog import find_name
from shardsim.plan import Plan
from shardsim.plan.io import plan_to_data
from shardsim.validate.measured import append_result
from shardsim.xla.child import Child
from shardsim.xla.compare import answer
from shardsim.xla.host import Progress

# Relative, of loss and gradients of the tiny copy in float32. Kernels of GPUs and TPUs sum in
# another order than the reference, so errors are larger than between host devices.
LARGEST_ERROR = 1e-4
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MEMORY_SHARE = ".93"  # of a GPU's memory that JAX may take
BUDGET_S = 4.0  # for the timed steps


def verify_device(
    plan: Plan,
    *,
    measure: bool = False,
    scale: str = "full",
    results: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a plan where JAX finds devices; return the JSON of `shardsim verify`.

    Its tiny copy, on as many devices as there are for it, is compared with the unsharded model in
    float32. With `measure` the step itself (`scale` "full"), or that of the tiny copy, is timed,
    and the row goes to the file `results`. Raises `PlanError` where there are too few devices, and
    `ShardsimError` for what goes wrong on them.
    """
    say = progress or (lambda text: None)
    here = _ask({"tiny": None, "full": None, "budget_s": 0.0})["devices"]
    say(f"{here['count']} x {here['kind']} ({here['platform']})")
    if measure and scale == "full" and plan.machine.devices > here["count"]:
        raise PlanError(
            f"verify: the plan needs {plan.machine.devices} devices, but JAX finds "
            f"{here['count']} ({here['kind']}); use --scale tiny, or a plan for {here['count']}"
        )
    tiny, lost = shrink(plan, here["count"])
    for text in lost:
        say(text)
    say("comparing the tiny copy with the unsharded model")
    compared = _ask({"tiny": plan_data(tiny), "full": None, "budget_s": 0.0})["compared"]
    errors = {key: compared[key] for key in ("loss_rel_error", "grad_rel_error")}
    ok = all(error <= LARGEST_ERROR for error in errors.values())
    result = answer("device", ok, **errors, device=here)
    if not measure:
        return result
    timed = plan if scale == "full" else tiny
    say(f"timing {timed.name} on {timed.machine.devices} of them")
    measured = _ask({"tiny": None, "full": plan_data(timed), "budget_s": BUDGET_S})["measured"]
    predicted = predict(timed)
    result |= {
        "step": {
            **result["step"],
            "predicted_s": predicted.step_time_s,
            "measured_s": measured["step_time_s"],
        },
        "measured": {**measured, "predicted_peak_bytes": predicted.hbm["peak_bytes"]},
        "predicted_for": timed.machine.chip.name,
        "measured_on": find_name(here["kind"]) or here["kind"],
    }
    if results:
        append_result(results, _row(timed, here, measured))
        say(f"added to {results}")
    return result


def _row(plan: Plan, here: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a results file."""
    row = {
        "id": f"{here['kind']}: {plan.name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": here["kind"],
        "versions": here["versions"],
        "step_time_s": measured["step_time_s"],
        "plan": plan_to_data(replace(plan, name=plan.name)),
    }
    if measured["peak_bytes"] is not None:
        row["peak_bytes"] = measured["peak_bytes"]
    return row


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Ask one process; it has the devices to itself and ends with its answer."""
    with Child(
        "shardsim.xla.device_worker",
        {} if MEMORY in os.environ else {MEMORY: MEMORY_SHARE},
        called="the process with JAX's devices",
        failing="the plan did not run on JAX's devices",
    ) as child:
        return child.ask(request)
