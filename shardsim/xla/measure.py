"""Plans of a small ViT, predicted for and timed on the host devices of this machine."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from shardsim.cost.predict import predict
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.machine import Machine, chip_from_text, load_chip_file
from shardsim.plan import Plan
from shardsim.plan.placement import place
from shardsim.validate.measured import rank_correlation
from shardsim.xla.calibrate import calibrate_cpu
from shardsim.xla.host import HostDevices, Progress
from shardsim.xla.host_plans import DEVICES, NO_OVERLAP, measured_plans


def on_host(plan: Plan, machine: Machine) -> Plan:
    """Return `plan` on as many of the host devices that `machine` describes as it needs."""
    host = replace(machine, shape=(plan.machine.devices,))
    sizes = {axis.name: axis.size for axis in plan.mesh}
    return replace(plan, machine=host, mesh=place(sizes, host), overlap=NO_OVERLAP)


def predict_and_time(host: HostDevices, plan: Plan) -> dict[str, Any]:
    """Return one row {plan, predicted_s, measured_s, error, clock_s}.

    Measured is the time of all cores, by the clock the step took `clock_s`, others' work included.
    The error is signed, a fraction.
    """
    predicted_s = predict(plan).step_time_s
    answer = host.ask({"bench": "step", "data": plan_data(plan)})
    measured_s = float(answer["seconds"])
    return {
        "plan": plan.name,
        "predicted_s": predicted_s,
        "measured_s": measured_s,
        "error": predicted_s / measured_s - 1.0,
        "clock_s": float(answer["clock_s"]),
    }


def measure_host(
    machine: Machine, extra: Plan | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Predict and time plans of a small ViT on the host devices that `machine` describes.

    Returns the rows of the plans, the median absolute error, Spearman's rank correlation of
    predicted and measured times, and the row of `extra` (or None), which is in none of these.
    """
    say = progress or (lambda text: None)
    plans = measured_plans(machine)
    rows: list[dict[str, Any]] = []
    with HostDevices(machine.devices, module="shardsim.xla.bench_worker", flags="") as host:
        for plan in plans:
            row = predict_and_time(host, plan)
            rows.append(row)
            times = f"predicted {row['predicted_s']:.4f} s, measured {row['measured_s']:.4f} s"
            say(f"{plan.name}: {times}")
        own = None if extra is None else predict_and_time(host, on_host(extra, machine))
    return {
        "rows": rows,
        "median_abs_error": statistics.median(abs(row["error"]) for row in rows),
        "rank_correlation": rank_correlation(
            [row["predicted_s"] for row in rows], [row["measured_s"] for row in rows]
        ),
        "extra": own,
    }


def measured_result(
    result: dict[str, Any],
    plan: Plan,
    devices: int,
    scale: str,
    machine_file: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return the result of `verify_host` with the times of the same run: `step` and `measured`.

    `machine_file` is what `shardsim calibrate` wrote; without it this machine is measured first.
    """
    if devices != DEVICES:
        raise PlanError(f"verify: --measure times plans for {DEVICES} devices, not {devices}")
    if machine_file is None:
        chip = chip_from_text(calibrate_cpu(devices, progress), "shardsim calibrate")
    else:
        chip = load_chip_file(machine_file)
    if chip.kind != "cpu" or chip.max_slice[0] < devices:
        raise PlanError(f"verify: {machine_file} does not describe {devices} host devices")
    tiny = plan if scale == "full" else shrink(plan, devices)[0]
    found = measure_host(Machine(chip=chip, shape=(devices,)), tiny, progress)
    own = found.pop("extra")
    times = {key: own[key] for key in ("predicted_s", "measured_s")}
    return {**result, "step": {**result["step"], **times}, "measured": found}
