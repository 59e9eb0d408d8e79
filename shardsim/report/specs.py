"""A plan's sharding in words and as specs, in the scaling book's notation `[axis_{mesh}]`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from shardsim.cost.words import links_words
from shardsim.plan import Plan, resolve
from shardsim.plan.layout import ROLES, Layout
from shardsim.plan.split import lengths, split
from shardsim.views.table import Column, Table, table

ROLE_WORDS = {
    "data": "data parallel: splits the batch, every member holds the same weights",
    "fsdp": "fully sharded: splits the batch and the weights, which are gathered layer by layer",
    "expert": "expert parallel: splits the experts and the batch; tokens are sent to their experts",
    "context": "sequence parallel: splits the sequence, in attention too",
    "tensor": "tensor parallel: splits heads and MLP inside each layer",
    "tensor2": "second tensor axis: splits the embed dimension inside each layer",
    "pipeline": "pipeline: splits the layers into stages",
}


def axis_sentences(plan: Plan) -> list[str]:
    """Return one sentence per mesh axis: its size, its job and where it lies."""
    layout = resolve(plan)
    lines = []
    for axis in plan.mesh:
        roles = [role for role in ROLES if axis.name in layout.names.get(role, ())]
        job = ROLE_WORDS[roles[0]] if roles else "does nothing (size 1)"
        places = []
        for torus in (*plan.machine.axes, None):
            name = "dcn" if torus is None else torus.name
            factor = axis.torus.get(name, 1)
            if factor == 1:
                continue
            if torus is None:
                what = "nodes" if plan.machine.chip.interconnect == "switch" else "slices"
                places.append(f"{factor} {what} over {links_words(plan.machine, name)}")
            elif torus.switched:
                places.append(f"{factor} of the {torus.length} chips of a node")
            elif factor == torus.length:
                form = "a ring" if torus.wrapped else "a line"
                places.append(f"all {factor} of {links_words(plan.machine, name)} ({form})")
            else:
                places.append(
                    f"{factor} of the {torus.length} on {links_words(plan.machine, name)}"
                )
        where = f"; it lies on {' and '.join(places)}" if places else ""
        lines.append(f"{axis.name} = {axis.size}: {job}{where}.")
    return lines


def weight_specs(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return (weight, spec, whole shape, shape on one device) of every matrix and table."""
    return [
        _row(tensor.name, tensor.kind, tensor.axes, tensor.shape, resolve(plan))
        for tensor in plan.model.tensors
        if tensor.kind in ("matrix", "table")
    ]


def activation_specs(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return the same of the activations inside a block, for one microbatch."""
    model, layout = plan.model, resolve(plan)
    sizes = lengths(model, max(plan.batch // plan.microbatches, 1), plan.sequence)
    keys: list[tuple[str, tuple[str, ...]]] = [
        ("keys, values", ("batch", "seq", "kv_heads", "head_dim"))
    ]
    if model.latent:
        keys = [
            ("latents of keys, values", ("batch", "seq", "key_value_rank")),
            ("keys", ("batch", "seq", "kv_heads", "head_dim")),
            ("values", ("batch", "seq", "kv_heads", "value_dim")),
        ]
    return [
        _row(name, kind, axes, [sizes[axis] for axis in axes], layout)
        for name, kind, axes in (
            ("residual stream", "residual", ("batch", "seq", "embed")),
            ("queries", "inside", ("batch", "seq", "heads", "head_dim")),
            *((name, "inside", axes) for name, axes in keys),
            ("hidden layer", "inside", ("batch", "seq", "mlp")),
        )
    ]


def _row(
    name: str, kind: str, axes: Sequence[str], shape: Sequence[int], layout: Layout
) -> tuple[str, str, str, str]:
    dimensions = split(kind, axes, shape, layout)
    spec = {item.axis: item.mesh_axes(layout) for item in dimensions}
    local = [int(item.local) for item in dimensions]
    return name, spec_text(spec), _shape(shape), _shape(local)


def specs(what: str, rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """Return the specs of some arrays (`what` they are) as a table."""
    names = (what, "spec", "whole", "on one device")
    columns = [
        Column(name, name, itemgetter(index), right=index > 1) for index, name in enumerate(names)
    ]
    return table(columns, rows)


def spec_text(spec: Mapping[str, Sequence[str]]) -> str:
    """Return axes with the mesh axes that split them.

    >>> spec_text({"embed": ["fsdp"], "mlp": ["model"], "head_dim": []})
    '[embed_{fsdp}, mlp_{model}, head_dim]'
    """
    parts = [f"{axis}_{{{','.join(by)}}}" if by else axis for axis, by in spec.items()]
    return f"[{', '.join(parts)}]"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(f"{length:,}" for length in shape)
