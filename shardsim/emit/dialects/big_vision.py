"""`export --to big_vision`: a Python file whose `apply(config)` puts the plan into a config.

It sets mesh, parameter strategy, activation rules, model and optimizer. big_vision has plain ViTs
only; where the plan's has more, the file trains the nearest and says what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardsim.emit.dialects import big_vision_tables as tables
from shardsim.emit.dialects.mesh import MeshShape, mesh_shape
from shardsim.emit.dialects.nearest import comments, nearest_model, reduced
from shardsim.emit.dialects.options import compiler_options
from shardsim.emit.dialects.rules import Array, Rule, check_rules, compare, order_rules
from shardsim.emit.dialects.tactics import resolve_tactics
from shardsim.emit.jax_code import header, literal
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import PlanError, nearest
from shardsim.plan import Plan, resolve

TRAINER = "big_vision"


@dataclass(frozen=True)
class Export:
    """What goes into the file: the plan with big_vision's model, strategy, rules and remarks."""

    plan: Plan
    mesh: MeshShape
    strategy: tuple[tuple[str, str], ...]
    rules: tuple[Rule, ...]
    weights: tuple[Weight, ...]
    differences: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter as big_vision has it, and where the plan puts it."""

    name: str
    path: str
    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...], ...]
    optimizer_spec: tuple[tuple[str, ...], ...]


def big_vision_code(plan: Plan) -> str:
    """Return the Python file that makes big_vision train with `plan`."""
    return big_vision_text(plan, big_vision_export(plan))


def big_vision_export(plan: Plan) -> Export:
    """Return what an export to big_vision holds; raise `PlanError` for what it cannot hold."""
    _refuse(plan)
    changes = {} if plan.model.positions in tables.POSITIONS else {"positions": "learned"}
    chosen = nearest_model(plan.model, tables.VIT, changes)
    own = replace(plan, model=chosen.model, fused_projections=False)
    mesh = mesh_shape(own, TRAINER, several_slices=False)
    data = plan_data(own)
    weights = tuple(_weight(name, entry, own) for name, entry in data["parameters"].items())
    strategy = _strategy(weights, own)
    sizes = dict(zip(mesh.names, mesh.sizes, strict=True))
    remarks = [*mesh.remarks]
    for weight in weights:
        if weight.name in tables.WHOLE and any(weight.spec):
            remarks.append(f"{weight.name}: whole here: {tables.WHOLE[weight.name]}")
            continue
        found = resolve_tactics(f"params/{weight.path}", weight.shape, strategy, sizes)
        remark = compare(Array(weight.name, _unnamed(weight), weight.spec), found, TRAINER)
        remarks += [remark] if remark else []
    activations = [
        Array.of(kind, names, data["activations"][kind], activation=True)
        for kind, names in tables.ACTIVATIONS.items()
    ]
    rules = order_rules(activations, tables.INNER)
    check_rules(activations, rules, TRAINER)
    return Export(
        plan=own,
        mesh=mesh,
        strategy=strategy,
        rules=tuple(rules),
        weights=weights,
        differences=(*chosen.differences, *_switches(plan)),
        remarks=tuple(remarks),
    )


def _refuse(plan: Plan) -> None:
    """Raise `PlanError` for what big_vision's `train.py` cannot do."""
    model = plan.model
    if model.family != "vit":
        raise PlanError(f"export to {TRAINER}: it trains ViTs, not {model.name}; choose maxtext")
    if model.attention_width != model.embed:
        raise PlanError(
            f"model: {TRAINER} makes heads as wide as embed / heads, so {model.heads} heads of "
            f"{model.head_dim} do not suit {model.embed}"
        )
    if plan.microbatches > 1:
        raise PlanError(
            f"microbatches: {TRAINER} takes a batch whole, not in {plan.microbatches} parts; use 1"
        )
    if plan.batch % plan.machine.devices:
        raise PlanError(
            f"batch: {TRAINER} wants a multiple of the {plan.machine.devices} devices, "
            f"not {plan.batch}"
        )
    if plan.precision.parameters != "f32":
        raise PlanError(f"precision.parameters: {TRAINER} keeps them in f32")
    if plan.optimizer not in tables.OPTIMIZERS:
        raise PlanError(
            f"optimizer: {TRAINER} has no '{plan.optimizer}'"
            f"{nearest(plan.optimizer, tables.OPTIMIZERS)}"
        )
    remat = plan.remat.only(TRAINER)
    if remat.offload or remat.save not in tables.REMAT:
        raise PlanError(
            f"remat: {TRAINER} takes a policy of jax.checkpoint_policies, and none keeps what "
            f"'{remat.name}' does; choose full, dots or none"
        )


def _switches(plan: Plan) -> list[str]:
    """Return what big_vision does otherwise than the plan, beside the model."""
    found = []
    if plan.fused_projections:
        found.append("fused_projections: false, not true")
    if plan.attention != "unfused":
        found.append("attention: unfused, not flash")
    return found + reduced(plan)


def _weight(name: str, entry: Mapping[str, Any], plan: Plan) -> Weight:
    more = tables.MORE_DIMENSIONS.get(name, 0)
    model = plan.model
    shape = [1] * more + list(entry["shape"])
    if name == "patch_embedding":
        shape = [model.patch, model.patch, model.channels, model.embed]
    if name == "position_embedding":
        shape[1] = model.patches  # a class token has no position here

    def padded(spec: Spec) -> tuple[tuple[str, ...], ...]:
        return tuple(map(tuple, [[]] * more + spec))

    return Weight(
        name=name,
        path=tables.PATHS[name],
        shape=tuple(shape),
        spec=padded(entry["spec"]),
        optimizer_spec=padded(entry["optimizer_spec"]),
    )


def _unnamed(weight: Weight) -> tuple[None, ...]:
    return (None,) * len(weight.shape)


def _strategy(weights: Sequence[Weight], plan: Plan) -> tuple[tuple[str, str], ...]:
    """Return the ordered strategy: optimizer state where it differs, then everything else."""
    own = {weight.name: weight for weight in weights}
    moments = []
    rules = []
    for pattern, names in tables.PATTERNS:
        weight = next((own[name] for name in names if name in own), None)
        if weight is None:
            continue
        if weight.optimizer_spec != weight.spec:
            moments.append((f"opt/{pattern}", _tactics(weight.optimizer_spec)))
        if any(weight.spec):
            rules.append((pattern, _tactics(weight.spec)))
    factored = []
    if plan.optimizer == "adafactor":
        layout = resolve(plan)
        axes = [*layout.names["fsdp"]] or [*layout.names["tensor"]]
        factored = [(tables.FACTORED, f"fsdp({_axes(axes)})" if axes else "replicate")]
    return (*factored, *moments, *rules, (".*", "replicate"))


def _tactics(spec: Sequence[Sequence[str]]) -> str:
    """Return the tactics that give exactly `spec`: dimensions by number."""
    parts = [f"shard_dim({_axes(axes)}, {dim})" for dim, axes in enumerate(spec) if axes]
    return "|".join(parts) or "replicate"


def _axes(axes: Sequence[str]) -> str:
    """Return mesh axes as an argument of a tactic; their names are identifiers."""
    return json.dumps(axes[0]) if len(axes) == 1 else f"({json.dumps(list(axes))[1:-1]})"


def big_vision_text(plan: Plan, made: Export) -> str:
    """Return the file of an export that has been made."""
    model = made.plan.model
    name, options = tables.OPTIMIZERS[plan.optimizer]
    settings = {
        "width": model.embed,
        "depth": model.layers,
        "mlp_dim": model.mlp,
        "num_heads": model.heads,
        "patch_size": (model.patch, model.patch),
        "posemb": tables.POSITIONS[model.positions],
        "pool_type": tables.POOLINGS[model.pooling],
        "dtype_mm": tables.DTYPES[plan.precision.compute],
        "scan": True,
        "remat_policy": tables.REMAT[plan.remat.only(TRAINER).save],
    }
    flags = " ".join(f"--{key}={value}" for key, value in compiler_options(plan).items())
    head = [
        header(plan),
        "#",
        "# In a config file, at the end of get_config():",
        "#   import THIS; THIS.apply(config)",
        "# big_vision passes nothing on to the compiler; what the plan wants, for the environment:",
        f"#   LIBTPU_INIT_ARGS={flags!r}",
        "# It enters its mesh by `with mesh:`, which switches SHARDING_RULES off without a word",
        "# since flax 0.12.2; with such a release write `with jax.set_mesh(mesh):` in train.py.",
    ]
    head += comments("big_vision", made.differences, made.remarks)
    values = {
        "MESH": list(zip(made.mesh.names, made.mesh.sizes, strict=True)),
        "SPLIT_PHYSICAL_AXES": made.mesh.split,
        "SHARDING_STRATEGY": list(made.strategy),
        "SHARDING_RULES": _activation_rules(made.rules),
        "MODEL": settings,
        "IMAGE": model.image,
        "CLASSES": model.classes,
        "BATCH": plan.batch,
        "OPTIMIZER": name,
        "OPTIMIZER_OPTIONS": dict(options),
    }
    body = "\n".join(f"{key} = {literal(value)}" for key, value in values.items())
    return "\n".join([*head, "", body, _APPLY])


def _activation_rules(rules: Sequence[Rule]) -> list[tuple[str, Any]]:
    """Return all three rules, so that none of big_vision's defaults stays."""
    given = dict(rules)
    named = [(name, tuple(axes)) for name, axes in rules]
    return named + [
        (name, None) for name in ("act_batch", "act_len", "act_emb") if name not in given
    ]


_APPLY = '''

def apply(config):
    """Put the plan into a big_vision config."""
    config.mesh = MESH
    config.mesh_allow_split_physical_axes = SPLIT_PHYSICAL_AXES
    config.sharding_strategy = SHARDING_STRATEGY
    config.sharding_rules = SHARDING_RULES
    config.model_name = "vit"
    config.model = MODEL
    config.num_classes = CLASSES
    config.input.batch_size = BATCH
    config.optax_name = OPTIMIZER
    config.optax = OPTIMIZER_OPTIONS
    return config
'''
