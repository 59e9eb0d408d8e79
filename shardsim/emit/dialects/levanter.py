"""`export --to levanter`: the trainer section of a Levanter config.

Levanter's mesh axes are fixed: replica, data and model. Weights take their mesh axes from the
names of their Haliax axes: `fsdp_axis` is split over data, `tensor_parallel_axes` over model; an
array that names both twice keeps the first (levanter 1.2, `trainer.py`; haliax, `partitioning.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardsim.emit.dialects.mesh import mesh_shape
from shardsim.emit.dialects.nearest import differences
from shardsim.emit.dialects.rules import Array, Rule, check_rules, refuse_moments_apart
from shardsim.emit.jax_code import header
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.model import Model, load_model
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
# The query's heads are [kv_head, q_heads_per_group] there, and split by the first.
QUERY_HEADS = {"heads": "kv_head"}
CHECKPOINTING = {"full": True, "none": False}
# What each type of model is beside its sizes, and the sizes that its class starts from.
_LLAMA: Mapping[str, Any] = {
    "gated_mlp": True,
    "activation": "silu",
    "norm": "rmsnorm",
    "positions": "rotary",
}
_SIZES = ("seq_len", "hidden_dim", "intermediate_dim", "num_layers", "num_heads", "num_kv_heads")
MODELS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "llama": (_LLAMA, dict(zip(_SIZES, (2048, 4096, 11008, 32, 32, 32), strict=True))),
    "mistral": (_LLAMA, dict(zip(_SIZES, (8192, 4096, 14336, 32, 32, 8), strict=True))),
    "gpt2": (
        {"positions": "learned", "activation": "gelu", "biases": True, "tied_embeddings": True},
        {"seq_len": 1024, "hidden_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_scale": 4},
    ),
}


@dataclass(frozen=True)
class Layout:
    """Haliax's axis mapping of a plan, and the weights it was checked with."""

    tensor: tuple[str, ...]  # Haliax axes split over "model"
    fsdp: bool  # whether "embed" is split over "data"
    arrays: tuple[Array, ...]
    remarks: tuple[str, ...]

    @property
    def rules(self) -> list[Rule]:
        """Return the mapping as rules; tensor axes come first."""
        rules: list[Rule] = [(axis, ("model",)) for axis in self.tensor]
        return rules + ([("embed", ("data",))] if self.fsdp else [])


def levanter_code(plan: Plan) -> str:
    """Return the YAML that makes Levanter train with `plan`; what it has no model for stays yours:
    sizes, and entries of the vocabulary."""
    _refuse(plan)
    mesh = mesh_shape(plan, TRAINER, several_slices=True)
    layout = resolve(plan)
    roles = {name: role for role, names in layout.names.items() for name in names}
    sizes = {
        ROLES[roles[name]]: (inside, over)
        for name, inside, over in zip(mesh.names, mesh.inside, mesh.slices, strict=True)
        if inside * over > 1
    }
    found = levanter_layout(plan)
    one = (1, 1)
    trainer: dict[str, Any] = {
        "train_batch_size": plan.batch,
        "per_device_parallelism": plan.batch // (_groups(plan) * plan.microbatches),
        "mp": "p=f32,c=bfloat16" if plan.precision.compute == "bf16" else "p=f32,c=f32",
        "model_axis_size": sizes.get("model", one)[0],
        "replica_ici_axis_size": sizes.get("replica", one)[0],
        "replica_dcn_axis_size": sizes.get("replica", one)[1],
        "tensor_parallel_axes": list(found.tensor),
        **({"fsdp_axis": "embed"} if found.fsdp else {}),
    }
    rotary = plan.model.positions == "rotary"  # a table of positions is as long as the model says
    sizes_of = _model_section(replace(plan.model, sequence=plan.sequence) if rotary else plan.model)
    if plan.attention == "unfused":
        sizes_of["use_flash_attention"] = False
    lines = [
        header(plan),
        *[f"# {text}" for text in (*mesh.remarks, *found.remarks)],
        "trainer:",
        *[f"  {key}: {json.dumps(value)}" for key, value in trainer.items()],
        "model:",
        f"  gradient_checkpointing: {json.dumps(CHECKPOINTING[plan.remat.name])}",
        *[f"  {key}: {json.dumps(value)}" for key, value in sizes_of.items()],
    ]
    if "type" in sizes_of:
        lines += ["data:", f"  vocab_size: {plan.model.vocab}"]
    return "\n".join(lines) + "\n"


def _model_section(model: Model) -> dict[str, Any]:
    """Return the type and sizes of a model that Levanter has, or nothing."""
    sizes: dict[str, Any] = {
        "seq_len": model.sequence,
        "hidden_dim": model.embed,
        "intermediate_dim": model.mlp,
        "num_layers": model.layers,
        "num_heads": model.heads,
        "num_kv_heads": model.kv_heads,
    }
    own = ("family", "layers", "embed", "mlp", "heads", "kv_heads", "head_dim", "sequence", "vocab")
    same = {key: getattr(model, key) for key in own} | {"name": "model", "causal": True}
    if model.attention_width != model.embed:
        return {}
    for kind in ("llama", "gpt2"):
        options, more = dict(MODELS[kind][0]), dict[str, Any]()
        if kind == "llama":
            options["tied_embeddings"] = model.tied_embeddings
            more |= {"tie_word_embeddings": True} if model.tied_embeddings else {}
        else:
            if model.mlp % model.embed or model.kv_heads != model.heads:
                continue
            scale = model.mlp // model.embed
            dropped = ("intermediate_dim", "num_kv_heads")
            sizes = {key: size for key, size in sizes.items() if key not in dropped}
            more |= {"mlp_scale": scale} if scale != MODELS[kind][1]["mlp_scale"] else {}
        if not differences(model, load_model({**same, **options})):
            return {"type": kind, **sizes, **more}
    return {}


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
    if plan.remat.only(TRAINER).name not in CHECKPOINTING:
        raise PlanError(
            f"remat: {TRAINER} keeps all or nothing of a layer, not '{plan.remat.name}'; choose "
            "full or none"
        )


def levanter_layout(plan: Plan) -> Layout:
    """Return the axis mapping of a plan.

    Raises `PlanError` if some weight would lie otherwise.
    """
    names = resolve(plan).names
    own = {name: ROLES[role] for role in ROLES for name in names[role]}
    parameters = plan_data(plan)["parameters"]
    refuse_moments_apart(parameters, TRAINER)
    arrays, tensor = [], set()
    for name, entry in parameters.items():
        words = {**AXES, **(QUERY_HEADS if name.startswith("query") else {})}
        axes = [words[axis] for axis in entry["axes"]]
        spec = [[own[axis] for axis in by] for by in entry["spec"][-len(axes) :]]
        arrays.append(Array.of(name, axes, spec))
        tensor |= {axis for axis, by in zip(axes, spec, strict=True) if "model" in by}
    split = int(resolve(plan).tensor.size)
    if "kv_head" in tensor and plan.model.kv_heads % split:
        raise PlanError(
            f"export to {TRAINER}: it splits queries by their {plan.model.kv_heads} key-value "
            f"heads, which {split} devices do not divide"
        )
    made = Layout(tuple(sorted(tensor)), bool(names["fsdp"]), tuple(arrays), ())
    return replace(made, remarks=tuple(check_rules(arrays, made.rules, TRAINER)))
