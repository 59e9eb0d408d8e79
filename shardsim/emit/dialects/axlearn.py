"""`export --to axlearn`: a Python file whose `apply(cfg)` puts the plan into a trainer config.

AXLearn's mesh axes are fixed, and each partition spec is an attribute of a module's config, so
nothing has to be resolved: the specs written here are the ones used (`axlearn/common/attention.py`,
2026-07). Paths are those of its causal language models with a repeated Transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardsim.emit.dialects.mesh import MeshShape, mesh_shape
from shardsim.emit.dialects.rules import Array, compare
from shardsim.emit.jax_code import header, literal
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, resolve

TRAINER = "axlearn"
MESH_AXES = ("pipeline", "data", "expert", "fsdp", "seq", "model")
ROLES: Mapping[str, str] = {"data": "data", "fsdp": "fsdp", "context": "seq", "tensor": "model"}

_LAYER = "model.decoder.transformer.layer"
# Weight -> module and the order of our dimensions in its `param_partition_spec`.
WEIGHTS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "query": (f"{_LAYER}.self_attention.attention.input_linear.layer", (0, 1, 2)),
    # `output_linear` keeps [embed, heads, head_dim].
    "attention_output": (f"{_LAYER}.self_attention.attention.output_linear", (2, 0, 1)),
    "mlp_in": (f"{_LAYER}.feed_forward.linear1", (0, 1)),
    "mlp_out": (f"{_LAYER}.feed_forward.linear2", (0, 1)),
    "token_embedding": ("model.decoder.emb.token_emb", (0, 1)),
    "output_head": ("model.decoder.lm_head", (1, 0)),
}
# Weights that share the module of another and must lie alike.
ALIKE: Mapping[str, str] = {"key": "query", "value": "query", "mlp_gate": "mlp_in"}
# Kind of activation -> modules whose `output_partition_spec` it is.
OUTPUTS: Mapping[str, str] = {
    "wide": f"{_LAYER}.feed_forward.linear1",
    "residual": f"{_LAYER}.feed_forward.linear2",
}
# Tensor kept -> names in axlearn.common.attention.RematRegexSavePatterns.
REMAT: Mapping[str, str] = {
    "qkv": "QKV_PROJ",
    "context": "CONTEXT",
    "attention_output": "O_PROJ",
    "mlp_hidden": "LINEAR1_X",
    "mlp_output": "LINEAR2_X",
}

_CODE = '''

def remat_spec():
    """Return the plan's rematerialisation."""
    if not SAVED and not OFFLOADED:
        return RematSpec(prevent_cse=False, policy=jax_remat_policies.nothing_saveable)
    pattern = {
        name: "|".join(RematRegexSavePatterns[entry].value for entry in entries) or None
        for name, entries in (("save", SAVED), ("offload", OFFLOADED))
    }
    policy = save_and_offload_only_these_names_regex(
        names_which_can_be_saved=pattern["save"],
        names_which_can_be_offloaded=pattern["offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return RematSpec(prevent_cse=False, policy=policy)


def apply(cfg):
    """Put the plan into a trainer config."""
    cfg.mesh_axis_names = MESH_AXES
    cfg.mesh_shape = HybridMeshShape(ici_mesh_shape=INSIDE, dcn_mesh_shape=SLICES)
    cfg.batch_axis_names = BATCH_AXES
    for modifier in (
        PartitionSpecModifier.default_config().set(partition_specs=PARTITION_SPECS),
        RematSpecModifier.default_config().set(
            remat_policies={"model.decoder.transformer.layer": remat_spec()}
        ),
    ):
        cfg = modifier.instantiate()(cfg)
    if MICROBATCHES > 1:
        steps = GradientAccumulationModifier.default_config().set(grad_acc_steps=MICROBATCHES)
        cfg = steps.instantiate()(cfg)
    return cfg
'''
_IMPORTS = """from axlearn.common.attention import RematRegexSavePatterns
from axlearn.common.trainer_config_modifier import (
    GradientAccumulationModifier,
    PartitionSpecModifier,
    RematSpecModifier,
)
from axlearn.common.utils import (
    HybridMeshShape,
    RematSpec,
    save_and_offload_only_these_names_regex,
)
from jax.ad_checkpoint import checkpoint_policies as jax_remat_policies"""


def axlearn_code(plan: Plan) -> str:
    """Return the Python file that makes AXLearn train with `plan`."""
    if plan.model.family != "decoder":
        raise PlanError(f"export to {TRAINER}: only its language models, not {plan.model.name}")
    if "rest" in plan.remat.save | plan.remat.offload or "layer_input" in plan.remat.offload:
        raise PlanError(
            f"remat: {TRAINER} keeps tensors by name, and has none for all that "
            f"'{plan.remat.name}' keeps; choose dots_and_context for the most"
        )
    own = replace(plan, fused_projections=False)
    mesh = _fixed_mesh(own)
    renamed = {
        name: ROLES[role]
        for role, names in resolve(own).names.items()
        for name in names
        if role in ROLES
    }
    data = plan_data(own)
    specs = _specs(data, renamed)
    batch = [renamed[axis] for axis in data["activations"]["residual"][0]]
    values = {
        "MESH_AXES": MESH_AXES,
        "INSIDE": mesh.inside,
        "SLICES": mesh.slices,
        "BATCH_AXES": tuple(batch),
        "PARTITION_SPECS": specs,
        "SAVED": [REMAT[name] for name in sorted(plan.remat.save)],
        "OFFLOADED": [REMAT[name] for name in sorted(plan.remat.offload)],
        "MICROBATCHES": plan.microbatches,
    }
    head = [header(plan), "#", "#   import THIS; cfg = THIS.apply(cfg)   # a SpmdTrainer.Config"]
    head += [f"# {text}" for text in mesh.remarks]
    body = "\n".join(f"{key} = {literal(value)}" for key, value in values.items())
    return "\n".join([*head, "", _IMPORTS, "", body, _CODE]).rstrip() + "\n"


def _fixed_mesh(plan: Plan) -> MeshShape:
    """Return the mesh over all of AXLearn's axes, in their order."""
    layout = resolve(plan)
    mesh = mesh_shape(plan, TRAINER, several_slices=True)
    given: dict[str, tuple[int, int]] = {}
    for name, inside, over in zip(mesh.names, mesh.inside, mesh.slices, strict=True):
        if inside * over == 1:
            continue
        role = next(role for role, names in layout.names.items() if name in names)
        if role not in ROLES or ROLES[role] in given:
            raise PlanError(
                f"export to {TRAINER}: it has no axis for '{name}' beside {', '.join(MESH_AXES)}"
            )
        given[ROLES[role]] = (inside, over)
    order = [axis for axis in MESH_AXES if axis in given]
    if order != list(given):
        raise PlanError(
            f"export to {TRAINER}: its mesh axes come in the order {', '.join(order)}, but the "
            f"plan's in the order {', '.join(given)}, which lies otherwise on the torus"
        )
    return replace(
        mesh,
        names=MESH_AXES,
        inside=tuple(given.get(axis, (1, 1))[0] for axis in MESH_AXES),
        slices=tuple(given.get(axis, (1, 1))[1] for axis in MESH_AXES),
    )


def _specs(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the attributes to set, by module; refuse weights that cannot lie as planned."""

    def own(spec: Spec) -> Spec:
        return [[renamed[axis] for axis in axes] for axes in spec]

    specs: dict[str, dict[str, Any]] = {}
    parameters = data["parameters"]
    for name, entry in parameters.items():
        spec = own(entry["spec"][1:] if entry["part"] == "block" else entry["spec"])
        if name in ALIKE:
            other = own(parameters[ALIKE[name]]["spec"][1:])
            compare(Array.of(name, (None,) * len(spec), spec), other, TRAINER)
        elif name in WEIGHTS:
            module, order = WEIGHTS[name]
            specs.setdefault(module, {})["param_partition_spec"] = _tuple(
                [spec[at] for at in order]
            )
    for kind, module in OUTPUTS.items():
        specs[module]["output_partition_spec"] = _tuple(own(data["activations"][kind]))
    return specs


def _tuple(spec: Sequence[Sequence[str]]) -> tuple[Any, ...]:
    return tuple(axes[0] if len(axes) == 1 else tuple(axes) or None for axes in spec)
