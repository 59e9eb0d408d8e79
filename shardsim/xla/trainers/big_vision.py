"""An exported plan in big_vision itself: its ViT compiled for a slice, or its train.py run."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardsim.emit.dialects.big_vision import (
    Export,
    Weight,
    big_vision_export,
    big_vision_text,
)
from shardsim.emit.dialects.options import compiler_options
from shardsim.emit.dialects.tactics import resolve_tactics
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import ShardsimError
from shardsim.plan import Plan, resolve
from shardsim.xla.trainers.collectives import collective_rows
from shardsim.xla.trainers.process import failure, run, trainer_python, versions
from shardsim.xla.trainers.result import Placed, TrainerResult
from shardsim.xla.trainers.tiles import local_shape, tiled_elements

STEPS = 3
_WORKER = str(Path(__file__).with_name("big_vision_worker.py"))
_PACKAGES = ("jax", "flax", "libtpu", "optax")
# Bytes of optimizer state per element of a parameter that Adam's moments take.
_MOMENTS = {"adamw": 8, "adamw-bf16-mu": 6, "momentum": 4, "sgd": 0}


def verify_big_vision(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Compile the exported file for the plan's slice ("full"), or train its tiny copy ("tiny")."""
    if path is None or not (path / "big_vision" / "train.py").is_file():
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
        request.write_text(json.dumps(_request(made, str(file), folder)), encoding="utf-8")
        what = "compile" if scale == "full" else "train"
        code, text = run(
            [interpreter, "-P", _WORKER, what, str(request)],  # its folder holds a big_vision.py
            folder,
            devices=plan.machine.devices if scale == "tiny" else 1,
            path=[str(path)],
        )
        found = versions(interpreter, _PACKAGES, folder)
        program = Path(folder) / "hlo.txt"
        hlo = program.read_text(encoding="utf-8") if program.is_file() else None
    lines = text.strip().splitlines()
    if code or not lines or not lines[-1].startswith("{"):
        raise ShardsimError(f"big_vision did not take the exported file: {failure(text)}")
    return _result(made, json.loads(lines[-1]), found, hlo)


def _request(made: Export, file: str, folder: str) -> dict[str, Any]:
    machine = made.plan.machine
    topology = {"topology_name": machine.name}
    if machine.chip.cores_per_chip > machine.chip.devices_per_chip:
        topology["chip_config_name"] = "megacore"
    return {
        "plan": file,
        "folder": folder,
        "steps": STEPS,
        "topology": topology,
        "batch_axes": plan_data(made.plan)["activations"]["residual"][0],
        "options": compiler_options(made.plan),
    }


def _result(
    made: Export, answer: dict[str, Any], found: dict[str, str], hlo: str | None
) -> TrainerResult:
    sizes = dict(zip(made.mesh.names, made.mesh.sizes, strict=True))
    rows, missing = [], []
    state_bytes = 0.0
    for weight in made.weights:
        exported = _exported(weight, f"params/{weight.path}", made, sizes)
        spec = answer["specs"].get(f"params/{weight.path}")
        if spec is None:
            missing.append(weight.name)
            continue
        rows.append(Placed(weight.name, weight.spec, exported, _full(spec, len(weight.shape))))
        elements = tiled_elements(local_shape(weight.shape, exported, sizes))
        moments = _MOMENTS.get(made.plan.optimizer)
        split = int(resolve(made.plan).data.size) if weight.optimizer_spec != weight.spec else 1
        if moments is not None:
            state_bytes += elements * (4 + moments / split)
    compiled = answer["state_bytes"] is not None
    collectives, unread = collective_rows(made.plan, hlo, sizes) if compiled else ([], ())
    return TrainerResult(
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
        remarks=(*made.remarks, *unread),
        collectives=collectives,
    )


def _exported(
    weight: Weight, path: str, made: Export, sizes: dict[str, int]
) -> tuple[tuple[str, ...], ...]:
    found = resolve_tactics(path, weight.shape, 4, made.strategy, sizes)
    return tuple(map(tuple, found))


def _full(spec: list[list[str]], rank: int) -> tuple[tuple[str, ...], ...]:
    """Return a spec with the dimensions that big_vision leaves out."""
    return tuple(map(tuple, [*spec, *([[]] * (rank - len(spec)))]))
