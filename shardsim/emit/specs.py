"""What an exported plan says, as plain data: mesh, roles, and the spec of every array.

A spec lists, for each dimension of an array, the mesh axes that split it, major to minor; it is
what `jax.sharding.PartitionSpec` takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import shardsim
from shardsim.emit.tpu_options import tpu_options
from shardsim.errors import PlanError
from shardsim.graph.arrays import weights_of
from shardsim.graph.build import Part
from shardsim.model import Experts, Model, Tensor
from shardsim.model.blocks import graph_of
from shardsim.ops.project import together
from shardsim.plan import Plan, resolve
from shardsim.plan.layout import Layout
from shardsim.plan.lengths import rows_of
from shardsim.plan.split import ACTIVATIONS, Dimension, activation, named, split

Spec = list[list[str]]

# What the program reads of a model besides its calls.
MODEL_OPTIONS = (
    "name",
    "layers",
    "embed",
    "mlp",
    "heads",
    "head_dim",
    "kv_heads",
    "vocab",
    "tied_embeddings",
    "patch",
    "image",
    "channels",
    "classes",
)
ROWS = 64  # whose sequences the emitted program has; then they come again
HOST = "pinned_host"  # what JAX calls the host's memory
RESIDUALS = ("replicated", "sequence", "embed")
FORMATS = ("f32", "bf16")
# The same where they are not the usual ones.
MORE_OPTIONS = ("width", "frames", "kept", "predicts", "labels", "prompt", "prompt_embed")
# Options of a model that the emitted code has only as they are here.
UNSUPPORTED: dict[str, Any] = {
    "branch": 0,
    "index": None,
}


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return all that an emitted program needs: plan, model, parameters and activations.

    Raises `PlanError` for what has no program.
    """
    layout = resolve(plan)
    _refuse(plan, layout)
    return _data(plan, layout)


def described(plan: Plan) -> dict[str, Any]:
    """Return the same of any plan; where it has no program, `no_program` says why."""
    layout = resolve(plan)
    why = no_program(plan)
    return {"no_program": why, **_data(plan, layout)} if why else _data(plan, layout)


def no_program(plan: Plan) -> str:
    """Return why a plan has no emitted program; nothing if it has one."""
    try:
        _refuse(plan, resolve(plan))
    except PlanError as error:
        return str(error)
    return ""


def _data(plan: Plan, layout: Layout) -> dict[str, Any]:
    names, by_expert = layout.names, bool(layout.spread.by_expert)
    return {
        "plan": {
            "name": plan.name,
            "machine": plan.machine.name,
            "shardsim": shardsim.__version__,
            "execution": plan.execution,
            "mesh": [
                {"name": axis.name, "size": axis.size, "torus": dict(axis.torus)}
                for axis in plan.mesh
            ],
            "torus": {axis.name: axis.length for axis in plan.machine.axes},
            "roles": {role: list(axes) for role, axes in names.items()},
            "gather": list(layout.mesh_axes("gather")),
            "experts_gather": list(layout.mesh_axes("by_expert" if by_expert else "by_embed")),
            "by_expert": by_expert,
            "exchange": plan.experts.exchange,
            "padding": plan.experts.padding,
            "residual": RESIDUALS[int(layout.residual)],
            "batch": plan.batch,
            "sequence": plan.sequence,
            "microbatches": plan.microbatches,
            "accumulation": plan.accumulation,
            "stages": int(layout.pipeline.size),
            "in_turns": bool(layout.in_turns),
            "weights_apart": bool(layout.split_backward),
            "chunks": plan.pipeline_interleave if int(layout.pipeline.size) > 1 else 1,
            "remat": [
                {
                    "layers": group.layers or plan.model.layers,
                    "save": sorted(group.save),
                    "offload": sorted(group.offload),
                }
                for group in plan.remat.groups
            ],
            "keys": plan.context.keys,
            "order": "striped" if layout.striped else "contiguous",
            "keys_overlap": plan.context.overlap,
            "matmul": plan.overlap.matmul,
            "fused": plan.fused_projections,
            "columns": _as_columns(plan, layout),
            "attention": plan.attention,
            "compute": plan.precision.compute,
            "parameters": plan.precision.parameters,
            "reduce": plan.precision.reduce,
            "optimizer": plan.optimizer,
            **({"state_memory": HOST} if plan.offload_optimizer else {}),
            "tpu_options": tpu_options(plan),
            **_rows(plan),
        },
        "model": _model_data(plan.model),
        "calls": calls_of(plan.model, plan.attention),
        "parameters": parameter_table(plan, layout),
        "activations": activation_specs(plan, layout),
        **_parts_data(plan),
    }


def _as_columns(plan: Plan, layout: Layout) -> bool:
    """Return whether products of heads narrower than the matrix unit run over columns: not beside
    a tensor axis, whose collectives then hide less (Llama 3 70B on tpu7x, an axis of 4 without
    rings: operations 12.21 -> 11.81 s, waiting 7.80 -> 8.73).
    """
    chip, alone = plan.machine.chip, int(layout.tensor.size) == int(layout.tensor2.size) == 1
    return chip.heads_as_columns and alone and plan.model.head_dim < chip.mxu_dim


def _rows(plan: Plan) -> dict[str, Any]:
    """Return the sequences of some rows, where rows hold several or padding."""
    if plan.lengths is None:
        return {}
    return {"rows": [list(row) for row in rows_of(plan.lengths, plan.sequence)[:ROWS]]}


def _refuse_lengths(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot do with sequences of many lengths."""
    if plan.lengths is None:
        return
    if plan.lengths.unpadded:
        raise PlanError(
            "lengths.as: export of unpadded is not supported, as arrays have fixed shapes; use "
            "packed"
        )
    if not plan.model.vocab or plan.model.positions not in ("rotary", "none"):
        raise PlanError(
            "lengths: export is supported for decoders with rotary positions or none, whose "
            "attention has only distances; leave lengths out"
        )
    if layout.layered or layout.lockstep:
        raise PlanError(
            "lengths: export of layers that run all microbatches before the next, or that lie on "
            "stages, is not supported; leave lengths out"
        )
    if plan.execution != "explicit" or int(layout.context.size) > 1:
        raise PlanError(
            "lengths: export is supported for execution: explicit without a context axis"
        )
    if plan.machine.chip.kind == "gpu":
        raise PlanError("lengths: export for GPUs is not supported; leave lengths out")


def _parts_data(plan: Plan) -> dict[str, Any]:
    """Return what the program runs before the model's own stack: those that it reads, in order."""
    *read, _ = plan.model.parts
    made = [
        {
            "name": part.name,
            "model": _model_data(part.model),
            "sequence": part.model.sequence,
            "calls": calls_of(part.model, plan.attention),
        }
        for part in read
    ]
    return {"parts": made} if made else {}


def _refuse(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot do."""
    _refuse_lengths(plan, layout)
    for part in plan.model.parts:
        _refuse_part(plan, part.model, layout)
    if len(plan.model.parts) > 1 and plan.execution != "explicit":
        raise PlanError(
            f"execution: export of a model of several stacks as {plan.execution} is not supported; "
            "use explicit"
        )
    _refuse_conditions(plan, layout)
    _refuse_stages(plan, layout)
    _refuse_host(plan, layout)
    _refuse_numbers(plan)
    _refuse_tokens(plan)


def _refuse_stages(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for stages and microbatches that the emitted code does not run so."""
    if int(layout.pipeline.size) > 1 and not layout.lockstep:
        raise PlanError(
            f"pipeline_schedule: export of {plan.pipeline_schedule} is not supported: all stages "
            f"run one program, in ticks; use {plan.pipeline_schedule}-ticks"
        )
    if layout.split_backward and int(layout.tensor2.size) > 1:
        raise PlanError(
            f"pipeline_schedule: export of {plan.pipeline_schedule} beside a second tensor axis is "
            "not supported; use 1f1b-ticks"
        )
    if plan.stage_layers:
        raise PlanError(
            "stage_layers: export of stages that are not alike is not supported: all run one "
            "program; leave it out"
        )
    if plan.execution != "explicit":
        for what, there in (
            ("pipeline stages", int(layout.pipeline.size) > 1),
            (f"accumulation: {plan.accumulation}", plan.accumulation != "repeated"),
        ):
            if there:
                raise PlanError(
                    f"execution: export of {what} as {plan.execution} is not supported; use "
                    "explicit"
                )


def _refuse_numbers(plan: Plan) -> None:
    """Raise `PlanError` for formats, tiles and passes that the emitted code does not have."""
    for key in ("compute", "parameters", "reduce"):
        if (value := getattr(plan.precision, key)) not in FORMATS:
            raise PlanError(
                f"precision.{key}: export of {value} is not supported; choose f32 or bf16"
            )
    for key, value, usual in (
        ("forward_only", plan.forward_only, False),
        ("vocab_tiles", plan.vocab_tiles, 1),
        ("precision.gradients", plan.precision.gradients, ""),
        ("precision.state", plan.precision.state, ""),
        ("precision.master", plan.precision.master, ""),
        ("precision.sparsity", plan.precision.sparsity, ""),
    ):
        if value != usual:
            raise PlanError(f"{key}: export of {value} is not supported; leave it out")


def _refuse_tokens(plan: Plan) -> None:
    """Raise `PlanError` for a sequence that the model's images or positions do not have."""
    model = plan.model
    if model.patch and plan.sequence != model.image_tokens:
        raise PlanError(
            f"sequence: {plan.sequence} is not the {model.image_tokens} tokens that an image of "
            f"{model.name} has; leave the key out, or change the model's image and patch"
        )
    if model.positions == "learned" and plan.sequence > (model.image_tokens or model.sequence):
        raise PlanError(
            f"sequence: {plan.sequence} is longer than the {model.sequence} learned positions of "
            f"{model.name}"
        )


def _refuse_host(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot keep in the host's memory."""
    if not plan.offload_parameters:
        return
    for what, there in (
        ("over pipeline stages", int(layout.pipeline.size) > 1),
        ("of several stacks", len(plan.model.parts) > 1),
        (f"as {plan.execution}", plan.execution != "explicit"),
    ):
        if there:
            raise PlanError(f"offload_parameters: export {what} is not supported; leave it out")


def _refuse_part(plan: Plan, model: Model, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code cannot do of one stack."""
    if model.experts:
        _refuse_experts(plan, model.experts, layout)
    if model.latent and plan.execution != "explicit":
        raise PlanError(
            f"execution: export of latent attention as {plan.execution} is not supported; use "
            "explicit"
        )
    if model.delta and (plan.execution != "explicit" or plan.lengths):
        raise PlanError(
            "model: export of linear attention is supported as explicit, without lengths"
        )
    axes = max(int(layout.tensor2.size), int(layout.pipeline.size))
    if model.lora and (plan.execution != "explicit" or axes > 1):
        raise PlanError(
            "model: export of lora is supported as explicit, without a second tensor axis or stages"
        )
    if model.positions == "relative" and int(layout.pipeline.size) > 1:
        raise PlanError("mesh: export of relative positions over pipeline stages is not supported")
    if model.parallel_norms and plan.activations.get("embed"):
        raise PlanError(
            "rules.activations: export of parallel_norms with a residual stream split along embed "
            "is not supported: the compiler makes the sums of both norms at once; leave embed out"
        )
    for key, usual in UNSUPPORTED.items():
        if (value := getattr(model, key)) != usual:
            shown = "" if usual is None else f": {str(value).lower()}"
            raise PlanError(f"model: export of {key}{shown} is not supported; leave it out")
    tensor, tensor2 = int(layout.tensor.size), int(layout.tensor2.size)
    local = model.kv_heads // min(model.kv_heads, tensor)
    if model.kv_heads % tensor and tensor % model.kv_heads:
        raise PlanError(
            f"mesh: {model.kv_heads} key-value heads and a tensor axis of {tensor}: export needs "
            "one to divide the other"
        )
    if local % tensor2 and tensor2 % local:
        raise PlanError(
            f"mesh: {local} key-value heads on a device and a second tensor axis of {tensor2}: "
            "export needs one to divide the other"
        )


def _refuse_conditions(plan: Plan, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code of conditions, predictions and norms over all
    heads cannot do."""
    model, tensor = plan.model, int(layout.tensor.size)
    if model.sinks and plan.context.keys != "gathered" and int(layout.context.size) > 1:
        raise PlanError(
            f"context.keys: export of sinks with keys {plan.context.keys} is not supported; use "
            "gathered"
        )
    if model.sinks and model.latent:
        raise PlanError("model: export of sinks of latent attention is not supported; use false")
    if model.qk_norm_over == "heads" and (model.kv_heads % tensor or model.latent):
        raise PlanError(
            f"mesh: export of norms over all of {model.kv_heads} key-value heads, which a tensor "
            f"axis of {tensor} does not split, is not supported"
        )
    for what, has in (
        ("modulation", model.modulation != "none"),
        ("predicts", model.predicts > 0),
        ("prompt", model.prompt > 0),
        ("attends", bool(model.attends)),
        ("qk_norm_over: heads", model.qk_norm_over == "heads"),
        ("layer_scale", model.layer_scale),
        ("registers", model.registers > 0),
        ("sinks", model.sinks),
        ("sub_norms", model.sub_norms),
        ("patch_norms", model.patch_norms),
        ("deepnorm", model.deepnorm > 0),
    ):
        if has and plan.execution != "explicit":
            raise PlanError(
                f"execution: export of {what} as {plan.execution} is not supported; use explicit"
            )
        if has and int(layout.tensor2.size) > 1:
            raise PlanError(
                f"mesh: export of {what} over a second tensor axis is not supported; name one axis "
                "for heads or embed in rules.activations"
            )
        if has and int(layout.pipeline.size) > 1:
            raise PlanError(f"mesh: export of {what} over pipeline stages is not supported")


def _refuse_experts(plan: Plan, experts: Experts, layout: Layout) -> None:
    """Raise `PlanError` for what the emitted code of experts cannot do."""
    if plan.execution != "explicit":
        raise PlanError(f"execution: export of experts as {plan.execution} is not supported")
    if int(layout.tensor2.size) > 1:
        raise PlanError("mesh: export of experts over a second tensor axis is not supported")
    if experts.capacity and not experts.group and int(layout.context.size) > 1:
        raise PlanError(
            "experts.group: export of a capacity in sequences that a context axis splits is not "
            "supported; give a group of tokens"
        )
    members = int(layout.expert.size)
    if members > 1 and experts.dropless and plan.experts.padding == 1.0:
        raise PlanError(
            "experts.padding: export with exact counts of tokens is not supported; give room for "
            f"uneven ones ({min(2, members)}; with {members} for all that can come)"
        )


def _model_data(model: Model) -> dict[str, Any]:
    options = {name: getattr(model, name) for name in MODEL_OPTIONS}
    usual = {field.name: field.default for field in fields(model)}
    more = {name: getattr(model, name) for name in MORE_OPTIONS}
    if model.patch and model.images:  # both see the same image
        more["kept"] = model.images.kept
    options |= {name: value for name, value in more.items() if value != usual[name]}
    if model.global_heads:
        options["global_head_dim"] = model.global_heads.head_dim
    # An encoder has one table: where it is not another's, there is no output head beside it.
    return options | ({"tied_embeddings": True} if model.family == "encoder" else {})


def calls_of(model: Model, attention: str) -> dict[str, Any]:
    """Return what the program calls before the layers, in each kind of them, and after.

    Kinds of layers come with their weights. Each of `stacks` lists in `round` how they follow each
    other, and how many `rounds` there are; `shared` are arrays that all of them read besides.
    """
    graph = graph_of(model, attention)
    shared = {
        array.name
        for layer, _ in graph.layers
        for op in layer.part.ops
        for array in op.ins
        if array.handed
    }

    def calls(part: Part) -> list[dict[str, Any]]:
        return [call.to_data() for call in together(part.calls)]

    kinds: list[dict[str, Any]] = []
    stacks = []
    for stack in graph.stacks:
        order: list[int] = []
        for layer in stack.layers:
            weights = [weight.name for weight in weights_of(layer.part.ops)]
            kind = {"calls": calls(layer.part), "weights": weights}
            if kind not in kinds:
                kinds.append(kind)
            order += [kinds.index(kind)] * layer.times
        stacks.append({"round": order, "rounds": stack.rounds})
    return {
        "before": calls(graph.before),
        "layers": kinds,
        "stacks": stacks,
        "after": calls(graph.after),
        **({"shared": sorted(shared)} if shared else {}),
    }


def parameter_table(plan: Plan, layout: Layout) -> dict[str, dict[str, Any]]:
    """Return for every weight its part, axes, shape, specs and how it starts.

    `spec` is where the weight and its gradient lie, `optimizer_spec` where its optimizer state
    does. Weights of the blocks are stacked: their first dimension is the layer. A vocabulary
    that does not divide over the tensor axis is padded up to one that does.
    """
    return dict(parameter_entries(plan, layout))


def parameter_entries(plan: Plan, layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and entry of every weight, as `parameter_table`; kinds of layers share names."""
    for tensor in plan.model.tensors:
        away = plan.offload_parameters and tensor.fetched
        yield tensor.name, _parameter(tensor, layout) | ({"memory": HOST} if away else {})


def _parameter(tensor: Tensor, layout: Layout) -> dict[str, Any]:
    dimensions = split(*named(tensor), layout)
    return {
        "part": tensor.part,
        "axes": list(tensor.axes),
        "shape": [int(item.size) for item in dimensions],
        "spec": _spec(dimensions, layout),
        "optimizer_spec": _spec(split(*named(tensor, state=True), layout), layout),
        "start": _start(tensor),
        **({} if tensor.trained else {"trained": False}),
    }


def _spec(dimensions: Iterable[Dimension], layout: Layout) -> Spec:
    return [item.mesh_axes(layout) for item in dimensions]


def _start(tensor: Tensor) -> float:
    """Return the standard deviation of the first values; scales (0) start at one.

    Matrices start at 1 / sqrt(fan-in), as is usual; the rest at 0.02 (arXiv 2010.11929's code).
    """
    if tensor.name.endswith("_scale"):
        return 0.0
    if tensor.kind != "matrix":
        return 0.02
    out = tensor.axes[-1] == "embed" and tensor.axes[0] != "position"
    shape = tensor.shape[tensor.axes[0] == "expert" :]
    fan_in = math.prod(shape[:-1]) if out else shape[0]
    return 1.0 / math.sqrt(fan_in)


def activation_specs(plan: Plan, layout: Layout) -> dict[str, Spec]:
    """Return the spec of each kind of activation."""
    return {
        name: _spec(activation(name, plan.model, plan.batch, plan.sequence, layout), layout)
        for name in ACTIVATIONS
    }
