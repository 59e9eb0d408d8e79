"""`export --to levanter`: the trainer section of a Levanter config.

Levanter's mesh axes are fixed: replica, data and model. Weights take their mesh axes from the
names of their Haliax axes: `fsdp_axis` is split over data, `tensor_parallel_axes` over model; an
array that names both twice keeps the first (levanter 1.2, `trainer.py`; haliax, `partitioning.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shardsim.emit.dialects.mesh import mesh_shape
from shardsim.emit.dialects.rules import Array, check_rules
from shardsim.emit.jax_code import header
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, resolve

TRAINER = "levanter"
ROLES: Mapping[str, str] = {"data": "replica", "fsdp": "data", "tensor": "model"}
ORDER = ("replica", "data", "model")
# Our axis -> Haliax's in its language models (levanter/models/llama.py).
AXES: Mapping[str, str] = {
    "embed": "embed",
    "heads": "heads",
    "kv_heads": "kv_head",
    "head_dim": "head_size",
    "mlp": "mlp",
    "vocab": "vocab",
    "norm": "embed",
    "position": "position",
}
CHECKPOINTING = {"full": True, "none": False}


def levanter_code(plan: Plan) -> str:
    """Return the YAML that makes Levanter train with `plan`; the model section stays yours."""
    _refuse(plan)
    mesh = mesh_shape(plan, TRAINER, several_slices=True)
    layout = resolve(plan)
    roles = {name: role for role, names in layout.names.items() for name in names}
    sizes = {
        ROLES[roles[name]]: (inside, over)
        for name, inside, over in zip(mesh.names, mesh.inside, mesh.slices, strict=True)
        if inside * over > 1
    }
    data = plan_data(plan)
    tensor = sorted(
        {
            AXES[axis]
            for entry in data["parameters"].values()
            for axis, by in zip(entry["axes"], entry["spec"][-len(entry["axes"]) :], strict=True)
            if set(by) & set(layout.names["tensor"])
        }
    )
    sharded = any(layout.names["fsdp"])
    _check(data, layout.names, tensor, sharded)
    one = (1, 1)
    trainer: dict[str, Any] = {
        "train_batch_size": plan.batch,
        "per_device_parallelism": plan.batch // (_groups(plan) * plan.microbatches),
        "mp": "p=f32,c=bfloat16" if plan.precision.compute == "bf16" else "p=f32,c=f32",
        "model_axis_size": sizes.get("model", one)[0],
        "replica_ici_axis_size": sizes.get("replica", one)[0],
        "replica_dcn_axis_size": sizes.get("replica", one)[1],
        "tensor_parallel_axes": tensor,
        **({"fsdp_axis": "embed"} if sharded else {}),
    }
    lines = [
        header(plan),
        *[f"# {text}" for text in mesh.remarks],
        "trainer:",
        *[f"  {key}: {json.dumps(value)}" for key, value in trainer.items()],
        "model:",
        f"  gradient_checkpointing: {json.dumps(CHECKPOINTING[plan.remat.name])}",
    ]
    return "\n".join(lines) + "\n"


def _groups(plan: Plan) -> int:
    layout = resolve(plan)
    return int(layout.data.size * layout.fsdp.size)


def _refuse(plan: Plan) -> None:
    """Raise `PlanError` for what Levanter's fixed axes and switches cannot hold."""
    layout = resolve(plan)
    if plan.model.family != "decoder":
        raise PlanError(f"export to {TRAINER}: only its language models, not {plan.model.name}")
    order = []
    for axis in plan.mesh:
        role = next((role for role, names in layout.names.items() if axis.name in names), None)
        if axis.size == 1 or role is None:
            continue
        if role not in ROLES or ROLES[role] in order:
            raise PlanError(
                f"export to {TRAINER}: it has no axis for '{axis.name}' beside {', '.join(ORDER)}"
            )
        if axis.torus.get("dcn", 1) > 1 and role != "data":
            raise PlanError(
                f"export to {TRAINER}: only its replica axis goes over slices, not '{axis.name}'"
            )
        order.append(ROLES[role])
    if order != [name for name in ORDER if name in order]:
        raise PlanError(
            f"export to {TRAINER}: its mesh axes come in the order {', '.join(ORDER)}, and the "
            "plan's lie otherwise on the torus"
        )
    if plan.remat.name not in CHECKPOINTING:
        raise PlanError(
            f"remat: {TRAINER} keeps all or nothing of a layer, not '{plan.remat.name}'; choose "
            "full or none"
        )


def _check(
    data: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], tensor: list[str], sharded: bool
) -> None:
    """Raise `PlanError` if some weight would lie otherwise: tensor axes come first in Haliax."""
    own = {name: ROLES[role] for role in ROLES for name in names[role]}
    rules = [(axis, ("model",)) for axis in tensor] + ([("embed", ("data",))] if sharded else [])
    arrays = []
    for name, entry in data["parameters"].items():
        axes = [AXES[axis] for axis in entry["axes"]]
        spec = entry["spec"][-len(axes) :]
        arrays.append(Array.of(name, axes, [[own[axis] for axis in by] for by in spec]))
    check_rules(arrays, rules, TRAINER)
