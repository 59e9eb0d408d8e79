"""A plan's sharding in words and as specs, in the scaling book's notation `[axis_{mesh}]`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, prod
from operator import itemgetter

from shardsim.plan import Plan, resolve
from shardsim.plan.layout import ROLES
from shardsim.plan.plan import Rules
from shardsim.views.table import Column, Table, table

ROLE_WORDS = {
    "data": "data parallel: splits the batch, every member holds the same weights",
    "fsdp": "fully sharded: splits the batch and the weights, which are gathered layer by layer",
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
                places.append(f"{factor} slices over the data-centre network")
            elif factor == torus.length:
                form = "a ring" if torus.wrapped else "a line"
                places.append(f"all {factor} of torus axis {name} ({form})")
            else:
                places.append(f"{factor} of the {torus.length} on torus axis {name}")
        where = f"; it lies on {' and '.join(places)}" if places else ""
        lines.append(f"{axis.name} = {axis.size}: {job}{where}.")
    return lines


def weight_specs(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return (weight, spec, whole shape, shape on one device) of every matrix and table."""
    rows = []
    for tensor in plan.model.tensors:
        if tensor.kind not in ("matrix", "table"):
            continue
        rows.append(
            (
                tensor.name,
                spec_text(tensor.axes, plan.parameters),
                _shape(tensor.shape),
                _shape(_local(plan, tensor.axes, tensor.shape, plan.parameters)),
            )
        )
    return rows


def activation_specs(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return the same of the activations inside a block, for one microbatch."""
    model = plan.model
    batch = max(plan.batch // plan.microbatches, 1)
    wanted: Sequence[tuple[str, tuple[str, ...], tuple[int, ...]]] = (
        ("residual stream", ("batch", "seq", "embed"), (batch, plan.sequence, model.embed)),
        (
            "queries",
            ("batch", "seq", "heads", "head_dim"),
            (batch, plan.sequence, model.heads, model.head_dim),
        ),
        (
            "keys, values",
            ("batch", "seq", "kv_heads", "head_dim"),
            (batch, plan.sequence, model.kv_heads, model.head_dim),
        ),
        ("hidden layer", ("batch", "seq", "mlp"), (batch, plan.sequence, model.mlp)),
    )
    rows = []
    for name, axes, shape in wanted:
        rules = dict(plan.activations)
        if name != "residual stream":
            # Inside the block a tensor axis splits heads and mlp instead of seq or embed.
            inside = set(rules.get("heads", ())) | set(rules.get("mlp", ()))
            for key in ("seq", "embed"):
                rules[key] = tuple(axis for axis in rules.get(key, ()) if axis not in inside)
        rows.append(
            (name, spec_text(axes, rules), _shape(shape), _shape(_local(plan, axes, shape, rules)))
        )
    return rows


def specs(what: str, rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """Return the specs of some arrays (`what` they are) as a table."""
    names = (what, "spec", "whole", "on one device")
    columns = [
        Column(name, name, itemgetter(index), right=index > 1) for index, name in enumerate(names)
    ]
    return table(columns, rows)


def spec_text(axes: Sequence[str], rules: Rules) -> str:
    """Return axes with the mesh axes that split them.

    >>> spec_text(("embed", "mlp"), {"embed": ("fsdp",), "mlp": ("model",)})
    '[embed_{fsdp}, mlp_{model}]'
    """
    parts = []
    for axis in axes:
        split = rules.get(axis, ())
        parts.append(f"{axis}_{{{','.join(split)}}}" if split else axis)
    return f"[{', '.join(parts)}]"


def _local(plan: Plan, axes: Sequence[str], shape: Sequence[int], rules: Rules) -> tuple[int, ...]:
    sizes = []
    for axis, length in zip(axes, shape, strict=True):
        ways = prod(plan.axis(name).size for name in rules.get(axis, ()))
        sizes.append(max(1, ceil(length / ways)))
    return tuple(sizes)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(f"{length:,}" for length in shape)
