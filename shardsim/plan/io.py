"""Plan files: reading, checking and writing them as YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from shardsim.errors import (
    FileError,
    HardwareError,
    ModelError,
    PlanError,
    expect,
    instead,
    is_bool,
    nearest,
    shown,
)
from shardsim.files import EXPONENT_FLOAT, check_keys, data_folder, read_yaml, write_text
from shardsim.kinds import PLAN, other_kind
from shardsim.machine import Machine, parse_machine
from shardsim.model import Model, load_model, model_names
from shardsim.plan.compiler_options import parse_compiler_options
from shardsim.plan.legality import check
from shardsim.plan.lengths import parse_lengths
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.placement import place
from shardsim.plan.plan import (
    ACCUMULATION,
    ATTENTION,
    CONTEXT_KEYS,
    CONTEXT_ORDERS,
    EXCHANGES,
    EXECUTION,
    MATMUL_OVERLAP,
    OP_COSTS,
    PIPELINE_SCHEDULES,
    Context,
    MeshAxis,
    Overlap,
    Plan,
    Routing,
    Rules,
)
from shardsim.plan.precision import DTYPE_BYTES, PRODUCTS, Precision, check_multiplied
from shardsim.plan.remat import parse_remat
from shardsim.plan.resolve import resolve
from shardsim.units import show_number

LARGEST = 10**9  # of batch, sequence and every size
MOST_AXES = 16
MOST_STAGES = 10**4
# What words stand for where a mapping belongs.
_WORDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "overlap": {"matmul": MATMUL_OVERLAP},
    "precision": {"compute": tuple(DTYPE_BYTES)},
    "experts": {"exchange": EXCHANGES},
    "context": {"keys": CONTEXT_KEYS, "order": CONTEXT_ORDERS},
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": tuple(OPTIMIZERS),
    "attention": ATTENTION,
    "pipeline_schedule": PIPELINE_SCHEDULES,
    "accumulation": ACCUMULATION,
    "execution": EXECUTION,
    "op_costs": OP_COSTS,
}
_AXES_IN_WORDS = re.compile(r"\w{1,40}=\d{1,9}(,\w{1,40}=\d{1,9}){0,15}")
_AXIS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")

FLAGS = ("fused_projections", "offload_optimizer", "offload_parameters", "forward_only")
KEYS = (
    *("name", "note", "model", "machine", "batch", "sequence", "mesh", "rules", "remat"),
    *("microbatches", "overlap", "precision", "optimizer", "attention", "fused_projections"),
    *("pipeline_schedule", "pipeline_interleave", "stage_layers", "accumulation", "vocab_tiles"),
    *("offload_optimizer", "offload_parameters", "execution", "compiler_options", "op_costs"),
    *("experts", "context", "lengths", "forward_only"),
)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file; a bare name is looked up among the plans that ship with shardsim."""
    expect(path, str | os.PathLike, "plan: expected a Plan, a file or a name")
    target = Path(path)
    if not str(path):
        raise PlanError("a plan's name is empty; give a file, or the name of a shipped plan")
    if not os.path.exists(path) and os.sep not in str(path):
        shipped = data_folder("plans")
        for name in (target.name, f"{target.name}.yaml"):
            if os.path.isfile(shipped / name):
                target = shipped / name
                break
        else:
            names = [file.stem for file in shipped.glob("*.yaml")]
            raise PlanError(f"{path}: no such file, nor a plan of that name{nearest(path, names)}")
    return plan_from_data(read_yaml(target), str(path), default_name=target.stem)


PlanOrPath = Plan | str | os.PathLike[str]  # or the name of a shipped plan


def as_plan(plan: PlanOrPath) -> Plan:
    """Return a plan, or the one that a path or the name of a shipped one stands for."""
    return plan if isinstance(plan, Plan) else load_plan(plan)


def plan_names() -> list[str]:
    """Return the names of the plans that ship with shardsim."""
    return sorted(file.stem for file in data_folder("plans").glob("*.yaml"))


def plan_from_data(
    data: Any,
    where: str,
    default_name: str = "plan",
    machine: Machine | None = None,
    model: Model | None = None,
    uneven: bool = False,
) -> Plan:
    """Build a plan from what a plan file holds; `where` starts every error message.

    `machine` and `model` replace those that the file names (they may have been overridden).
    `uneven` accepts sizes that do not divide, which some trainers pad.
    """
    if other := other_kind(data, PLAN):
        raise PlanError(f"{where}: {other}")
    try:
        plan = _build(data, default_name, machine, model, where)
        for key in ("compute", "parameters", "reduce"):
            check_multiplied(plan.machine, getattr(plan.precision, key), key)
        layout = resolve(plan)
        if not uneven:
            check(plan, layout)
    except (PlanError, ModelError, HardwareError, FileError) as error:
        raise type(error)(f"{where}: {error}") from None
    return plan


def _build(
    data: Any, default_name: str, machine: Machine | None, model: Model | None, where: str
) -> Plan:
    check_keys(
        data,
        where="plan",
        allowed=KEYS,
        required=("model", "machine", "batch", "mesh"),
        error=PlanError,
    )
    machine = machine or parse_machine(_text(data["machine"], "machine"))
    model = model or load_model(data["model"])
    rules = check_keys(
        _given(data, "rules", {}),
        where="rules",
        allowed=("parameters", "activations", "optimizer"),
        error=PlanError,
        words={"parameters": ("{embed: [fsdp]}",)},
    )
    switches = {}
    for key, form in (("overlap", Overlap), ("precision", Precision)):
        given = _given(data, key, {})
        allowed = tuple(form.__dataclass_fields__)
        check_keys(given, where=key, allowed=allowed, error=PlanError, words=_WORDS[key])
        switches[key] = form(**{name: _switch(given[name], f"{key}.{name}") for name in given})
    for name in ("weights", "gradients", "dcn"):
        if not isinstance(getattr(switches["overlap"], name), bool):
            value = getattr(switches["overlap"], name)
            raise PlanError(f"overlap.{name}: must be true or false{instead(value, is_bool)}")
    apart = {"experts": Routing.__dataclass_fields__, "context": Context.__dataclass_fields__}
    routing, context = (_given(data, key, {}) for key in apart)
    for given, (key, fields) in zip((routing, context), apart.items(), strict=True):
        allowed = tuple(fields)
        check_keys(given, where=key, allowed=allowed, error=PlanError, words=_WORDS[key])
    flags = {key: data.get(key, False) for key in FLAGS}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise PlanError(f"{key}: must be true or false{instead(value, is_bool)}")
    return Plan(
        name=_text(_given(data, "name", default_name), "name"),
        note=_text(_given(data, "note", ""), "note"),
        model=model,
        machine=machine,
        batch=_count(data["batch"], "batch"),
        sequence=_count(_given(data, "sequence", model.sequence), "sequence"),
        mesh=_mesh(data["mesh"], machine),
        parameters=_rules(rules.get("parameters"), "rules.parameters", kv_from_heads=True),
        activations=_rules(rules.get("activations"), "rules.activations", kv_from_heads=True),
        optimizer_rules=_rules(rules.get("optimizer"), "rules.optimizer"),
        remat=parse_remat(data.get("remat", "full"), "remat", model.layers),
        microbatches=_count(data.get("microbatches", 1), "microbatches"),
        overlap=switches["overlap"],  # type: ignore[arg-type]
        precision=switches["precision"],  # type: ignore[arg-type]
        optimizer=_text(data.get("optimizer", "adamw"), "optimizer"),
        attention=_text(data.get("attention", "flash"), "attention"),
        pipeline_schedule=_text(data.get("pipeline_schedule", "1f1b"), "pipeline_schedule"),
        accumulation=_text(data.get("accumulation", "repeated"), "accumulation"),
        pipeline_interleave=_count(data.get("pipeline_interleave", 1), "pipeline_interleave"),
        stage_layers=_layers_of_stages(_given(data, "stage_layers", [])),
        vocab_tiles=_count(data.get("vocab_tiles", 1), "vocab_tiles"),
        **flags,
        execution=_text(data.get("execution", "explicit"), "execution"),
        op_costs=_text(_given(data, "op_costs", "calibrated"), "op_costs"),
        experts=Routing(**routing),
        context=Context(**context),
        lengths=parse_lengths(data.get("lengths"), where, model.patch),
        compiler_options=parse_compiler_options(_given(data, "compiler_options", {})),
    )


def _layers_of_stages(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MOST_STAGES:
        raise PlanError(
            f"stage_layers: expected the layers of each stage, as [10, 12, 12, 6], found "
            f"{shown(value)}"
        )
    return tuple(value)


def _given(data: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return what `data` gives for `key`; an empty entry counts as none."""
    value = data.get(key)
    return default if value is None else value


def _switch(value: Any, where: str) -> Any:
    # YAML 1.1 reads a bare `off` as false.
    if where == "overlap.matmul" and value is False:
        return "off"
    if where == "precision.bf16":
        return _words(value, where)
    if where == "precision.sparsity" and isinstance(value, int) and value:
        raise PlanError(  # YAML 1.1 reads a bare 2:4 as two minutes and four seconds
            f"{where}: expected n:m in quotes, as '2:4'; without them YAML reads a number, here "
            f"{shown(value)}"
        )
    if not isinstance(value, (str, bool)):
        hint = instead(value, lambda meant: isinstance(meant, (str, bool)))
        raise PlanError(f"{where}: {shown(value)} is not possible{hint}")
    return value


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        hint = f"; write [{value}]" if isinstance(value, str) and value in PRODUCTS else ""
        raise PlanError(f"{where}: expected a list of words, found {shown(value)}{hint}")
    return tuple(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        hint = instead(value, _CHOICES.get(where, ()))
        hint = ", such as v5p:4x4x4" if where == "machine" else hint
        raise PlanError(f"{where}: expected text, found {shown(value)}{hint}")
    return value


def _mesh(data: Any, machine: Machine) -> tuple[MeshAxis, ...]:
    if not isinstance(data, Mapping) or not data:
        example = "such as {data: 128, model: 8}"
        if isinstance(data, str) and _AXES_IN_WORDS.fullmatch(data):
            example = f"as {{{data.replace('=', ': ').replace(',', ', ')}}}"
        raise PlanError(f"mesh: expected axis names, each with a size, {example}")
    if len(data) > MOST_AXES:
        raise PlanError(f"mesh: {len(data)} axes are too many; at most {MOST_AXES}")
    axes = {}
    for name, entry in data.items():
        where = f"mesh.{name}"
        if not isinstance(name, str) or not _AXIS_NAME.fullmatch(name):
            raise PlanError(
                f"mesh: an axis is called by letters, digits and _, such as data, not {shown(name)}"
            )
        if not isinstance(entry, Mapping):
            entry = {"size": entry}
        check_keys(
            entry, where=where, allowed=("size", "torus"), required=("size",), error=PlanError
        )
        axes[name] = (_count(entry["size"], f"{where}.size"), entry.get("torus"))
    if all(torus is None for _, torus in axes.values()):
        return place({name: size for name, (size, _) in axes.items()}, machine)
    lengths = {axis.name: axis.length for axis in machine.axes} | {"dcn": machine.slices}
    mesh = []
    for name, (size, torus) in axes.items():
        where = f"mesh.{name}.torus"
        if torus is None and size == 1:
            torus = {}
        if torus is None:
            raise PlanError(f"{where}: missing; give it for every mesh axis or for none")
        if isinstance(torus, list):
            for axis in torus:
                if not isinstance(axis, str) or axis not in lengths:
                    raise PlanError(
                        f"{where}: {machine.name} has no axis '{axis}'{nearest(axis, lengths)}"
                    )
            torus = {axis: lengths[axis] for axis in torus}
        if not isinstance(torus, Mapping):
            raise PlanError(f"{where}: expected torus axes, such as [x, y] or {{x: 8, y: 2}}")
        factors = {str(axis): _count(part, f"{where}.{axis}") for axis, part in torus.items()}
        mesh.append(MeshAxis(name=name, size=size, torus=factors))
    return tuple(mesh)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        hint = instead(value, lambda meant: type(meant) is int and 0 < meant <= LARGEST)
        raise PlanError(f"{where}: must be a positive whole number, not {shown(value)}{hint}")
    if value > LARGEST:
        raise PlanError(f"{where}: must be at most {LARGEST:,}, not {show_number(value)}")
    return value


def _rules(data: Any, where: str, kv_from_heads: bool = False) -> Rules:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise PlanError(
            f"{where}: expected logical axes with the mesh axes that split them, such as "
            "{embed: [fsdp]}"
        )
    rules = {}
    for logical, axes in data.items():
        if axes is None:
            continue
        axes = [axes] if isinstance(axes, str) else axes
        if not isinstance(axes, list) or not all(isinstance(axis, str) for axis in axes):
            raise PlanError(f"{where}.{logical}: expected a mesh axis or a list of them")
        rules[str(logical)] = tuple(axes)
    if kv_from_heads and "heads" in rules:
        rules.setdefault("kv_heads", rules["heads"])
    return rules


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """Return what a plan file holds, as plain data; `plan_from_data` reads it back."""
    model = plan.model
    data: dict[str, Any] = {"name": plan.name}
    if plan.note:
        data["note"] = plan.note
    data |= {
        "model": _model_data(model),
        "machine": plan.machine.name,
        "batch": plan.batch,
        "sequence": plan.sequence,
        "mesh": {axis.name: {"size": axis.size, "torus": dict(axis.torus)} for axis in plan.mesh},
        "rules": {
            kind: {logical: list(axes) for logical, axes in rules.items()}
            for kind, rules in (
                ("parameters", plan.parameters),
                ("activations", plan.activations),
                ("optimizer", plan.optimizer_rules),
            )
            if rules
        },
        "remat": plan.remat.to_data(),
        "microbatches": plan.microbatches,
        "overlap": {
            "matmul": plan.overlap.matmul,
            "weights": plan.overlap.weights,
            "gradients": plan.overlap.gradients,
            "dcn": plan.overlap.dcn,
        },
        "precision": _precision_data(plan.precision),
        "optimizer": plan.optimizer,
        "attention": plan.attention,
        "fused_projections": plan.fused_projections,
    }
    defaults = {"pipeline_schedule": "1f1b", "pipeline_interleave": 1, "accumulation": "repeated"}
    data |= {key: getattr(plan, key) for key in defaults if getattr(plan, key) != defaults[key]}
    if plan.stage_layers:
        data["stage_layers"] = list(plan.stage_layers)
    if plan.vocab_tiles != 1:
        data["vocab_tiles"] = plan.vocab_tiles
    for flag in ("offload_optimizer", "offload_parameters", "forward_only"):
        if getattr(plan, flag):
            data[flag] = True
    if plan.execution != "explicit":
        data["execution"] = plan.execution
    if plan.compiler_options:
        data["compiler_options"] = dict(plan.compiler_options)
    if plan.experts != Routing():
        data["experts"] = asdict(plan.experts)
    if plan.context != Context():
        usual = asdict(Context())
        chosen = asdict(plan.context).items()
        data["context"] = {key: value for key, value in chosen if value != usual[key]}
    if plan.lengths is not None:
        data["lengths"] = plan.lengths.to_data()
    if plan.op_costs != "calibrated":
        data["op_costs"] = plan.op_costs
    return data


def _precision_data(precision: Precision) -> dict[str, Any]:
    """Return the formats that every file says, and what else is not as usual."""
    usual = asdict(Precision())
    every = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(precision).items()}
    said = ("compute", "parameters", "reduce")
    data = {key: every[key] for key in said}
    return data | {key: v for key, v in every.items() if getattr(precision, key) != usual[key]}


def _model_data(model: Model) -> str | dict[str, Any]:
    """Return a preset's name, or every option of a model that is none."""
    if model.name in model_names() and load_model(model.name) == model:
        return model.name
    return model.to_mapping()


class _Dumper(yaml.SafeDumper):
    """Block style outside, flow style for the innermost mappings and lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: _Dumper, data: Any) -> Any:
    values = data.values() if isinstance(data, Mapping) else data
    flat = not any(isinstance(value, Mapping) for value in values)
    tag = "tag:yaml.org,2002:map" if isinstance(data, Mapping) else "tag:yaml.org,2002:seq"
    if isinstance(data, Mapping):
        return dumper.represent_mapping(tag, data.items(), flow_style=flat)
    return dumper.represent_sequence(tag, data, flow_style=flat)


_Dumper.add_representer(dict, _represent)
_Dumper.add_representer(list, _represent)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_FLOAT, list("-+0123456789"))


def dump_plan(plan: Plan) -> str:
    """Return the text of a plan file."""
    return dump_yaml(plan_to_data(plan))


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Return plain data as the YAML of a plan's or a model's file."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=96)
    return text


def save_plan(plan: PlanOrPath, path: str | os.PathLike[str]) -> None:
    """Write a plan file, whole or not at all."""
    write_text(path, dump_plan(as_plan(plan)))
