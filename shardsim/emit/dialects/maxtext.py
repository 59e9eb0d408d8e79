"""`export --to maxtext`: one YAML file on top of MaxText's base.yml.

It holds the mesh, rules in an order that resolves to the plan's specs, remat, the compiler's
options, the slice to compile for, and the sizes of a model. Where MaxText has no such model, the
file trains the nearest one and says what differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from shardsim.emit.dialects import maxtext_tables as tables
from shardsim.emit.dialects.mesh import MeshShape, mesh_shape, rename_axes
from shardsim.emit.dialects.nearest import Nearest, nearest_model
from shardsim.emit.dialects.options import compiler_options
from shardsim.emit.dialects.rules import Array, Rule, check_rules, order_rules
from shardsim.emit.dialects.vocabulary import Vocabulary, installed, table
from shardsim.emit.jax_code import header
from shardsim.emit.specs import Spec, plan_data
from shardsim.errors import HardwareError, PlanError, nearest
from shardsim.machine import parse_machine
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


def maxtext_code(plan: Plan, trainer_path: Path | None = None) -> str:
    """Return the YAML file that makes MaxText train with `plan`."""
    return maxtext_text(plan, maxtext_export(plan, trainer_path))


def maxtext_text(plan: Plan, made: Export) -> str:
    """Return the file of an export that has been made."""
    return f"{_comment(plan, made)}\n{_yaml(_settings(made))}"


def maxtext_export(plan: Plan, trainer_path: Path | None = None) -> Export:
    """Return what an export to MaxText holds; raise `PlanError` for what it cannot hold."""
    vocabulary = installed(trainer_path) if trainer_path else table()
    chosen = nearest_model(plan.model, tables.BLOCKS, _only(plan))
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
    """Return what MaxText has one of only: no images, and a vocabulary that divides."""
    layout = resolve(plan)
    tensor = int(layout.tensor.size)
    vocab = plan.model.vocab or _VOCAB
    return {
        **tables.ONLY,
        "vocab": math.ceil(vocab / tensor) * tensor,
        "sequence": math.ceil(plan.sequence / tensor) * tensor,
    }


def _model_differences(plan: Plan, chosen: Nearest) -> tuple[str, ...]:
    """Return the differences between the models, and between the plan's switches and MaxText's."""
    found = list(chosen.differences)
    if plan.fused_projections:
        found.append("fused_projections: false, not true")
    kept = plan.remat.save | plan.remat.offload
    unfused = plan.attention != "flash" and chosen.block not in tables.UNFUSED_CONTEXT
    if unfused and "context" in kept:
        found.append(
            f"remat: context computed again: {chosen.block} names it in flash kernels only"
        )
    if plan.precision.reduce != plan.precision.parameters:
        found.append(
            f"precision.reduce: {plan.precision.parameters} as the parameters, "
            f"not {plan.precision.reduce}"
        )
    return tuple(found)


def _arrays(
    data: Mapping[str, Any], block: str, renamed: Mapping[str, str], vocabulary: Vocabulary
) -> list[Array]:
    """Return every weight and activation with MaxText's names and the plan's spec."""

    def named(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_known(name, vocabulary) for name in names)

    def split(spec: Spec) -> Spec:
        return [[renamed[axis] for axis in axes] for axes in spec]

    weights = {**tables.WEIGHTS, **(tables.GPT3_WEIGHTS if block == "gpt3" else {})}
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


def _yaml(settings: Mapping[str, Any]) -> str:
    """Return a key a line and a rule a line; JSON values, which YAML reads as they are."""
    lines = []
    for key, value in settings.items():
        if key == "logical_axis_rules":
            lines += [f"{key}:", *(f"  - {json.dumps(rule)}" for rule in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _settings(made: Export) -> dict[str, Any]:
    """Return the file's keys and values; no text of the plan's is among them but axis names."""
    plan, model = made.plan, made.plan.model
    axes = [made.renamed[name] for name in made.mesh.names]
    return {
        "base_config": "base.yml",
        "decoder_block": made.block,
        "attention_type": "global" if model.causal else "full",
        "attention": "flash" if plan.attention == "flash" else "dot_product",
        "base_emb_dim": model.embed,
        "base_num_decoder_layers": model.layers,
        "base_num_query_heads": model.heads,
        "base_num_kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "base_mlp_dim": model.mlp,
        "mlp_activations": [model.activation, *(["linear"] if model.gated_mlp else [])],
        "vocab_size": model.vocab,
        "logits_via_embedding": model.tied_embeddings,
        **({"trainable_position_size": model.sequence} if model.positions == "learned" else {}),
        "enable_dropout": False,
        "max_target_length": plan.sequence,
        "per_device_batch_size": _per_device(plan),
        "gradient_accumulation_steps": plan.microbatches,
        "dtype": tables.DTYPES[plan.precision.compute],
        "weight_dtype": tables.DTYPES[plan.precision.parameters],
        "grad_dtype": tables.DTYPES[plan.precision.parameters],
        **_optimizer(made),
        "scan_layers": True,
        **_remat(plan, made.block),
        "mesh_axes": axes,
        "data_sharding": [axes],
        **_sizes(made, axes),
        **({"allow_split_physical_axes": True} if made.mesh.split else {}),
        "override_logical_axis_rules": True,
        "logical_axis_rules": [[name, list(by)] for name, by in made.rules],
        "compile_topology": compile_topology(plan, made.vocabulary),
        "compile_topology_num_slices": plan.machine.slices,
        "compile_xla_flags": " ".join(
            f"--{name}={value}" for name, value in compiler_options(plan).items()
        ),
    }


def _sizes(made: Export, axes: list[str]) -> dict[str, Any]:
    """Return the sizes of the mesh: by MaxText's keys, or as lists if an axis has no key."""
    mesh = made.mesh
    if any(axis not in tables.SIZE_KEYS for axis in axes):
        return {"ici_parallelism": list(mesh.inside), "dcn_parallelism": list(mesh.slices)}
    keys = {}
    for over, sizes in (("ici", mesh.inside), ("dcn", mesh.slices)):
        given = dict(zip(axes, sizes, strict=True))
        for name, key in tables.SIZE_KEYS.items():
            keys[f"{over}_{key}"] = given.get(name, 1)
    return keys


def _per_device(plan: Plan) -> int | float:
    share = Fraction(plan.batch, plan.machine.devices * plan.microbatches)
    return int(share) if share.denominator == 1 else float(share)


def _optimizer(made: Export) -> dict[str, Any]:
    plan = made.plan
    if plan.optimizer not in tables.OPTIMIZERS:
        raise PlanError(
            f"optimizer: MaxText {made.vocabulary.source.removeprefix('MaxText ')} has no "
            f"'{plan.optimizer}'{nearest(plan.optimizer, tables.OPTIMIZERS)}"
        )
    layout = resolve(plan)
    keys: dict[str, Any] = dict(tables.OPTIMIZERS[plan.optimizer])
    if layout.optimizer_over_data:
        if int(layout.fsdp.size) > 1:
            raise PlanError(
                "rules.optimizer: MaxText splits optimizer state over data only where no fsdp "
                "axis splits the parameters; leave the rule out"
            )
        keys["shard_optimizer_over_data"] = True
    return keys


def _remat(plan: Plan, block: str) -> dict[str, str]:
    remat = plan.remat
    if "rest" in remat.save | remat.offload:
        raise PlanError(
            f"remat: MaxText cannot keep everything of a scanned layer, as '{remat.name}' does; "
            "choose dots_and_context for the most that it keeps"
        )
    if not remat.save and not remat.offload:
        return {"remat_policy": "full"}
    keys = {"remat_policy": "custom"}
    for where, tensors in (("device", remat.save), ("offload", remat.offload)):
        for tensor in sorted(tensors):
            names = tables.REMAT[tensor]
            if tensor == "mlp_hidden" and plan.model.gated_mlp:
                names = tables.GATED_HIDDEN
            if tensor == "context" and plan.attention != "flash":
                names = tables.UNFUSED_CONTEXT.get(block, ())
            keys |= dict.fromkeys(names, where)
    return keys


def compile_topology(plan: Plan, vocabulary: Vocabulary) -> str:
    """Return MaxText's name of one slice of the plan's machine."""
    machine = plan.machine
    chip = machine.chip
    each = chip.cores_per_chip if chip.names_count == "cores" else 1
    name = f"{chip.name}-{machine.chips_per_slice * each}"
    wanted = replace(machine, slices=1).name
    slices = vocabulary.slices or {name: _default(name)}
    if slices.get(name) != wanted:
        known = f"knows {name} as {slices[name]}" if name in slices else f"has no {name}"
        raise PlanError(f"machine: {vocabulary.source} {known}, not {wanted}; it takes no other")
    return name


def _default(name: str) -> str:
    """Return the vendor's slice of that name, which is what MaxText releases map it to."""
    try:
        return parse_machine(name).name
    except HardwareError:
        return "no slice"


def _comment(plan: Plan, made: Export) -> str:
    """Return the comment at the top: where the file comes from, how to use it, what differs."""
    lines = [
        header(plan),
        f"#   words of: {json.dumps(made.vocabulary.source)}",
        "#",
        "#   python -m maxtext.trainers.pre_train.train_compile THIS.yml debug_sharding=true",
        "#   python -m maxtext.trainers.pre_train.train THIS.yml run_name=... \\",
        "#       base_output_directory=... dataset_type=...",
    ]
    if made.differences:
        lines += [
            "#",
            "# MaxText cannot do all that the plan says; this file is the nearest that it can:",
        ]
        lines += [f"#   {text}" for text in made.differences]
    if made.remarks:
        lines += ["#", "# Beside the plan:"]
        lines += [f"#   {text}" for text in made.remarks]
    return "\n".join(lines) + "\n"
