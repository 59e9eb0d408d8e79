"""The file of `export --to maxtext`: every key of it, from an export that has been made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from shardsim.emit.dialects import maxtext_tables as tables
from shardsim.emit.dialects.maxtext import Export, maxtext_export
from shardsim.emit.dialects.nearest import comments
from shardsim.emit.dialects.options import compiler_options
from shardsim.emit.dialects.vocabulary import Vocabulary
from shardsim.emit.jax_code import header
from shardsim.errors import HardwareError, PlanError, nearest
from shardsim.machine import Machine, parse_machine
from shardsim.plan import Plan, resolve
from shardsim.plan.split import state_apart


def maxtext_code(plan: Plan, trainer_path: Path | None = None) -> str:
    """Return the YAML file that makes MaxText train with `plan`."""
    return maxtext_text(plan, maxtext_export(plan, trainer_path))


def maxtext_text(plan: Plan, made: Export) -> str:
    """Return the file of an export that has been made."""
    return f"{_comment(plan, made)}\n{_yaml(_settings(made))}"


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
        **tables.SWITCHES.get(made.block, {}),
        "attention_type": "global" if model.causal else "full",
        "attention": "dot_product" if plan.attention == "unfused" else "flash",
        **tables.blocks_of(plan.attention),
        **_context(made),
        "base_emb_dim": model.embed,
        "base_num_decoder_layers": model.layers,
        "base_num_query_heads": model.heads,
        "base_num_kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "base_mlp_dim": model.mlp,
        **_experts(made),
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
        **({"optimizer_memory_host_offload": True} if plan.offload_optimizer else {}),
        **({"parameter_memory_host_offload": True} if plan.offload_parameters else {}),
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


def _context(made: Export) -> dict[str, Any]:
    """Return whether tokens are reordered over a context axis, as MaxText does by itself."""
    if "context" not in made.renamed.values():
        return {}
    return {"context_parallel_load_balance": bool(resolve(made.plan).striped)}


def _per_device(plan: Plan) -> int | float:
    share = Fraction(plan.batch, plan.machine.devices * plan.microbatches)
    return int(share) if share.denominator == 1 else float(share)


def _experts(made: Export) -> dict[str, Any]:
    """Return how many experts there are, and how tokens reach them."""
    plan, experts = made.plan, made.plan.model.experts
    if experts is None:
        return {}
    apart = int(resolve(plan).expert.size) > 1
    keys: dict[str, Any] = {
        "num_experts": experts.number,
        "num_experts_per_tok": experts.top_k,
        "base_moe_mlp_dim": experts.mlp,
        "sparse_matmul": experts.dropless,
        "megablox": experts.dropless,
    }
    if not experts.dropless:
        # Else an expert axis stays on the batch, and experts' weights are gathered over it.
        only = {"moe_dispatch_no_expert_sharding": True} if apart else {}
        return {**keys, "capacity_factor": experts.capacity, **only}
    if not apart:
        return keys
    if plan.experts.exchange == "ring":
        return {**keys, "use_ring_of_experts": True}
    return {**keys, "ragged_buffer_factor": plan.experts.padding}


def _optimizer(made: Export) -> dict[str, Any]:
    plan = made.plan
    if plan.optimizer not in tables.OPTIMIZERS:
        raise PlanError(
            f"optimizer: MaxText {made.vocabulary.source.removeprefix('MaxText ')} has no "
            f"'{plan.optimizer}'{nearest(plan.optimizer, tables.OPTIMIZERS)}"
        )
    layout = resolve(plan)
    keys: dict[str, Any] = dict(tables.OPTIMIZERS[plan.optimizer])
    if state_apart(plan.model, layout):
        if int(layout.fsdp.size) > 1:
            raise PlanError(
                "rules.optimizer: MaxText splits optimizer state over data only where no fsdp "
                "axis splits the parameters; leave the rule out"
            )
        keys["shard_optimizer_over_data"] = True
    return keys


def _remat(plan: Plan, block: str) -> dict[str, str]:
    remat = plan.remat.only("MaxText")
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
            if tensor == "context" and plan.attention == "unfused":
                names = tables.UNFUSED_CONTEXT.get(block, ())
            keys |= dict.fromkeys(names, where)
    return keys


def compile_topology(plan: Plan, vocabulary: Vocabulary) -> str:
    """Return MaxText's name of one slice of the plan's machine."""
    machine = plan.machine
    name = slice_name(machine)
    wanted = replace(machine, slices=1).name
    slices = vocabulary.slices or {name: _default(name)}
    if slices.get(name) != wanted:
        known = f"knows {name} as {slices[name]}" if name in slices else f"has no {name}"
        raise PlanError(f"machine: {vocabulary.source} {known}, not {wanted}; it takes no other")
    return name


def slice_name(machine: Machine) -> str:
    """Return MaxText's name of one slice: its chip, and how many cores or chips it has."""
    chip = machine.chip
    each = chip.cores_per_chip if chip.names_count == "cores" else 1
    return f"{chip.name}-{machine.chips_per_slice * each}"


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
    lines += comments("MaxText", made.differences, made.remarks)
    return "\n".join(lines) + "\n"
