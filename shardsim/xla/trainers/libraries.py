"""An exported plan in Flax or Keras: the plan's tiny copy on host devices."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsim.emit.dialects.flax import ACTIVATION_NAMES, flax_code
from shardsim.emit.dialects.keras import keras_code, keras_layout, resolve_layout
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError, ShardsimError
from shardsim.plan import Plan
from shardsim.xla.trainers.process import answered, run, trainer_python, versions
from shardsim.xla.trainers.result import Placed, TrainerResult, spec_of

_HERE = Path(__file__).parent


def verify_flax(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Make every weight of the plan's tiny copy with NNX and with linen, under the rules."""
    plan = tiny_copy(plan, "flax", scale, devices)
    data = plan_data(plan)
    model = data["model"]
    widths = {"wide": model["mlp"], "keys": model["kv_heads"] * model["head_dim"]}
    if model["vocab"]:
        table = data["parameters"].get("token_embedding")
        widths["logits"] = table["shape"][0] if table else model["vocab"]
    tokens = [plan.batch, plan.sequence]
    request = {
        "shapes": {name: entry["shape"] for name, entry in data["parameters"].items()},
        "activations": {
            kind: [*tokens, widths.get(kind, model["embed"])] for kind in ACTIVATION_NAMES
        },
    }
    answer, found = ask("flax", flax_code(plan), request, plan, python)
    rows = [
        placed(f"{name} ({form})", entry["spec"], answer[form][name], plan)
        for name, entry in data["parameters"].items()
        for form in ("nnx", "linen")
    ]
    rows += [
        placed(f"{kind} (activation)", data["activations"][kind], spec, plan)
        for kind, spec in answer["activations"].items()
    ]
    return TrainerResult(against="flax", plan=plan, versions=found, parameters=rows)


def verify_keras(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Train a model of Keras's own layers, with the plan's weights, under the layout."""
    plan = tiny_copy(plan, "keras", scale, devices)
    layout, _ = keras_layout(plan)
    model = plan_data(plan)["model"]
    names = ("embed", "mlp", "heads", "kv_heads", "head_dim", "layers", "vocab", "classes")
    more = ("patch", "image", "channels")
    request = {
        "batch": plan.batch,
        "model": {
            **{name: model[name] for name in (*names, *more)},
            "sequence": plan.sequence,
            "gated": model["gated_mlp"],
            "bias": plan.model.biases.mlp,
        },
    }
    answer, found = ask("keras", keras_code(plan), request, plan, python)
    rows = []
    for path_of, spec in answer["specs"].items():
        wanted = resolve_layout(path_of, len(spec), layout)
        rows.append(placed(path_of, wanted, spec, plan))
    split = {row.name.rsplit("/", 2)[-2] for row in rows if any(row.planned)}
    missing = {"query", "key", "value", "attention_output"} - split if layout else set()
    return TrainerResult(
        against="keras",
        plan=plan,
        versions=found,
        parameters=rows,
        missing=sorted(missing),
        losses=answer["losses"],
    )


def tiny_copy(plan: Plan, trainer: str, scale: str, devices: int) -> Plan:
    """Return the plan's copy for host devices; these trainers are not compiled for a slice."""
    if scale != "tiny":
        raise PlanError(f"verify: against {trainer} is possible with --scale tiny only")
    return shrink(plan, devices)[0]


def ask(
    trainer: str,
    code: str,
    request: dict[str, Any],
    plan: Plan,
    python: str | None,
    suffix: str = ".py",
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Run a worker with the exported file; return its answer and the versions it ran with."""
    interpreter = trainer_python(python)
    with tempfile.TemporaryDirectory(prefix=f"shardsim-{trainer}-") as folder:
        found = versions(interpreter, (trainer, "jax", "haliax"), folder)
        if trainer not in found:
            raise ShardsimError(
                f"{interpreter} has no {trainer}; pip install {trainer}, or give --trainer-python"
            )
        file = Path(folder) / f"exported_plan{suffix}"
        file.write_text(code, encoding="utf-8")
        asked = Path(folder) / "request.json"
        asked.write_text(json.dumps({**request, "plan": str(file)}), encoding="utf-8")
        worker = str(_HERE / f"{trainer}_worker.py")
        exit_code, text = run(
            [interpreter, "-P", worker, str(asked)],
            folder,
            devices=plan.machine.devices,
            more={"KERAS_BACKEND": "jax"},
        )
    return answered(trainer, exit_code, text), found


def placed(name: str, wanted: Spec, found: Spec, plan: Plan) -> Placed:
    """Return the row of one array; mesh axes of size one split nothing."""
    sizes = {axis.name: axis.size for axis in plan.mesh}
    planned = spec_of(wanted, sizes)
    return Placed(name, planned, planned, spec_of(found, sizes))
