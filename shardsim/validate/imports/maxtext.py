"""A MaxText config as a plan: its YAML, or the key=value words of a command in a script."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardsim.carried import BOTH, TIME, Keys, NotCarried, is_one_of
from shardsim.errors import FileError, ModelError, nearest, shown
from shardsim.files import read_yaml
from shardsim.machine import Machine, parse_machine
from shardsim.model import Model, load_model, override_model
from shardsim.plan import Plan, Remat
from shardsim.plan.plan import Context, MeshAxis, Routing, Rules, uneven
from shardsim.plan.precision import Precision, wire
from shardsim.plan.remat import Policy
from shardsim.plan.resolve import rules_by_name
from shardsim.validate.imports.maxtext_attention import context_of, is_fused, kernel_of
from shardsim.validate.imports.maxtext_blocks import (
    NAMES,
    REFUSED,
    activated,
    masked,
    options_of,
)
from shardsim.validate.imports.maxtext_defaults import CURRENT, KEYS_OF_2023, KEYS_SINCE, OF_2023
from shardsim.validate.imports.maxtext_flags import READ, options_of_compiler, overlap_of
from shardsim.validate.imports.maxtext_given import Given, read_given
from shardsim.validate.imports.maxtext_keys import known, left_of
from shardsim.validate.imports.maxtext_lora import adapted
from shardsim.validate.imports.maxtext_named import otherwise, said_of
from shardsim.validate.imports.maxtext_remat import custom_policy
from shardsim.validate.words import REMAT_POLICIES, TENSORS, Split, number, remat_named, whole

_OPTIMIZERS = {"adamw": "adamw", "adam_pax": "adamw", "sgd": "sgd"}
# Chips for which today's compiler gathers no weights asynchronously, asked to or not: all twenty
# and more programs in shardsim/xla/trainers/programs.json (MaxText 0.2.5).
_SYNCHRONOUS = ("v5p", "v6e")
# Axes that split weights along another dimension than the plan says.
_COUNTED_AS: Mapping[str, str] = {
    "fsdp_transpose_parallelism": "counted as fsdp: weights lie along another dimension",
    "tensor_transpose_parallelism": "counted as tensor: weights lie along another dimension",
}
_AXIS = re.compile(
    r"(ici|dcn)_(data|fsdp|fsdp_transpose|context|sequence|tensor|tensor_transpose|tensor_sequence"
    r"|pipeline|expert|stage)_parallelism"
)
_PARALLELISM = re.compile(r"(ici|dcn)_\w+_parallelism")
# What a preset calls a size that a model's own file says, and MaxText takes from elsewhere only
# where it is told to.
_SIZES: Mapping[str, str] = {
    "base_num_decoder_layers": "layers",
    "base_emb_dim": "embed",
    "base_mlp_dim": "mlp",
    "base_num_query_heads": "heads",
    "base_num_kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
    "logits_via_embedding": "tied_embeddings",
    "base_moe_mlp_dim": "experts.mlp",
    "num_experts": "experts.number",
    "num_experts_per_tok": "experts.top_k",
    "gdn_num_key_heads": "delta.key_heads",
    "gdn_num_value_heads": "delta.value_heads",
    "gdn_key_head_dim": "delta.key_dim",
    "gdn_value_head_dim": "delta.value_dim",
    "gdn_conv_kernel_dim": "delta.taps",
    "gdn_chunk_size": "delta.chunk",
    "inhomogeneous_layer_cycle_interval": "delta.every",
}
# What MaxText's own model files say otherwise than what is published, by what names begin with.
_OWN: Mapping[str, Mapping[str, int]] = {
    "gemma-": {"vocab": 256_128},
    "gemma2-": {"vocab": 256_128},
    "gemma3-": {"vocab": 262_144},
    "gpt3-175b": {"vocab": 50_304, "sequence": 16_384},
    "mixtral-8x22b": {"vocab": 32_768},
}
# Trained on, of the same sizes.
_VARIANT = re.compile(r"-(base|pt|it|thinking-2507|instruct)$")
_ROOM = "ragged_buffer_factor"
_ROUNDING = 1e-6  # of a fraction of a sequence on each device
_EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")  # of stored weights
# Keys of Hugging Face's files that MaxText has not, adapters' first.
_HUGGING_FACE = ("peft_type", "model_type", "architectures", "transformers_version")
_COMPUTE: Mapping[str, str] = {"int8": "int8", "fp8": "fp8", "fp8_full": "fp8", "nanoo_fp8": "fp8"}


def read_maxtext(
    path: Path, text: str, machine: str | None, base: Path | None = None
) -> tuple[Plan, list[str], list[NotCarried]]:
    """Return the plan of a MaxText config, remarks on how it was read, and what is not carried.

    `base` is the base.yml of the release that it was written for; the models beside it are its own.
    """
    given = read_given(path, text, base)
    old = any(key in given.names for key in KEYS_OF_2023) and not any(
        key in given.names for key in KEYS_SINCE
    )
    notes = ["read with the defaults of MaxText " + ("of December 2023" if old else "0.2.5")]
    defaults = {**(OF_2023 if old else CURRENT), **given.defaults}
    if base is not None:
        release = read_yaml(base)
        if not isinstance(release, Mapping):
            raise FileError(f"{base}: expected MaxText's keys")
        defaults = {**defaults, **release}
        notes = [f"read with the defaults in {base}"]
    notes += given.notes
    _recognised(given, defaults)
    keys = Keys(given.values, defaults)
    slices = _machine(keys, machine)
    partly: list[NotCarried] = []
    keys, model = _model(keys, path, base, notes, partly)
    model = adapted(keys, model)
    plan = _plan(keys, model, slices, given.flags, partly)
    if old and plan.attention == "flash":
        plan = replace(plan, attention="flash-2023")
    elif not old and slices.chip.name in _SYNCHRONOUS:
        plan = replace(plan, overlap=replace(plan.overlap, weights=False))
        notes.append(
            f"overlap: gathers of weights wait, as in MaxText's programs on {slices.chip.name}"
        )
    plan = replace(plan, activations=_activations(plan, keys))
    for key, written in given.unset.items():
        if key in keys.read:
            why = given.why.get(key, f"{written} is set outside this script")
            raise FileError(f"{key}: {why}; write its value")
    left = [*partly, *left_of(keys)] + [
        NotCarried(key, value, "an option of the compiler that is in no plan", BOTH)
        for key, value in given.flags.items()
        if key not in READ
    ]
    left += [item for key, written in given.unset.items() for item in left_of(_one(key, written))]
    return plan, notes, left


def _one(key: str, value: Any) -> Keys:
    return Keys({key: value}, {})


def _recognised(given: Given, defaults: Mapping[str, Any]) -> None:
    """Raise `FileError` where a file is not MaxText's: it has keys of Hugging Face's alone, or most
    of its keys are none of MaxText's."""
    if theirs := [key for key in _HUGGING_FACE if key in given.names]:
        hint = "" if theirs[0] == "peft_type" else "; use --from hf"
        raise FileError(f"no config of MaxText: {theirs[0]} is a key of Hugging Face's{hint}")
    own = (*KEYS_OF_2023, *KEYS_SINCE, *TENSORS)
    strange = [key for key in given.names if not (key in defaults or key in own or known(key))]
    if given.names and 2 * len(strange) > len(given.names):
        raise FileError(
            f"no config of MaxText: {len(strange)} of its {len(given.names)} keys, such as "
            f"{shown(sorted(strange)[0])}, are none of MaxText's"
        )


def _machine(keys: Keys, machine: str | None) -> Machine:
    if machine is not None:
        return parse_machine(machine)
    name, slices = keys["compile_topology"], keys["compile_topology_num_slices"]
    if not name:
        raise FileError("the config names no slice (compile_topology); give it: --on v5p:4x4x4")
    count = slices if isinstance(slices, int) and slices > 0 else 1
    return parse_machine(f"{count}*{name}")


def _model(
    keys: Keys, path: Path, base: Path | None, notes: list[str], left: list[NotCarried]
) -> tuple[Keys, Model]:
    """Return the model, and the keys with what is read so far: a model's own file may add some."""
    name = keys["model_name"]
    if name in (None, "", "default"):
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:60].lstrip("._-") or "maxtext"
        return keys, load_model(options_of(keys, stem))
    own = base.parent / "models" / f"{name}.yml" if base is not None else None
    if own is not None and re.fullmatch(r"[\w.-]+", str(name)) and os.path.isfile(own):
        sizes = read_yaml(own)
        if not isinstance(sizes, Mapping):
            raise FileError(f"{own}: expected MaxText's keys")
        _no_two(keys, sizes)
        merged = Keys(keys.given, {**keys.defaults, **sizes})
        merged.read |= keys.read
        notes.append(f"model_name: {name} read from {own}")
        return merged, load_model(options_of(merged, str(name)))
    for start, block in NAMES.items():
        if str(name).startswith(start):
            raise FileError(f"model_name: {name} is not modelled: {REFUSED[block]}")
    try:
        model = load_model(_VARIANT.sub("", str(name)))
    except ModelError as error:
        raise FileError(f"model_name: {error} (or name its release's base.yml: --base)") from None
    notes.append(f"model_name: {name} taken as {model.name}")
    changed = override_model(model, _changes(keys, model, str(name), left))
    return keys, changed


def _changes(keys: Keys, model: Model, name: str, left: list[NotCarried]) -> dict[str, Any]:
    """Return what a config, or MaxText's own file of that name, changes of a preset.

    What would make it another model and is not taken goes to `left`.
    """
    changes: dict[str, Any] = {}
    for start, said in _OWN.items():
        changes |= said if name.startswith(start) else {}
    # A layer of MaxText's Gemma 2 is two.
    times = {"layers": 2 if name.startswith("gemma2-") else 1}
    fields = {
        key: field
        for key, field in _SIZES.items()
        if "." not in field or getattr(model, field.partition(".")[0])
    }
    own = {}
    for key, field in fields.items():
        first, _, inner = field.partition(".")
        value = changes.get(field, getattr(model, first))
        own[key] = getattr(value, inner) if inner else value
    own["base_num_decoder_layers"] //= times["layers"]
    keys.flag("logits_via_embedding")
    named = said_of(keys, model, name)
    _no_two(keys, {**own, **named})
    if "mlp_activations" in named:
        changes |= activated(keys)
    changes |= {
        field: keys[key] * times[field] if field in times else keys[key]
        for key, field in fields.items()
        if key in keys.given
    }
    if not model.windows and keys["attention_type"] != "global":
        changes |= masked(keys)
    if model.positions != "learned":
        changes["sequence"] = whole(keys["max_target_length"], "max_target_length")
    left += otherwise(keys, model, named)
    return changes


def _no_two(keys: Keys, sizes: Mapping[str, Any]) -> None:
    """Raise `FileError` where a config says another size than its model, as MaxText does."""
    if keys["override_model_config"]:
        return
    for key, value in sizes.items():
        if key in keys.given and keys[key] != value:
            raise FileError(
                f"{key}: {shown(keys[key])}, but model_name says {shown(value)}; MaxText takes "
                "another with override_model_config=true only"
            )


def _plan(
    keys: Keys, model: Model, machine: Machine, flags: Mapping[str, str], left: list[NotCarried]
) -> Plan:
    """Return the plan; what of a key is not in it goes to `left`."""
    asked = _parallelism(keys)
    mesh = _mesh(asked, model, machine, left)
    names = [axis.name for axis in mesh]
    reorders = model.causal and any(key.endswith("_context_parallelism") for key in asked)
    context = context_of(keys, reorders) if "context" in names else Context()
    steps = whole(keys["gradient_accumulation_steps"], "gradient_accumulation_steps")
    each = number(keys["per_device_batch_size"], "per_device_batch_size")
    flash = is_fused(keys, machine)
    precision, optimizer = _formats(keys, machine, left)
    over_data = "data" in names and keys.flag("shard_optimizer_over_data")
    parameters, activations, state = rules_by_name(names, optimizer_over_data=over_data)
    microbatches, interleave = _pipeline(keys, model, mesh, steps)
    return Plan(
        name=model.name,
        model=model,
        machine=machine,
        batch=max(1, math.floor(each * machine.devices + _ROUNDING)) * steps,
        sequence=whole(keys["max_target_length"], "max_target_length"),
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        optimizer_rules=state,
        remat=Remat((_remat(keys, model, flash, left),)),
        microbatches=microbatches,
        pipeline_interleave=interleave,
        overlap=overlap_of(flags, machine),
        precision=precision,
        experts=_routing(keys, model, "expert" in names),
        context=context,
        vocab_tiles=whole(keys["num_vocab_tiling"], "num_vocab_tiling"),
        offload_optimizer=keys.flag("optimizer_memory_host_offload"),
        offload_parameters=keys.flag("parameter_memory_host_offload"),
        optimizer=optimizer,
        attention=kernel_of(keys) if flash else "unfused",
        compiler_options=options_of_compiler(flags, machine),
    )


def _mesh(
    asked: Mapping[str, Any], model: Model, machine: Machine, left: list[NotCarried]
) -> tuple[MeshAxis, ...]:
    """Return the mesh of sizes by MaxText's keys; axes that are counted as others go to `left`."""
    split = Split()
    if any(key.endswith("_tensor_parallelism") for key in asked):
        why = "counted as tensor: the residual stream is split along embed by both"
        both = [key for key in asked if key.endswith("_tensor_sequence_parallelism")]
        left += [NotCarried(key, asked[key], why, (TIME,)) for key in both]
    for key, size in asked.items():
        if (other := _COUNTED_AS.get(key.partition("_")[2])) and size not in (1, -1):
            left.append(NotCarried(key, size, other, (TIME,)))
        if _AXIS.fullmatch(key) is None:
            raise FileError(f"{key}: MaxText's axis {key[4:].rpartition('_')[0]} is not modelled")
        if model.experts is None and key.endswith("_expert_parallelism") and size not in (0, 1):
            raise FileError(f"{key}: {model.name} has no experts to lie on an axis; leave it out")
        if model.experts and key.endswith("_expert_parallelism"):
            sizes = split.inside if key.startswith("ici") else split.outside
            sizes["expert"] = whole(size, key)
        else:
            of_keys = re.sub("^(ici|dcn)_sequence_", r"\1_context_", key)  # both gather keys
            split.add(of_keys, size, key)
    return split.mesh(machine, split.rest or "data")


def _remat(keys: Keys, model: Model, flash: bool, left: list[NotCarried]) -> Policy:
    """Return what layers keep; of arrays that a plan keeps whole the rest goes to `left`."""
    policy = str(keys["remat_policy"])
    if policy == "custom":
        remat, partly = custom_policy(keys, model, flash)
        left += partly
        return remat
    if (named := remat_named(policy, {})) is None:
        near = nearest(policy, [*REMAT_POLICIES, "custom"])
        raise FileError(f"remat_policy: {shown(policy)} is not known{near}")
    return named


def _formats(keys: Keys, machine: Machine, left: list[NotCarried]) -> tuple[Precision, str]:
    """Return number formats and the optimizer, whose first moment may have one of its own."""
    optimizer = _OPTIMIZERS.get(str(keys["opt_type"]))
    if optimizer is None:
        raise FileError(f"opt_type: {keys['opt_type']!r} is not modelled")
    if is_one_of(stored := keys["weight_dtype"], _EIGHT_BITS):
        why = "weights of 8 bits, with a scale of each block, are counted as bf16"
        left.append(NotCarried("weight_dtype", stored, why, BOTH))
        weights = "bf16"
    else:
        weights = _format(keys, "weight_dtype")
    gradients = _format(keys, "grad_dtype")
    if keys["opt_type"] == "adam_pax":
        left.append(NotCarried("opt_type", "adam_pax", "counted as adamw: the same state and work"))
    if optimizer == "adamw":
        mu = weights if keys["mu_dtype"] in ("", None) else _format(keys, "mu_dtype")
        optimizer += "-bf16-mu" if mu == "bf16" else ""
    precision = Precision(
        compute=_compute(keys, machine),
        reduce=wire(_format(keys, "dtype")),
        parameters=weights,
        state="bf16" if weights == "bf16" else "",  # moments are as the weights are
        # A loop over layers carries gradients of weights in bf16 as such, and casts them after.
        gradients="" if "bf16" not in (gradients, weights) or weights == "bf16" else "bf16",
    )
    return precision, optimizer


def _routing(keys: Keys, model: Model, apart: bool) -> Routing:
    """Return how tokens reach experts that lie `apart`: MaxText exchanges them in buffers of a
    share more than comes on average, where a config says which."""
    if model.experts is None or not apart:
        return Routing()
    if keys.flag("use_ring_of_experts"):
        return Routing(exchange="ring")
    room = keys.given.get(_ROOM)
    if not model.experts.dropless or not isinstance(room, int | float) or not room >= 1:
        return Routing()
    return Routing(padding=uneven(keys[_ROOM], _ROOM))


def _pipeline(keys: Keys, model: Model, mesh: Any, steps: int) -> tuple[int, int]:
    """Return the microbatches of a step, and the chunks of layers of a pipeline stage.

    Source: MaxText's configs/types.py: without numbers of their own as many microbatches as stages,
    and as many repeats as the layers need.
    """
    stages = next((axis.size for axis in mesh if axis.name == "stage"), 1)
    if stages == 1:
        return steps, 1
    if steps > 1:
        raise FileError(
            "gradient_accumulation_steps: with a pipeline it is not modelled; use 1, and "
            "num_pipeline_microbatches"
        )
    many, repeats = keys["num_pipeline_microbatches"], keys["num_pipeline_repeats"]
    layers = whole(keys["num_layers_per_pipeline_stage"], "num_layers_per_pipeline_stage")
    many = stages if many == -1 else whole(many, "num_pipeline_microbatches")
    if repeats == -1:
        repeats = max(1, model.layers // (stages * layers))
    return many, whole(repeats, "num_pipeline_repeats")


def _compute(keys: Keys, machine: Machine) -> str:
    """Return the format of matmuls."""
    usual = _format(keys, "dtype")
    asked = keys["quantization"]
    if asked in ("", None):
        if keys.get("int8_training") is not True:
            return usual
        asked = "int8"
    if not is_one_of(asked, _COMPUTE):
        raise FileError(f"quantization: {shown(asked)} is not modelled{nearest(asked, _COMPUTE)}")
    compute = _COMPUTE[asked]
    if compute not in machine.chip.peak_flops:
        raise FileError(f"quantization: {machine.chip.name} multiplies no {compute}")
    return compute


def _format(keys: Keys, key: str) -> str:
    """Return the format that a key names."""
    formats = {"bfloat16": "bf16", "float32": "f32"}
    if not is_one_of(keys[key], formats):
        raise FileError(f"{key}: {keys[key]!r} is not modelled{nearest(keys[key], formats)}")
    return formats[keys[key]]


def _parallelism(keys: Keys) -> dict[str, Any]:
    """Return the sizes of the mesh by MaxText's keys; lists go with `mesh_axes`."""
    sizes = {key: keys[key] for key in keys if _PARALLELISM.fullmatch(key)}
    sizes = {key: size for key, size in sizes.items() if size not in (1, "1")}
    for key, size in sizes.items():
        if size == 0:
            raise FileError(f"{key}: expected 1 or more, or -1 for what is left, found 0")
    for over in ("ici", "dcn"):
        values = keys.get(f"{over}_parallelism")
        if isinstance(values, list) and isinstance(axes := keys["mesh_axes"], list):
            if len(values) != len(axes):
                raise FileError(f"{over}_parallelism: one size for each of mesh_axes")
            sizes |= {
                f"{over}_{axis}_parallelism": size
                for axis, size in zip(axes, values, strict=True)
                if size != 1
            }
            sizes.pop(f"{over}_fsdp_parallelism", None) if "fsdp" not in axes else None
        rest = [key for key, size in sizes.items() if key.startswith(over) and size == -1]
        if len(rest) > 1:
            every = " and ".join(rest)
            raise FileError(f"{every}: one axis takes -1, what is left; give the others sizes")
    if sizes.get("dcn_data_parallelism") == -1:
        del sizes["dcn_data_parallelism"]
    return sizes


def _activations(plan: Plan, keys: Keys) -> Rules:
    """Return the activation rules with the residual split as the config's logical rules do."""
    tensor = plan.parameters.get("heads", ())
    rules = keys["logical_axis_rules"]
    if not tensor or not isinstance(rules, list):
        return plan.activations
    by: dict[str, set[str]] = {}
    for rule in rules:
        if isinstance(rule, list) and len(rule) == 2:
            axes = [rule[1]] if isinstance(rule[1], str) else rule[1] or []
            by.setdefault(str(rule[0]), set()).update(map(str, axes))
    asked = {key[4:].removesuffix("_parallelism") for key in _parallelism(keys)}
    by_sequence = "tensor_sequence" in asked and "tensor" not in asked
    split = {
        "embed": "tensor" in by.get("activation_embed", ()) and not by_sequence,
        "seq": by_sequence
        or bool({"tensor", "tensor_sequence"} & by.get("activation_norm_length", set())),
    }
    changed = dict(plan.activations)
    for logical in ("embed", "seq"):
        rest = tuple(axis for axis in changed.get(logical, ()) if axis not in tensor)
        wanted = rest + (
            tensor if split[logical] and not (logical == "seq" and split["embed"]) else ()
        )
        changed[logical] = wanted
    return {logical: axes for logical, axes in changed.items() if axes}
