"""An exported plan in big_vision itself: its ViT compiled for a slice, or its train.py run."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardsim.emit.dialects.big_vision import Export, big_vision_export, big_vision_text
from shardsim.emit.dialects.options import compiler_options
from shardsim.emit.dialects.tactics import resolve_tactics
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import ShardsimError
from shardsim.plan import Plan, resolve
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.xla.tpu.topology import topology_options
from shardsim.xla.trainers.process import answered, run, trainer_python, versions
from shardsim.xla.trainers.result import Placed, TrainerResult, spec_of, with_collectives
from shardsim.xla.trainers.tiles import stored_bytes

STEPS = 3
_WORKER = str(Path(__file__).with_name("big_vision_worker.py"))
_PACKAGES = ("jax", "flax", "libtpu", "optax")


def verify_big_vision(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Compile the exported file for the plan's slice ("full"), or train its tiny copy ("tiny")."""
    if path is None or not os.path.isfile(path / "big_vision" / "train.py"):
        raise ShardsimError("big_vision is no package; give --trainer-path, a checkout of it")
    if scale == "tiny":
        plan = shrink(plan, devices)[0]
        plan = replace(plan, batch=math.lcm(plan.batch, plan.machine.devices))
    made = big_vision_export(plan)
    interpreter = trainer_python(python)
    with tempfile.TemporaryDirectory(prefix="shardsim-big-vision-") as folder:
        file = Path(folder) / "exported_plan.py"
        file.write_text(big_vision_text(plan, made), encoding="utf-8")
        request = Path(folder) / "request.json"
        what = "compile" if scale == "full" else "train"
        asked = _request(made, str(file), folder)
        if what == "compile":
            asked["topology"] = topology_options(plan.machine)
        request.write_text(json.dumps(asked), encoding="utf-8")
        code, text = run(
            [interpreter, "-P", _WORKER, what, str(request)],  # its folder holds a big_vision.py
            folder,
            devices=plan.machine.devices if scale == "tiny" else 1,
            path=[str(path)],
        )
        found = versions(interpreter, _PACKAGES, folder)
        program = Path(folder) / "hlo.txt"
        hlo = program.read_text(encoding="utf-8") if program.is_file() else None
    return _result(made, answered("big_vision", code, text), found, hlo)


def _request(made: Export, file: str, folder: str) -> dict[str, Any]:
    return {
        "plan": file,
        "folder": folder,
        "steps": STEPS,
        "batch_axes": plan_data(made.plan)["activations"]["residual"][0],
        "options": compiler_options(made.plan),
    }


def _result(
    made: Export, answer: dict[str, Any], found: dict[str, str], hlo: str | None
) -> TrainerResult:
    sizes = dict(zip(made.mesh.names, made.mesh.sizes, strict=True))
    rows, missing = [], []
    state_bytes = 0.0
    by_data = int(resolve(made.plan).data.size)
    for weight in made.weights:
        path = f"params/{weight.path}"
        exported = spec_of(resolve_tactics(path, weight.shape, made.strategy, sizes))
        spec = answer["specs"].get(path)
        if spec is None:
            missing.append(weight.name)
            continue
        # big_vision leaves out the last dimensions where they are whole.
        found_spec = spec_of(spec, rank=len(weight.shape))
        rows.append(Placed(weight.name, weight.spec, exported, found_spec))
        optimizer = made.plan.optimizer
        if not OPTIMIZERS[optimizer].factored:
            ways = by_data if weight.optimizer_spec != weight.spec else 1
            state_bytes += stored_bytes(weight.shape, exported, sizes, optimizer, state_ways=ways)
    compiled = answer["state_bytes"] is not None
    result = TrainerResult(
        against="big_vision",
        plan=made.plan,
        versions=found,
        parameters=rows,
        missing=missing,
        state_bytes=answer["state_bytes"],
        exported_state_bytes=state_bytes if compiled and state_bytes else None,
        peak_bytes=answer["peak_bytes"],
        allocated_bytes=answer["allocated_bytes"],
        losses=answer["losses"],
        differences=made.differences,
        remarks=made.remarks,
    )
    return with_collectives(result, hlo, sizes) if compiled else result
