"""`export --to maxtext`: one YAML file on top of MaxText's base.yml.

Here is what the file says of the mesh, the rules in an order that resolves to the plan's specs,
and the model: where MaxText has no such, the nearest, with what differs.
`maxtext_file.py` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shardsim.emit.dialects import maxtext_tables as tables
from shardsim.emit.dialects.mesh import MeshShape, mesh_shape, rename_axes
from shardsim.emit.dialects.nearest import Nearest, nearest_model, reduced
from shardsim.emit.dialects.rules import Array, Rule, check_rules, order_rules
from shardsim.emit.dialects.vocabulary import Vocabulary, installed, table
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError, nearest
from shardsim.plan import Plan, resolve

TRAINER = "maxtext"
_VOCAB = 1024  # of a model that stands in for one without tokens


@dataclass(frozen=True)
class Export:
    """What goes into the file: the plan with MaxText's model, mesh, rules and remarks."""

    plan: Plan
    block: str
    mesh: MeshShape
    renamed: Mapping[str, str]  # the plan's mesh axis -> MaxText's
    rules: tuple[Rule, ...]
    arrays: tuple[Array, ...]
    differences: tuple[str, ...]
    remarks: tuple[str, ...]
    vocabulary: Vocabulary


def maxtext_export(plan: Plan, trainer_path: Path | None = None) -> Export:
    """Return what an export to MaxText holds; raise `PlanError` for what it cannot hold."""
    vocabulary = installed(trainer_path) if trainer_path else table()
    if plan.context.keys in tables.NO_KEYS:
        raise PlanError(f"export to {TRAINER}: context.keys: {tables.NO_KEYS[plan.context.keys]}")
    experts = plan.model.experts
    blocks = tables.EXPERT_BLOCKS if experts else tables.BLOCKS
    chosen = nearest_model(plan.model, blocks, _only(plan) | (_experts(plan) if experts else {}))
    own = replace(plan, model=chosen.model, fused_projections=False)
    mesh = mesh_shape(own, TRAINER, several_slices=True)
    renamed = rename_axes(resolve(own), mesh, tables.AXES)
    data = plan_data(own)
    arrays = tuple(_arrays(data, chosen.block, renamed, vocabulary))
    rules = order_rules(arrays, tables.INNER)
    known = {name for array in arrays for name in array.names} | set(tables.WHOLE)
    rules += _other_rules(data, renamed, vocabulary, known)
    remarks = check_rules(arrays, rules, TRAINER)
    return Export(
        plan=own,
        block=chosen.block,
        mesh=mesh,
        renamed=renamed,
        rules=tuple(rules),
        arrays=arrays,
        differences=_model_differences(plan, chosen),
        remarks=(*mesh.remarks, *remarks),
        vocabulary=vocabulary,
    )


def _only(plan: Plan) -> dict[str, Any]:
    """Return what MaxText has one of only: no images, a vocabulary and positions that divide."""
    layout = resolve(plan)
    tensor = int(layout.tensor.size)
    vocab = plan.model.vocab or _VOCAB
    learned = plan.model.positions == "learned" and bool(plan.model.vocab)
    positions = max(plan.sequence, plan.model.sequence * learned)
    return {
        **tables.ONLY,
        "vocab": math.ceil(vocab / tensor) * tensor,
        "sequence": math.ceil(positions / tensor) * tensor,
    }


def _experts(plan: Plan) -> dict[str, Any]:
    """Return experts as MaxText's blocks of nothing else say them; an MLP there has their width.

    Raises `PlanError` for what those blocks cannot say.
    """
    experts = plan.model.experts
    assert experts is not None
    for field in fields(experts):
        value = getattr(experts, field.name)
        if field.name not in tables.EXPERT_OPTIONS and value != field.default:
            raise PlanError(
                f"export to {TRAINER}: experts.{field.name}: {str(value).lower()} of "
                f"{plan.model.name} is not supported, nor any key of experts but "
                f"{', '.join(tables.EXPERT_OPTIONS)}; export to jax, or over a config that has it "
                "(--over)"
            )
    if not plan.model.gated_mlp:
        raise PlanError(f"export to {TRAINER}: experts there are gated; use gated_mlp: true")
    return {"experts": experts, "mlp": experts.mlp}


def _model_differences(plan: Plan, chosen: Nearest) -> tuple[str, ...]:
    """Return the differences between the models, and between the plan's switches and MaxText's."""
    found = list(chosen.differences)
    if plan.fused_projections:
        found.append("fused_projections: false, not true")
    kept = plan.remat.only("MaxText").kept
    unfused = plan.attention == "unfused" and chosen.block not in tables.UNFUSED_CONTEXT
    if unfused and "context" in kept:
        found.append(
            f"remat: context computed again: {chosen.block} names it in flash kernels only"
        )
    if "statistics" in kept:
        found.append("remat: statistics computed again: MaxText has no name for sums of norms")
    return (*found, *reduced(plan))


def _arrays(
    data: Mapping[str, Any], block: str, renamed: Mapping[str, str], vocabulary: Vocabulary
) -> list[Array]:
    """Return every weight and activation with MaxText's names and the plan's spec."""

    def named(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
        return tuple(name and _known(name, vocabulary) for name in names)

    def split(spec: Spec) -> Spec:
        return [[renamed[axis] for axis in axes] for axes in spec]

    weights = {**tables.WEIGHTS, **tables.OWN_WEIGHTS.get(block, {})}
    arrays = []
    for name, entry in data["parameters"].items():
        stack: tuple[str, ...] = ("layers",) if entry["part"] == "block" else ()
        names = stack + named(weights[name])
        arrays.append(Array.of(name, names, split(entry["spec"])))
    for kind, rows in tables.ACTIVATIONS.items():
        ways = list(rows)
        if block == "default" and kind == "residual":
            ways[0] = tables.DEFAULT_RESIDUAL
        if block == "gpt3" and kind == "wide":
            ways.append(tables.GPT3_HEADS)
        spec = split(data["activations"][kind])
        arrays += [Array.of(kind, named(way), spec, activation=True) for way in ways]
    return arrays


def _known(name: str, vocabulary: Vocabulary) -> str:
    """Return `name`, or what a release that lacks it says instead."""
    while name not in vocabulary.axes:
        if name not in tables.OLDER:
            raise PlanError(
                f"export to {TRAINER}: {vocabulary.source} has no logical axis '{name}'"
                f"{nearest(name, vocabulary.axes)}"
            )
        name = tables.OLDER[name]
    return name


def _other_rules(
    data: Mapping[str, Any],
    renamed: Mapping[str, str],
    vocabulary: Vocabulary,
    known: set[str | None],
) -> list[Rule]:
    """Return rules for the release's other axes: each one's default, in the plan's mesh axes."""
    roles = data["plan"]["roles"]
    context = [axis for axis in roles["context"] if axis in data["plan"]["gather"]]
    own = {
        "data": roles["data"],
        "fsdp": roles["fsdp"],
        "expert": roles["expert"],
        "tensor": roles["tensor"],
        "tensor_sequence": roles["tensor"] if data["plan"]["residual"] == "sequence" else [],
    }
    rules = []
    for name, default in vocabulary.axes.items():
        if name in known:
            continue
        use = {**own, "context": roles["context"] if name.startswith("activation") else context}
        axes = dict.fromkeys(renamed[axis] for role in default for axis in use.get(role, []))
        if axes:
            rules.append((name, tuple(axes)))
    return rules
