"""`export --to axlearn`: a Python file whose `apply(cfg)` puts the plan into a trainer config.

AXLearn's mesh axes are fixed, and each partition spec is an attribute of a module's config, so
nothing has to be resolved: the specs written here are the ones used (`axlearn/common/attention.py`,
2024-02 to 2026-07). Paths are those of its causal language models with a repeated Transformer. The
file sets the attributes itself: AXLearn's own modifiers of configs changed names between releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardsim.emit.dialects.mesh import MeshShape, mesh_shape
from shardsim.emit.dialects.rules import Array, compare, refuse_moments_apart
from shardsim.emit.jax_code import header, literal
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, resolve

TRAINER = "axlearn"
MESH_AXES = ("pipeline", "data", "expert", "fsdp", "seq", "model")
ROLES: Mapping[str, str] = {"data": "data", "fsdp": "fsdp", "context": "seq", "tensor": "model"}

_LAYER = "model.decoder.transformer.layer"
_INPUT_LINEAR = "attention.input_linear"  # wrapped in a RoFormerQKVLinear for rotary positions
# Weight -> module and the order of our dimensions in its `param_partition_spec`.
WEIGHTS: Mapping[str, tuple[str, tuple[int | None, ...]]] = {
    "query": (f"{_LAYER}.self_attention.{_INPUT_LINEAR}.layer", (0, 1, 2)),
    # `output_linear` keeps [embed, heads, head_dim].
    "attention_output": (f"{_LAYER}.self_attention.attention.output_linear", (2, 0, 1)),
    "mlp_in": (f"{_LAYER}.feed_forward.linear1", (0, 1)),
    "mlp_out": (f"{_LAYER}.feed_forward.linear2", (0, 1)),
    "token_embedding": ("model.decoder.emb.token_emb", (0, 1)),
    # A LearnedPositionalEmbedding has a dimension of one in front.
    "position_embedding": ("model.decoder.emb.pos_emb", (None, 0, 1)),
    "output_head": ("model.decoder.lm_head", (1, 0)),
}
# Weights that share the module of another and must lie alike.
ALIKE: Mapping[str, str] = {"key": "query", "value": "query", "mlp_gate": "mlp_in"}
# Bias -> the weight whose spec it shares, and which of its dimensions.
BIASES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "query_bias": ("query", (1, 2)),
    "key_bias": ("query", (1, 2)),
    "value_bias": ("query", (1, 2)),
    "attention_output_bias": ("attention_output", (0,)),
    "mlp_in_bias": ("mlp_in", (1,)),
    "mlp_gate_bias": ("mlp_in", (1,)),
    "mlp_out_bias": ("mlp_out", (1,)),
}
# Kind of activation -> module and attribute that lay it out.
ACTIVATIONS: Mapping[str, tuple[str, str]] = {
    "wide": (f"{_LAYER}.feed_forward.linear1", "output_partition_spec"),
    "residual": (f"{_LAYER}.feed_forward.linear2", "output_partition_spec"),
    "logits": ("model.decoder", "logits_partition_spec"),
}
# Tensor kept -> names in axlearn.common.attention.RematRegexSavePatterns.
REMAT: Mapping[str, str] = {
    "qkv": "QKV_PROJ",
    "context": "CONTEXT",
    "attention_output": "O_PROJ",
    "mlp_hidden": "LINEAR1_X",
    "mlp_output": "LINEAR2_X",
}
UNNAMED = frozenset({"statistics"})

_CODE = '''

def apply(cfg):
    """Put the plan into a trainer config."""
    cfg.mesh_axis_names = MESH_AXES
    cfg.mesh_shape = {mesh_shape}
    cfg.batch_axis_names = BATCH_AXES
    for path, specs in PARTITION_SPECS.items():
        for attribute, spec in specs.items():
            setattr(module(cfg, path), attribute, spec)
    module(cfg, LAYER).remat_spec = RematSpec(prevent_cse=False, policy={policy})
    return {result}


def module(cfg, path):
    """Return the config of the module at `path`."""
    for name in path.split("."):
        cfg = getattr(cfg, name)
    return cfg
'''
_KEEP_NAMED = '''

def keep_named():
    """Return the policy that keeps what the plan keeps."""
    save, offload = (
        "|".join(RematRegexSavePatterns[entry].value for entry in entries) or None
        for entries in (SAVED, OFFLOADED)
    )
    return save_and_offload_only_these_names_regex(
        names_which_can_be_saved=save,
        names_which_can_be_offloaded=offload,
        offload_src="device",
        offload_dst="pinned_host",
    )
'''
_ACCUMULATE = '''

def accumulate(cfg):
    """Take each step in microbatches."""
    steps = GradientAccumulationModifier.default_config().set(grad_acc_steps=MICROBATCHES)
    return steps.instantiate()(cfg)
'''
_MODIFIERS = "from axlearn.common.trainer_config_modifier import GradientAccumulationModifier"


def axlearn_code(plan: Plan) -> str:
    """Return the Python file that makes AXLearn train with `plan`."""
    if plan.model.family != "decoder":
        raise PlanError(f"export to {TRAINER}: only its language models, not {plan.model.name}")
    remat = plan.remat.only(TRAINER)
    if "rest" in remat.kept or "layer_input" in remat.offload:
        raise PlanError(
            f"remat: {TRAINER} keeps tensors by name, and has none for all that "
            f"'{remat.name}' keeps; choose dots_and_context for the most"
        )
    own = replace(plan, fused_projections=False)
    mesh = _fixed_mesh(own)
    data = plan_data(own)
    renamed = _renamed(own)
    specs, remarks = _specs(own, data)
    values = {
        "MESH_AXES": MESH_AXES,
        "INSIDE": mesh.inside,
        "SLICES": mesh.slices,
        "BATCH_AXES": tuple(renamed[axis] for axis in data["activations"]["residual"][0]),
        "PARTITION_SPECS": specs,
        "LAYER": _LAYER,
        "SAVED": [REMAT[name] for name in sorted(remat.save - UNNAMED)],
        "OFFLOADED": [REMAT[name] for name in sorted(remat.offload - UNNAMED)],
        "MICROBATCHES": plan.microbatches,
    }
    head = [header(plan), "#", "#   import THIS; cfg = THIS.apply(cfg)   # a SpmdTrainer.Config"]
    if remat.kept & UNNAMED:
        remarks.append(f"Sums of norms are computed again: {TRAINER} has no name for them.")
    head += [f"# {text}" for text in (*mesh.remarks, *remarks)]
    body = "\n".join(f"{key} = {literal(value)}" for key, value in values.items())
    imports, code = _code(
        slices=math.prod(mesh.slices) > 1,
        named=bool(values["SAVED"] or values["OFFLOADED"]),
        accumulated=plan.microbatches > 1,
    )
    return "\n".join([*head, "", *imports, "", body, code]).rstrip() + "\n"


def _code(*, slices: bool, named: bool, accumulated: bool) -> tuple[list[str], str]:
    """Return imports and functions. Only what the plan needs: the names differ by release."""
    imports = ["from axlearn.common.base_layer import RematSpec"]
    code = _CODE.format(
        mesh_shape="HybridMeshShape(INSIDE, SLICES)" if slices else "INSIDE",
        policy="keep_named()" if named else "checkpoint_policies.nothing_saveable",
        result="accumulate(cfg)" if accumulated else "cfg",
    )
    used = ["HybridMeshShape"] if slices else []
    if named:
        imports.insert(0, "from axlearn.common.attention import RematRegexSavePatterns")
        used.append("save_and_offload_only_these_names_regex")
        code += _KEEP_NAMED
    if accumulated:
        imports.append(_MODIFIERS)
        code += _ACCUMULATE
    if used:
        imports.append(f"from axlearn.common.utils import {', '.join(used)}")
    if not named:
        imports.append("from jax.ad_checkpoint import checkpoint_policies")
    return imports, code


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


def axlearn_arrays(plan: Plan) -> dict[str, tuple[Array, Spec]]:
    """Return every weight in AXLearn's axes and order of dimensions, and how it lies there.

    Raises `PlanError` if some weight cannot lie as planned.
    """
    own = replace(plan, fused_projections=False)
    renamed, parameters = _renamed(own), plan_data(own)["parameters"]
    refuse_moments_apart(parameters, TRAINER)
    arrays: dict[str, Array] = {}
    for name, entry in parameters.items():
        spec = entry["spec"][1:] if entry["part"] == "block" else entry["spec"]
        order = WEIGHTS[ALIKE.get(name, name)][1] if ALIKE.get(name, name) in WEIGHTS else None
        turned = [[] if at is None else spec[at] for at in order] if order else spec
        own_axes = [[renamed[axis] for axis in axes] for axes in turned]
        arrays[name] = Array.of(name, (None,) * len(turned), own_axes)
    found = {}
    for name, array in arrays.items():
        weight, dimensions = BIASES.get(name, (ALIKE.get(name, name), ()))
        lies: Spec = [[] for _ in array.spec]
        if weight in WEIGHTS:
            lies = [list(axes) for axes in arrays[weight].spec]
        found[name] = (array, [lies[at] for at in dimensions] if dimensions else lies)
    return found


def _renamed(plan: Plan) -> dict[str, str]:
    """Return AXLearn's name of each mesh axis of the plan that it has one for."""
    names = resolve(plan).names
    return {name: ROLES[role] for role in ROLES for name in names[role]}


def _specs(plan: Plan, data: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the attributes to set, by module, and remarks; refuse a sharding that is lost."""
    renamed, arrays = _renamed(plan), axlearn_arrays(plan)
    remarks = [compare(array, lies, TRAINER) for array, lies in arrays.values()]
    rotary = plan.model.positions == "rotary"
    specs: dict[str, dict[str, Any]] = {}
    for name, (module, _) in WEIGHTS.items():
        if name in arrays:
            if rotary:
                module = module.replace(_INPUT_LINEAR, f"{_INPUT_LINEAR}.input_linear")
            specs[module] = {"param_partition_spec": _tuple(arrays[name][0].spec)}
    for kind, (module, attribute) in ACTIVATIONS.items():
        spec = [[renamed[axis] for axis in axes] for axes in data["activations"][kind]]
        specs.setdefault(module, {})[attribute] = _tuple(spec)
    return specs, [remark for remark in remarks if remark]


def _tuple(spec: Sequence[Sequence[str]]) -> tuple[Any, ...]:
    return tuple(axes[0] if len(axes) == 1 else tuple(axes) or None for axes in spec)
