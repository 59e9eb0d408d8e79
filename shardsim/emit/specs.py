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
from shardsim.emit.refusals import refuse
from shardsim.emit.tpu_options import tpu_options
from shardsim.errors import PlanError
from shardsim.graph.arrays import weights_of
from shardsim.graph.build import Part
from shardsim.model import Model, Tensor
from shardsim.model.blocks import graph_of
from shardsim.ops.index import WEIGHTS as DETACHED
from shardsim.ops.project import together
from shardsim.plan import Plan, resolve
from shardsim.plan.layout import Layout, heads_as_columns
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
# The same where they are not the usual ones.
MORE_OPTIONS = ("width", "frames", "kept", "predicts", "labels", "prompt", "prompt_embed")


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return all that an emitted program needs: plan, model, parameters and activations.

    Raises `PlanError` for what has no program.
    """
    layout = resolve(plan)
    refuse(plan, layout)
    return _data(plan, layout)


def described(plan: Plan) -> dict[str, Any]:
    """Return the same of any plan; where it has no program, `no_program` says why."""
    layout = resolve(plan)
    why = no_program(plan)
    return {"no_program": why, **_data(plan, layout)} if why else _data(plan, layout)


def no_program(plan: Plan) -> str:
    """Return why a plan has no emitted program; nothing if it has one."""
    try:
        refuse(plan, resolve(plan))
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
            "columns": bool(heads_as_columns(plan.machine.chip, layout, plan.model.head_dim)),
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


def _rows(plan: Plan) -> dict[str, Any]:
    """Return the sequences of some rows, where rows hold several or padding."""
    if plan.lengths is None:
        return {}
    return {"rows": [list(row) for row in rows_of(plan.lengths, plan.sequence)[:ROWS]]}


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
        **({"detached": True} if tensor.name in DETACHED else {}),
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
