"""A MaxText config as a plan: its YAML, or the key=value words of a command in a script."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardsim.carried import NotCarried
from shardsim.errors import FileError, ModelError, nearest
from shardsim.files import parse_yaml, read_yaml
from shardsim.machine import Machine, parse_machine
from shardsim.model import Model, load_model, override_model
from shardsim.plan import Plan, Remat
from shardsim.plan.plan import Overlap, Precision, Rules
from shardsim.plan.resolve import rules_by_name
from shardsim.validate.imports.maxtext_defaults import CURRENT, KEYS_OF_2023, KEYS_SINCE, OF_2023
from shardsim.validate.words import TENSORS, Split, number, remat_named, shown, whole

_COMMAND = re.compile(r"\bpython3?\b.*?(?:train(?:_compile)?(?:\.py)?|MaxText|maxtext)\b")
_WORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_FLAGS = re.compile(r"--(xla_[a-z0-9_]+)=(\w+)")
_OPTIMIZERS = {"adamw": "adamw", "adam_pax": "adamw", "sgd": "sgd"}
_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "default": {"parallel_block": True},
    "llama2": {},
    "mistral": {},
    "gemma": {},
    "gpt3": {"norm": "layernorm", "positions": "learned", "biases": True},
}
_CARRIED = ("xla_enable_async_all_gather",)  # flags that change what a program holds
# Keys that change what HBM holds and are in no plan: their usual value, and what they would change.
_DROPPED: Mapping[str, tuple[Any, str]] = {
    "scan_layers": (
        True,
        "layers that are no loop hold gradients of many at once: half as much again",
    ),
    "parameter_memory_host_offload": (False, "parameters are taken to lie on the device"),
}
_MOST_LAYERS = 10**5
# Chips for which today's compiler gathers no weights asynchronously, asked to or not: all twenty
# and more programs in shardsim/xla/trainers/programs.json (MaxText 0.2.5).
_SYNCHRONOUS = ("v5p", "v6e")


def read_maxtext(
    path: Path, text: str, machine: str | None, base: Path | None = None
) -> tuple[Plan, list[str], list[NotCarried]]:
    """Return the plan of a MaxText config, remarks on how it was read, and what is not carried.

    `base` is the base.yml of the release that it was written for.
    """
    given, flags, names = _given(path, text)
    old = any(key in names for key in KEYS_OF_2023) and not any(key in names for key in KEYS_SINCE)
    notes = ["read with the defaults of MaxText " + ("of December 2023" if old else "0.2.5")]
    defaults = OF_2023 if old else CURRENT
    if base is not None:
        release = read_yaml(base)
        if not isinstance(release, Mapping):
            raise FileError(f"{base}: expected MaxText's keys")
        defaults = {**defaults, **release}
        notes = [f"read with the defaults in {base}"]
    config = {**defaults, **given}
    slices = _machine(config, machine)
    model = _model(config, path, notes)
    plan = _plan(config, model, slices, flags)
    notes += [
        f"not carried: {key}: {why}"
        for key, (usual, why) in _DROPPED.items()
        if config[key] != usual
    ]
    if old and plan.attention == "flash":
        plan = replace(plan, attention="flash-2023")
    elif not old and slices.chip.name in _SYNCHRONOUS:
        plan = replace(plan, overlap=replace(plan.overlap, weights=False))
        notes.append(
            f"overlap: gathers of weights wait, as in MaxText's programs on {slices.chip.name}"
        )
    return replace(plan, activations=_activations(plan, config)), notes, []


def _given(path: Path, text: str) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """Return what a config sets, the compiler's flags beside it, and the names of all its keys.

    A value that a script takes from a variable of the shell is not known.
    """
    flags = dict(_FLAGS.findall(text))
    joined = re.sub(r"\\\r?\n", " ", text)
    commands = [
        line
        for line in joined.splitlines()
        if _COMMAND.search(line) and not line.lstrip().startswith("#")
    ]
    if path.suffix in (".yml", ".yaml") or not commands:
        data = parse_yaml(text, str(path))
        if not isinstance(data, Mapping):
            raise FileError(f"{path}: expected MaxText's keys, or a command with key=value words")
        given = dict(data)
        base = path.parent / str(given.get("base_config", ""))
        if base.is_file() and base != path:
            inherited = read_yaml(base)
            given = {**(inherited if isinstance(inherited, Mapping) else {}), **given}
        return given, flags, set(given)
    given = {}
    names = set()
    try:
        words = shlex.split(commands[-1])
    except ValueError as error:
        raise FileError(f"{path}: the command is not whole: {error}") from None
    for word in words:
        match = _WORD.fullmatch(word)
        if match:
            names.add(match[1])
        if match and "$" not in match[2]:
            given[match[1]] = parse_yaml(match[2], f"{path}: {match[1]}") if match[2] else ""
    if not given:
        raise FileError(f"{path}: its command sets no key=value")
    return given, flags, names


def _machine(config: Mapping[str, Any], machine: str | None) -> Machine:
    if machine is not None:
        return parse_machine(machine)
    name = config["compile_topology"]
    if not name:
        raise FileError("the config names no slice (compile_topology); give it: --on v5p:4x4x4")
    slices = config["compile_topology_num_slices"]
    count = slices if isinstance(slices, int) and slices > 0 else 1
    return parse_machine(f"{count}*{name}")


def _model(config: Mapping[str, Any], path: Path, notes: list[str]) -> Model:
    name = config.get("model_name")
    if name not in (None, "", "default"):
        try:
            model = load_model(
                str(name).replace("llama3.1", "llama3").replace("llama3.3", "llama3")
            )
        except ModelError as error:
            raise FileError(f"model_name: {error}") from None
        notes.append(f"model_name: {name} taken as {model.name}")
        return override_model(model, {"sequence": whole(config["max_target_length"], "sequence")})
    # Releases before August 2023 have no key for the block; theirs is the default one.
    block = config["decoder_block"]
    if block not in _BLOCKS:
        raise FileError(f"decoder_block: {block!r} is not modelled{nearest(block, _BLOCKS)}")
    words = config["mlp_activations"]
    if not isinstance(words, list) or not words:
        raise FileError("mlp_activations: expected a list, such as [silu, linear]")
    scales = _scales(whole(config["global_parameter_scale"], "global_parameter_scale"))
    heads = config.get("base_num_heads", config["base_num_query_heads"])

    def size(key: str, scale: int, value: Any = None) -> int:
        return whole(config[key] if value is None else value, key) * scale

    made = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:60].lstrip("._-") or "maxtext",
        "family": "decoder",
        "layers": size("base_num_decoder_layers", scales["layers"]),
        "embed": size("base_emb_dim", scales["embed"]),
        "mlp": size("base_mlp_dim", scales["heads"]),
        "heads": size("base_num_query_heads", scales["heads"], heads),
        "kv_heads": size(
            "base_num_kv_heads", scales["heads"], config.get("base_num_kv_heads", heads)
        ),
        "head_dim": size("head_dim", 1),
        "vocab": size("vocab_size", 1),
        "sequence": size("max_target_length", 1),
        "activation": str(words[0]),
        "gated_mlp": len(words) > 1,
        "causal": config["attention_type"] != "full",
        "tied_embeddings": bool(config["logits_via_embedding"]),
        "norm": "rmsnorm",
        "positions": "rotary",
        **_BLOCKS[block],
    }
    if made["positions"] == "learned" and config["trainable_position_size"] == -1:
        made["positions"] = "none"
    return load_model(made)


def _scales(scale: int) -> dict[str, int]:
    """Return how MaxText spreads `global_parameter_scale`, a power of two, over the sizes.

    Source: MaxText/pyconfig.py, get_individual_scales: heads and MLP first, then width.
    """
    log = scale.bit_length() - 1
    if 2**log != scale:
        raise FileError(f"global_parameter_scale: must be a power of two, not {scale}")
    base, rest = divmod(log, 3)
    return {
        "heads": 2 ** (base + (rest > 0)),
        "embed": 2 ** (base + (rest > 1)),
        "layers": 2**base,
    }


def _plan(
    config: Mapping[str, Any], model: Model, machine: Machine, flags: Mapping[str, str]
) -> Plan:
    split = Split()
    for key, size in _sizes(config).items():
        split.add(key, size)
    mesh = split.mesh(machine, split.rest or "data")
    strategy = config.get("context_parallel_strategy", "all_gather")
    if strategy != "all_gather" and any(axis.name == "context" for axis in mesh):
        raise FileError(f"context_parallel_strategy: {strategy!r} is not modelled; all_gather is")
    steps = whole(config["gradient_accumulation_steps"], "gradient_accumulation_steps")
    each = number(config["per_device_batch_size"], "per_device_batch_size")
    remat = remat_named(
        str(config["remat_policy"]), {key: config[key] for key in TENSORS if key in config}
    )
    if remat is None:
        raise FileError(f"remat_policy: {shown(config['remat_policy'])} is not known")
    flash = config["attention"] in ("flash", "autoselected")
    old = machine.chip.name in ("v2", "v3", "v4")  # overlap is opt-in there
    gathers = not old or flags.get("xla_enable_async_all_gather") == "true"
    permutes = not old or flags.get("xla_enable_async_collective_permute") == "true"
    optimizer = _OPTIMIZERS.get(str(config["opt_type"]))
    if optimizer is None:
        raise FileError(f"opt_type: {config['opt_type']!r} is not modelled")
    weights, gradients = (_format(config, key) for key in ("weight_dtype", "grad_dtype"))
    if optimizer == "adamw":
        mu = _format(config, "mu_dtype") if config["mu_dtype"] else weights
        optimizer += "-bf16-mu" if mu == "bf16" else ""
    parameters, activations, _ = rules_by_name([axis.name for axis in mesh])
    return Plan(
        name=model.name,
        model=model,
        machine=machine,
        batch=max(1, math.floor(each * machine.devices)) * steps,
        sequence=whole(config["max_target_length"], "max_target_length"),
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        remat=Remat((remat,)),
        microbatches=steps,
        overlap=Overlap(
            matmul="bidirectional" if permutes else "off", weights=gathers, gradients=False
        ),
        precision=Precision(
            compute="bf16" if config["dtype"] == "bfloat16" else "f32",
            parameters=weights,
            state="bf16" if weights == "bf16" else "",  # moments are as the weights are
            # A loop over layers carries gradients of weights in bf16 as such, and casts them after.
            gradients="" if "bf16" not in (gradients, weights) or weights == "bf16" else "bf16",
        ),
        vocab_tiles=whole(config["num_vocab_tiling"], "num_vocab_tiling"),
        offload_optimizer=bool(config["optimizer_memory_host_offload"]),
        optimizer=optimizer,
        attention="flash" if flash else "unfused",
        compiler_options={key: flags[key] for key in _CARRIED if key in flags},
    )


def _format(config: Mapping[str, Any], key: str) -> str:
    """Return the format that a key names."""
    formats = {"bfloat16": "bf16", "float32": "f32"}
    if config[key] not in formats:
        raise FileError(f"{key}: {config[key]!r} is not modelled{nearest(config[key], formats)}")
    return formats[config[key]]


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of the mesh by MaxText's keys; lists go with `mesh_axes`."""
    axes = config["mesh_axes"]
    sizes = {
        re.sub("^(ici|dcn)_sequence_", r"\1_context_", key): value  # both gather keys and values
        for key, value in config.items()
        if re.fullmatch(r"(ici|dcn)_\w+_parallelism", key) and value not in (1, "1")
    }
    for over in ("ici", "dcn"):
        values = config.get(f"{over}_parallelism")
        if isinstance(values, list) and isinstance(axes, list):
            if len(values) != len(axes):
                raise FileError(f"{over}_parallelism: one size for each of mesh_axes")
            sizes |= {
                f"{over}_{axis}_parallelism": size
                for axis, size in zip(axes, values, strict=True)
                if size != 1
            }
            sizes.pop(f"{over}_fsdp_parallelism", None) if "fsdp" not in axes else None
    if sizes.get("dcn_data_parallelism") == -1:
        del sizes["dcn_data_parallelism"]
    return sizes


def _activations(plan: Plan, config: Mapping[str, Any]) -> Rules:
    """Return the activation rules with the residual split as the config's logical rules do."""
    tensor = plan.parameters.get("heads", ())
    rules = config["logical_axis_rules"]
    if not tensor or not isinstance(rules, list):
        return plan.activations
    by: dict[str, set[str]] = {}
    for rule in rules:
        if isinstance(rule, list) and len(rule) == 2:
            axes = [rule[1]] if isinstance(rule[1], str) else rule[1] or []
            by.setdefault(str(rule[0]), set()).update(map(str, axes))
    split = {
        "embed": "tensor" in by.get("activation_embed", ()),
        "seq": bool({"tensor", "tensor_sequence"} & by.get("activation_norm_length", set())),
    }
    changed = dict(plan.activations)
    for logical in ("embed", "seq"):
        rest = tuple(axis for axis in changed.get(logical, ()) if axis not in tensor)
        wanted = rest + (
            tensor if split[logical] and not (logical == "seq" and split["embed"]) else ()
        )
        changed[logical] = wanted
    return {logical: axes for logical, axes in changed.items() if axes}
