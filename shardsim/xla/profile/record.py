"""Recording a trace of a plan's own train step: `python -m shardsim.xla.profile.record PLAN OUT`.

Into the folder OUT go the XPlane file that `shardsim verify PLAN --profile` reads, the compiled
program (`step.hlo`), and what was run where (`recorded.json`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from shardsim.emit.runtime.host import use_host_devices
from shardsim.errors import FileError, PlanError, ShardsimError
from shardsim.files import write_text
from shardsim.plan import Plan, load_plan

WARM_UP = 3  # steps before the recorded ones: the first compiles what is left and fills the caches


def record(plan: Plan, folder: Path, steps: int = 5) -> Path:
    """Run the plan's step on the devices that there are, record `steps` of them, and return the
    trace's file.

    Steps follow each other without waiting, as in training. Raises `PlanError` where JAX sees fewer
    devices than the plan has.
    """
    import jax

    from shardsim.emit import build_mesh, trainer

    if steps < 1:
        raise PlanError(f"record: at least one step, not {steps}")
    if plan.machine.devices > jax.device_count():
        raise PlanError(
            f"record: the plan needs {plan.machine.devices} devices, JAX sees {jax.device_count()}"
        )
    mesh = build_mesh(plan, jax.devices()[: plan.machine.devices])
    run = trainer(plan, mesh)
    with jax.set_mesh(mesh):
        params, state = run.start(jax.random.key(0))
        batch = run.batch(0)
        step = run.compiled(run.step, params, state, batch)

        def several(count: int) -> float:
            nonlocal params, state
            begun = time.perf_counter()
            for number in range(count):
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    params, state, loss = step(params, state, batch)
            jax.block_until_ready((params, state, loss))
            return (time.perf_counter() - begun) / count

        several(WARM_UP)
        unrecorded_s = several(steps)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # its events are many, and none is of a device
        with jax.profiler.trace(folder, profiler_options=options):
            recorded_s = several(steps)
    device: Any = mesh.devices.flat[0]
    about = {
        "plan": plan.name,
        "machine": plan.machine.name,
        "device": device.device_kind,
        "devices": int(mesh.devices.size),
        "jax": jax.__version__,
        "steps": steps,
        "step_s": unrecorded_s,
        "recorded_step_s": recorded_s,
    }
    write_text(folder / "recorded.json", json.dumps(about, indent=2) + "\n")
    write_text(folder / "step.hlo", step.as_text())
    found = sorted(folder.rglob("*.xplane.pb"))
    if not found:
        raise FileError(f"{folder}: the profiler wrote no xplane.pb")
    return found[-1]


def main() -> None:
    """Record what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m shardsim.xla.profile.record", description=__doc__
    )
    parser.add_argument("plan", help="the name or the file of a plan")
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--steps", type=int, default=5, help="steps to record")
    parser.add_argument("--host-devices", type=int, help="run on so many devices made of the CPU")
    options = parser.parse_args()
    if options.host_devices:
        use_host_devices(options.host_devices)
    try:
        print(record(load_plan(options.plan), options.out, options.steps))
    except ShardsimError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
