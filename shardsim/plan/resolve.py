"""From a plan's rules to the role of each mesh axis, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.model import Model
from shardsim.ops.attend_kernels import KERNEL_MULTIPLE
from shardsim.plan.layout import (
    EMBED_SHARDED,
    REPLICATED,
    ROLES,
    SEQUENCE_SHARDED,
    AxisLayout,
    Kept,
    Layout,
    Number,
    Spread,
    whole_axis,
)
from shardsim.plan.plan import (
    IN_TURNS,
    MATMUL_OVERLAP,
    TICKS,
    WEIGHTS_APART,
    MeshAxis,
    Plan,
    Rules,
)

TENSOR_AXES = ("heads", "mlp")


def resolve(plan: Plan) -> Layout:
    """Return the layout of `plan`; raise `PlanError` where its rules have no known meaning."""
    members: dict[str, list[str]] = {role: [] for role in ROLES}
    for axis in plan.mesh:
        role = _role(plan, axis.name)
        if role is not None:
            members[role].append(axis.name)
    axes: dict[str, Any] = {
        role: axis_layout(plan.machine, plan.mesh, names) for role, names in members.items()
    }
    context, data, expert = members["context"], members["data"], members["expert"]
    context_shards = _all_or_none(plan.parameters, "parameters.embed", context, "sequence axes")
    over_data = _all_or_none(plan.optimizer_rules, "optimizer.embed", data, "data axes")
    shards = _all_or_none(plan.parameters, "parameters.embed", expert, "expert axes")
    gathers = [*members["fsdp"], *(context if context_shards else ())]
    what = f"axes that shard parameters ({', '.join(gathers)})"
    by_expert = _all_or_none(plan.parameters, "parameters.expert", gathers, what)
    _check_wanted_axes(plan, members)
    layout = Layout(
        **axes,
        context_shards_parameters=context_shards,
        spread=Spread(
            # Without an expert axis as a search holds it, which looks at meshes with and without.
            shards=shards if expert else plan.model.experts is not None,
            ring=plan.experts.exchange == "ring",
            by_expert=by_expert,
            passed=plan.context.keys == "ring",
            by_head=plan.context.keys == "ulysses",
            switched=plan.context.keys == "dsp",
        ),
        residual=_residual(plan, members["tensor"]),
        optimizer_over_data=over_data,
        microbatches=plan.microbatches,
        gathered=plan.accumulation in ("gathered", "scattered"),
        scattered=plan.accumulation == "scattered",
        layered=plan.accumulation == "layered",
        lockstep=plan.pipeline_schedule in TICKS and bool(members["pipeline"]),
        in_turns=plan.pipeline_schedule in IN_TURNS and bool(members["pipeline"]),
        split_backward=plan.pipeline_schedule in WEIGHTS_APART and bool(members["pipeline"]),
        stage_layers=plan.stage_layers,
        kept=tuple(
            Kept(names=(group.kept,), offloaded=(group.offload,), layers=group.layers)
            for group in plan.remat.groups
        ),
        matmul_overlap=MATMUL_OVERLAP.index(plan.overlap.matmul),
        weights_overlap=plan.overlap.weights,
        gradients_overlap=plan.overlap.gradients,
        dcn_overlap=plan.overlap.dcn,
        keys_overlap=plan.context.overlap,
        striped=_striped(plan, int(axes["context"].size)),
        partitioned=plan.execution == "partitioned",
        names={role: tuple(names) for role, names in members.items()},
    )
    _check_groups(plan, layout)
    return layout


def _all_or_none(
    rules: Mapping[str, Sequence[str]], rule: str, axes: Sequence[str], what: str
) -> bool:
    """Return whether a rule ("parameters.embed") names all of some axes; refuse some of them."""
    named = [name in rules.get(rule.partition(".")[2], ()) for name in axes]
    if len(set(named)) > 1:
        raise PlanError(f"rules.{rule}: must name all {what} or none of them")
    return all(named) and bool(named)


def _check_wanted_axes(plan: Plan, members: Mapping[str, Sequence[str]]) -> None:
    """Refuse ways of experts and keys that no axis, or nobody, carries out."""
    if plan.experts.exchange == "ring" and not members["expert"]:
        raise PlanError(
            "experts.exchange: a ring needs an expert axis; name one in rules.parameters.expert "
            "and rules.activations.expert"
        )
    if plan.context.plain:
        return
    if not members["context"]:
        raise PlanError(
            "context: no mesh axis splits the sequence in attention; name one in "
            "rules.activations.seq alone, or leave the key out"
        )
    if plan.execution == "partitioned":
        raise PlanError(
            "context: the compiler's partitioner gathers keys of contiguous tokens; leave the key "
            "out, or use execution: explicit"
        )


def _check_groups(plan: Plan, layout: Layout) -> None:
    """Refuse groups of layers that keep different things where layers are more than one row."""
    if len(plan.remat.groups) == 1:
        return
    if len(plan.model.stacks) > 1 or len(plan.model.parts) > 1:
        raise PlanError(
            "remat: groups of layers are not told from dense layers in front of those with "
            "experts, or from layers after the last whole round; give one policy"
        )
    if int(layout.pipeline.size) > 1:
        raise PlanError(
            "remat: groups of layers are not spread over pipeline stages; give one policy, or name "
            "no axis for layers in rules.parameters"
        )


def stripes(model: Model, sequence: int, members: Number) -> Number:
    """Return where tokens are striped over a context axis of `members` if nobody says: under a
    causal mask, in parts that are whole tiles of the kernel, or where larger ones are none either,
    and whole groups of tokens that share places of experts.
    """
    whole, parts = sequence // members, 2 * members
    tiles = (whole // 2 % KERNEL_MULTIPLE == 0) | (whole % KERNEL_MULTIPLE != 0)
    experts = model.experts
    groups = experts.groups(sequence) if experts and experts.group else parts
    divided = (sequence % parts == 0) & (groups % parts == 0)
    return model.causal & (members > 1) & divided & tiles


def _striped(plan: Plan, members: int) -> bool:
    """Return whether tokens are striped over the context axis, of `members`."""
    context = plan.context
    if context.order is not None:
        return context.order == "striped"
    if context.keys in ("ulysses", "dsp") or plan.execution == "partitioned":
        return False
    return bool(stripes(plan.model, plan.sequence, members))


def _role(plan: Plan, name: str) -> str | None:
    """Return the role of one mesh axis; None for an axis of size 1 that no rule names."""

    def parameter(logical: str) -> bool:
        return name in plan.parameters.get(logical, ())

    def activation(logical: str) -> bool:
        return name in plan.activations.get(logical, ())

    split_inside = [key for key in TENSOR_AXES if parameter(key)]
    if split_inside:
        if len(split_inside) != len(TENSOR_AXES):
            missing = next(key for key in TENSOR_AXES if key not in split_inside)
            raise PlanError(
                f"rules.parameters.{missing}: must name '{name}' too; a tensor axis splits "
                "heads and mlp together"
            )
        for key in ("batch",):
            if activation(key):
                raise PlanError(
                    f"rules.activations.{key}: '{name}' already splits heads and mlp of the "
                    "parameters; an axis can serve only one of them"
                )
        for key in TENSOR_AXES:
            if key in plan.activations and not activation(key):
                raise PlanError(
                    f"rules.activations.{key}: must name '{name}', as rules.parameters.{key} does"
                )
        return "tensor"
    if parameter("layers"):
        return "pipeline"
    if activation("expert"):
        for kind, rules, key in (
            ("parameters", plan.parameters, "expert"),
            ("activations", plan.activations, "batch"),
        ):
            if name not in rules.get(key, ()):
                raise PlanError(
                    f"rules.{kind}.{key}: must name '{name}' too; an expert axis splits experts "
                    "and the batch"
                )
        return "expert"
    if activation("batch"):
        return "fsdp" if parameter("embed") else "data"
    if activation("seq"):
        return "context"
    if parameter("embed") and activation("embed"):
        return "tensor2"
    if plan.axis(name).size == 1:
        return None
    rule = "parameters.layers" if name in ("stage", "pipeline") else "activations.batch"
    raise PlanError(
        f"mesh.{name}: no rule gives this axis work, so its {plan.axis(name).size} groups would "
        f"all compute the same; name it in a rule, for example rules.{rule}: [{name}]"
    )


def _residual(plan: Plan, tensor: list[str]) -> int:
    """Return how the residual stream lies over the tensor axes."""
    what = f"tensor axes ({', '.join(tensor)})"
    seq, embed = (
        _all_or_none(plan.activations, f"activations.{logical}", tensor, what)
        for logical in ("seq", "embed")
    )
    if seq and embed:
        raise PlanError("rules.activations: a tensor axis splits seq or embed, not both")
    if embed:
        return EMBED_SHARDED
    return SEQUENCE_SHARDED if seq else REPLICATED


def axis_layout(machine: Machine, mesh: Sequence[MeshAxis], names: Sequence[str]) -> AxisLayout:
    """Join the axes `names` of a mesh into one group with its strides on the torus."""
    placed = {axis.name: axis for axis in mesh}
    joined = whole_axis(len(machine.axes))
    for wanted in names:
        factors = []
        strides = []
        for torus in (*(axis.name for axis in machine.axes), "dcn"):
            inner = 1
            for axis in reversed(mesh):
                if axis.name == wanted:
                    break
                inner *= axis.torus.get(torus, 1)
            factors.append(placed[wanted].torus.get(torus, 1))
            strides.append(inner if factors[-1] > 1 else 1)
        joined = joined.joined(
            AxisLayout(
                factors=tuple(factors[:-1]),
                strides=tuple(strides[:-1]),
                slices=factors[-1],
                slice_stride=strides[-1],
            )
        )
    return AxisLayout(
        factors=tuple(int(factor) for factor in joined.factors),
        strides=tuple(int(stride) for stride in joined.strides),
        slices=int(joined.slices),
        slice_stride=int(joined.slice_stride),
    )


# What the planner calls the axes it makes.
AXIS_NAMES: Mapping[str, str] = {
    "pipeline": "stage",
    "data": "data",
    "fsdp": "fsdp",
    "expert": "expert",
    "context": "context",
    "tensor2": "model2",
    "tensor": "model",
}
# The word for a role, and what the search calls its mesh axis.
ROLE_OF: Mapping[str, str] = {role: role for role in ROLES} | {
    name: role for role, name in AXIS_NAMES.items()
}


def mesh_of(layout: Layout, machine: Machine) -> tuple[MeshAxis, ...]:
    """Return the mesh axes of a layout of plain numbers, outermost first."""
    mesh = []
    for role in ROLES:
        axis = layout.role(role)
        torus = {
            physical.name: int(factor)
            for physical, factor in zip(machine.axes, axis.factors, strict=True)
            if int(factor) > 1
        }
        if int(axis.slices) > 1:
            torus = {"dcn": int(axis.slices)} | torus
        if torus:
            mesh.append(MeshAxis(name=AXIS_NAMES[role], size=int(axis.size), torus=torus))
    return tuple(mesh) or (MeshAxis(name="data", size=1, torus={}),)


def rules_of(layout: Layout, mesh: tuple[MeshAxis, ...]) -> tuple[Rules, Rules, Rules]:
    """Return the rules for parameters, activations and optimizer state of a layout of numbers."""
    return rules_by_name(
        {axis.name for axis in mesh},
        residual=int(layout.residual),
        optimizer_over_data=bool(layout.optimizer_over_data),
        context_shards_parameters=bool(layout.context_shards_parameters),
        expert_shards_parameters=bool(layout.spread.shards),
    )


def rules_by_name(
    present: Collection[str],
    *,
    residual: int = EMBED_SHARDED,
    optimizer_over_data: bool = False,
    context_shards_parameters: bool = True,
    expert_shards_parameters: bool = True,
) -> tuple[Rules, Rules, Rules]:
    """Return the rules for parameters, activations and optimizer state of axes in `AXIS_NAMES`."""

    def axes(*roles: str) -> tuple[str, ...]:
        return tuple(AXIS_NAMES[role] for role in roles if AXIS_NAMES[role] in present)

    also = {"expert": expert_shards_parameters, "context": context_shards_parameters}
    sharding = ("fsdp", *(role for role, splits in also.items() if splits))
    tensor = axes("tensor")
    inside = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), tensor) if tensor else {}
    of_experts = {"expert": axes("expert")}
    parameters = {"embed": axes(*sharding, "tensor2"), **inside, "layers": axes("pipeline")}
    parameters |= of_experts
    sequence = axes("context")
    embed = axes("tensor2")
    if tensor and residual == SEQUENCE_SHARDED:
        sequence += tensor
    if tensor and residual == EMBED_SHARDED:
        embed += tensor
    activations = {
        "batch": axes("data", "fsdp", "expert") or (("data",) if "data" in present else ()),
        "seq": sequence,
        "embed": embed,
        **inside,
        **of_experts,
    }
    optimizer = {"embed": axes("data")} if optimizer_over_data else {}
    kept = [
        {key: value for key, value in rules.items() if value}
        for rules in (parameters, activations, optimizer)
    ]
    return kept[0], kept[1], kept[2]


def rules_data(present: Collection[str], **how: Any) -> dict[str, dict[str, list[str]]]:
    """Return the same, `how` as there, as the `rules` of a plan file."""
    kinds = ("parameters", "activations", "optimizer")
    found = zip(kinds, rules_by_name(present, **how), strict=True)
    return {kind: {key: list(axes) for key, axes in rules.items()} for kind, rules in found}
