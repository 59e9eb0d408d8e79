"""An AXLearn experiment as a plan: a run's `trainer_config`, or the name of a published one.

The rule of `mesh_rules` that matches the slice decides mesh, remat and accumulation, as with
AXLearn's `--mesh_selector`. Weights lie as its language models have them: the residual stream's
dimension over expert, fsdp and seq, heads and hidden layer over model.
Source: apple/axlearn@34aed43c, axlearn/common/{causal_lm,attention,trainer,utils}.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from shardsim.carried import BOTH, TIME, Keys, NotCarried
from shardsim.errors import FileError, nearest, shown
from shardsim.files import read_yaml
from shardsim.machine import Machine, parse_machine
from shardsim.model import load_model
from shardsim.plan import Plan
from shardsim.plan.layout import EMBED_SHARDED, REPLICATED
from shardsim.plan.precision import Precision, wire
from shardsim.plan.remat import Remat
from shardsim.plan.resolve import rules_by_name
from shardsim.validate.imports.axlearn_keys import EMBED, LIES, left_of
from shardsim.validate.imports.axlearn_model import USUAL, model_of
from shardsim.validate.imports.axlearn_text import (
    listed,
    matches,
    read_text_config,
    selector,
    under,
)
from shardsim.validate.words import Split

AXES: Mapping[str, str] = {
    "pipeline": "stage",
    "data": "data",
    "expert": "expert",
    "fsdp": "fsdp",
    "seq": "context",
    "model": "tensor",
}
_NAMED = Path(__file__).parents[1] / "data" / "axlearn.yaml"
_LAYER = "model.decoder.transformer.layer"
_KERNELS: tuple[str, ...] = ("FlashBlockSizeModifier", "SplashAttentionConfigModifier")
_KERNELS += ("V6eFlashConfigModifier", "V7xFlashConfigModifier")
# Names of what a layer makes -> the tensor of a plan. `context` has no name in flash attention.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "context": ("context",),
    "attention_output": ("o_proj",),
    "mlp_hidden": ("linear1_0", "linear1_1"),
    "mlp_output": ("linear2",),
    "layer_input": ("input",),
}
_FLASH = "flash_residuals"
_EVERYTHING = frozenset({*_NAMES, "rest"}) - {"layer_input"}
_DOTS = ".*[qkvo]_proj|.*linear1_[01]|.*linear2"
# Policies without patterns; "none" keeps everything.
_POLICIES: Mapping[str, Any] = {
    "nothing_saveable": {},
    "everything_saveable": "none",
    "dots_saveable": {"save": _DOTS},
    "dots_with_no_batch_dims_saveable": {"save": _DOTS},
    "offload_dots_saveable_policy": {"offload": _DOTS},
    "offload_attention_proj_policy": {"offload": ".*([qkvo]_proj|context)"},
}
_OPTIMIZERS: Mapping[str, str] = {
    "adamw_decoupled_optimizer": "adamw",
    "adamw_optimizer": "adamw",
    "adam_optimizer": "adamw",
    "adafactor_optimizer": "adafactor",
}
_WRAPPERS: tuple[str, ...] = ("chain", "clip_by_global_norm", "skip_and_clip_by_global_norm")
_WRAPPERS += ("scale_update_per_param", "per_param_scale_by_path")
_FORMATS = {"jax.numpy.float32": "f32", "jax.numpy.bfloat16": "bf16"}
# A run's steps take the batch that many times fewer, by version, in the variants for one host.
_ONE_HOST = {"v3": 128, "": 32}


@dataclass(frozen=True)
class Step:
    """What a mesh rule may change: the mesh by axis, remat, and microbatches."""

    inside: Mapping[str, int]
    over: Mapping[str, int] | None = None  # over slices, where the config says it
    remat: Mapping[str, str] | str = field(default_factory=dict)  # patterns: save, offload; or none
    microbatches: int = 1
    left: tuple[NotCarried, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """An experiment without its slice."""

    name: str
    model: Mapping[str, Any]
    batch: int
    attention: str
    step: Step
    optimizer: str = "adamw"
    compute: str = "bf16"
    parameters: str = "f32"
    sharding: tuple[str, ...] = ("expert", "fsdp", "seq")  # of the residual stream's dimension
    residual: bool = True  # whether the residual stream is split over model
    rules: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    left: tuple[NotCarried, ...] = field(default_factory=tuple)


def read_axlearn(
    path: Path, text: str | None, machine: str | None
) -> tuple[Plan, list[str], list[NotCarried]]:
    """Return the plan of a trainer config (or of a name: no text), and what is not carried."""
    found = named(str(path)) if text is None else _read(path, text)
    if machine is None:
        raise FileError("an AXLearn experiment names no slice; give it: --on v5p:4x4x4")
    slices = parse_machine(machine)
    step, notes = _chosen(found, slices)
    remat, partly = _remat(found, step)
    mesh = _mesh(step, slices)
    names = [axis.name for axis in mesh]
    parameters, activations, _ = rules_by_name(
        names,
        residual=EMBED_SHARDED if found.residual else REPLICATED,
        context_shards_parameters="seq" in found.sharding,
        expert_shards_parameters="expert" in found.sharding,
    )
    model = load_model({"name": found.name, **found.model})
    plan = Plan(
        name=found.name,
        model=model,
        machine=slices,
        batch=found.batch,
        sequence=model.sequence,
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        remat=remat,
        microbatches=step.microbatches,
        precision=Precision(
            compute=found.compute, parameters=found.parameters, reduce=wire(found.compute)
        ),
        optimizer=found.optimizer,
        attention=found.attention,
        execution="partitioned",
    )
    return plan, notes, [*found.left, *step.left, *partly]


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    table: Mapping[str, Mapping[str, Any]] = read_yaml(_NAMED)
    return table


def named(name: str) -> Experiment:
    """Return a published experiment; `-flash`, `-fp8` and `-single-host` may stand behind it."""
    stem, one_host = _without(name, "-single-host")
    stem, narrow = _without(stem, "-fp8")
    stem, flash = stem.replace("-flash", ""), "-flash" in stem  # gala-7B-flash-sp-rp
    table = _table()
    if stem not in table:
        raise FileError(
            f"no file, and no experiment of AXLearn that is known{nearest(stem, table)}"
        )
    data = table[stem]
    model = {**USUAL, **data["model"]}
    version = "v3" if "-v3" in stem else ""
    left = [NotCarried("-fp8", True, "AXLearn's 8-bit products are of GPUs alone")] * narrow
    lies = data.get("table", EMBED)
    if lies != EMBED:
        spec = [None, "model"] if lies == "width" else lies
        head = "" if model.get("tied_embeddings") else ", lm_head"
        left.append(NotCarried(f"token_emb{head}.param_partition_spec", spec, LIES, BOTH))
    return Experiment(
        name=name,
        model=model,
        batch=int(data["batch"]) // (_ONE_HOST[version] if one_host else 1),
        attention="flash" if flash else str(data.get("attention", "unfused")),
        optimizer=str(data.get("optimizer", "adamw")),
        step=_step(data),
        rules=tuple((str(pattern), change) for pattern, change in data.get("rules", ())),
        left=tuple(left),
    )


def _without(name: str, ending: str) -> tuple[str, bool]:
    return name.removesuffix(ending), name.endswith(ending)


def _step(data: Mapping[str, Any], usual: Step | None = None) -> Step:
    """Return a step of a table's keys; what they do not say is as in `usual`."""
    before = usual or Step(inside={})
    mesh = data.get("mesh")
    return Step(
        inside=mesh if mesh is not None else before.inside,
        over=data.get("over", before.over if mesh is None else None),
        remat=data.get("remat", before.remat),
        microbatches=int(data.get("microbatches", before.microbatches)),
        left=tuple(
            NotCarried(f"mesh_rules: {name}", value, why, tuple(could))
            for name, value, why, could in data.get("left", ())
        ),
    )


def _chosen(found: Experiment, machine: Machine) -> tuple[Step, list[str]]:
    """Return the step with the first rule that matches the slice, and which that is."""
    name = selector(machine)
    for pattern, change in found.rules:
        if matches(pattern, name):
            return _step(change, found.step), [f"mesh_rules: {name} matches {shown(pattern)}"]
    return found.step, [f"mesh_rules: none matches {name}; the experiment's own mesh"]


def _mesh(step: Step, machine: Machine) -> Any:
    """Return the mesh; without a word on slices the first axis that they divide goes over them.

    Source: axlearn/common/utils.py, create_device_mesh.
    """
    split = Split(experts=True)
    inside, over = dict(step.inside), dict(step.over or {})
    if step.over is not None:
        inside = _filled(inside, machine.devices_per_slice)
        over = _filled(over, machine.slices)
    else:
        inside = _filled(inside, machine.devices)
        if machine.slices > 1:
            axis = next((a for a in AXES if inside.get(a, 1) % machine.slices == 0), None)
            if axis is None:
                raise FileError(
                    f"mesh_shape: no axis of {inside} divides by the {machine.slices} slices"
                )
            inside[axis] //= machine.slices
            over = {axis: machine.slices}
    for sizes, into in ((inside, split.inside), (over, split.outside)):
        into |= {_role(axis): size for axis, size in sizes.items() if size > 1}
    return split.mesh(machine, None)


def _role(axis: str) -> str:
    return {"stage": "pipeline"}.get(AXES[axis], AXES[axis])


def _filled(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """Return sizes with -1 as what is left, as AXLearn infers it."""
    known = math.prod(size for size in sizes.values() if size > 0)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or devices % known or (not open_axes and known != devices):
        raise FileError(f"mesh_shape: {sizes} does not make {devices} devices")
    return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}


def _remat(found: Experiment, step: Step) -> tuple[Remat, list[NotCarried]]:
    """Return what the policy keeps; of a tensor that it keeps in part the plan keeps all."""
    flash = found.attention == "flash"
    if not isinstance(step.remat, Mapping):
        return Remat.of(save=_EVERYTHING), []
    kept: dict[str, list[str]] = {"save": [], "offload": []}
    left = []
    gated = bool(found.model.get("gated_mlp", True))
    for tensor, arrays in _NAMES.items():
        own = arrays if gated or tensor != "mlp_hidden" else ("linear1_0",)
        if tensor == "context" and flash:
            own = (_FLASH,)
        for where, tensors in kept.items():
            pattern = step.remat.get(where)
            some = [name for name in own if pattern and matches(pattern, f"layer.{name}")]
            if some and not (tensor == "layer_input" and where == "save"):
                tensors.append(tensor)
                if len(some) < len(own):
                    why = f"in the plan {tensor} is kept as a whole ({', '.join(own)})"
                    left.append(NotCarried(f"remat: {some[0]}", where, why, BOTH))
    for where, pattern in step.remat.items():
        if not kept[where]:
            left.append(NotCarried(f"remat: {where}", pattern, "names nothing of a layer", BOTH))
    offload = frozenset(kept["offload"])
    return Remat.of(save=frozenset(kept["save"]) - offload, offload=offload), left


def _read(path: Path, text: str) -> Experiment:
    """Return the experiment that a `trainer_config` says."""
    values = Keys(read_text_config(text), {})
    model, attention, pipelined = model_of(values)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:60].lstrip("._-") or "axlearn"
    batch = "input.input_dispatcher.global_logical_batch_size"
    if batch not in values:
        batch = "input.batcher.global_batch_size"
    axes = listed(values.given, "mesh_axis_names")
    if not isinstance(axes, list) or any(axis not in AXES for axis in axes):
        raise FileError(f"mesh_axis_names: {shown(axes)}: only {', '.join(AXES)} are read")
    mesh = _shape(values.given, "mesh_shape", axes)
    if mesh is None:
        raise FileError("mesh_shape: not said")
    remat = _policy(values.given, f"{_LAYER}.remat_spec")
    linear = listed(values.given, f"{_LAYER}.feed_forward.linear1.param_partition_spec")
    spread = linear[0] if linear else ["expert", "fsdp", "seq"]
    residual = listed(values.given, f"{_LAYER}.feed_forward.linear2.output_partition_spec")
    for key in (*values.given,):
        if (
            re.match(r"mesh_(shape|rules|axis_names)|batch_axis_names", key)
            or "_spec['policy']" in key
        ):
            values.read.add(key)
    optimizer = _optimizer(values)
    return Experiment(
        name=name,
        model={**model, "sequence": values.count("input.source.max_sequence_length")},
        batch=values.count(batch),
        attention=attention,
        optimizer=optimizer,
        compute=_format(values, "train_dtype"),
        parameters=_format(values, "model.dtype"),
        step=_step({**mesh, "remat": remat, "microbatches": pipelined}),
        sharding=tuple([spread] if isinstance(spread, str) else spread or ()),
        residual=bool(residual) and residual[-1] == "model",
        rules=tuple(_rules(values.given, axes)),
        left=tuple(left_of(values)),
    )


def _format(values: Keys, key: str) -> str:
    said = values.get(key, None)
    if said not in _FORMATS:
        raise FileError(f"{key}: {shown(said)} is not modelled{nearest(str(said), _FORMATS)}")
    return _FORMATS[str(said)]


def _shape(values: Mapping[str, Any], key: str, axes: list[str]) -> dict[str, Any] | None:
    """Return the sizes of a mesh, of one slice or of both kinds, as a table's keys."""
    found: dict[str, Any] = {}
    for name, own in (("mesh", key), ("mesh", f"{key}['ici_mesh_shape']")):
        sizes = listed(values, own)
        if sizes is not None:
            found[name] = _by_axis(sizes, axes, own)
    over = listed(values, f"{key}['dcn_mesh_shape']")
    if over is not None:
        found["over"] = _by_axis(over, axes, key)
    return found or None


def _by_axis(sizes: Any, axes: list[str], key: str) -> dict[str, int]:
    whole = isinstance(sizes, list) and all(type(size) is int and size for size in sizes)
    if not whole or len(sizes) != len(axes) or any(not -1 <= size <= 10**6 for size in sizes):
        raise FileError(f"{key}: {shown(sizes)}: expected a size for each of {', '.join(axes)}")
    return {axis: size for axis, size in zip(axes, sizes, strict=True) if size != 1}


def _policy(values: Mapping[str, Any], key: str) -> Any:
    """Return a remat spec as a table's: patterns of names that are saved and offloaded, or none."""
    if not any(one.startswith(key) for one in values):
        return "none"
    return _kept(values, f"{key}['policy']")


def _kept(values: Mapping[str, Any], key: str) -> Any:
    said = values.get(key, values.get(f"{key}.fn"))
    name = str(said).rpartition(".")[2]
    if "names_regex" in name:
        patterns = under(values, f"{key}.names_which_can_be_")
        for pattern in patterns.values():
            if pattern is not None and not isinstance(pattern, str):
                raise FileError(f"{key}: {shown(pattern)}: expected a pattern of names")
        return {
            where: patterns[said]
            for where, said in (("save", "saved"), ("offload", "offloaded"))
            if patterns.get(said)
        }
    if name == "combine_remat_policies":
        first, second = (_kept(values, f"{key}.{one}") for one in ("policy_1", "policy_2"))
        if "none" in (first, second):
            return "none"
        return {
            where: "|".join(one[where] for one in (first, second) if where in one)
            for where in ("save", "offload")
            if where in first or where in second
        }
    if name == "policy" and "flash_attention.remat" in str(said):
        return {"save": f".*{_FLASH}"}
    if name not in _POLICIES:
        raise FileError(f"{key}: {shown(said)} is not modelled{nearest(name, _POLICIES)}")
    return _POLICIES[name]


def _rules(values: Mapping[str, Any], axes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield mesh rules as a table's: the pattern of an instance type, and what it changes."""
    number = 0
    while (key := f"mesh_rules[{number}]") and (pattern := values.get(f"{key}[0]")) is not None:
        number += 1
        inner = f"{key}[1]"
        if f"{inner}.klass" not in values:
            yield str(pattern), _shape(values, inner, axes) or {}
            continue
        change: dict[str, Any] = {"left": []}
        chain = f"{inner}.config_modifiers"
        many = 0
        while f"{chain}[{many}].klass" in values:
            _modify(values, f"{chain}[{many}]", axes, str(pattern), change)
            many += 1
        if not many:
            _modify(values, inner, axes, str(pattern), change)
        yield str(pattern), change


def _modify(
    values: Mapping[str, Any], key: str, axes: list[str], pattern: str, change: dict[str, Any]
) -> None:
    """Put what a modifier does into a rule's change, or among what is left."""
    name = str(values[f"{key}.klass"]).rpartition(".")[2]
    if name == "MeshShapeModifier":
        change |= _shape(values, f"{key}.mesh_shape", axes) or {}
    elif name == "GradientAccumulationModifier":
        change["microbatches"] = values[f"{key}.grad_acc_steps"]
    elif name == "RematSpecModifier":
        policies = f"{key}.remat_policies"
        layer = f"{policies}['{_LAYER}']"
        if not any(one.startswith(layer) for one in values):
            change["left"].append((name, pattern, "of another module than the layer", BOTH))
        elif pattern.startswith("tpu"):  # others are not read, as none of them can match
            change["remat"] = _policy(values, layer)
    else:
        kernel = name in _KERNELS
        why = "tiles of a kernel" if kernel else "a change of the config that is not read"
        change["left"].append((name, pattern, why, (TIME,) if kernel else BOTH))


def _optimizer(values: Keys) -> str:
    """Return the optimizer; what wraps it is known to keep no state of its own."""
    functions = {
        key: str(value).rpartition(".")[2]
        for key, value in values.given.items()
        if key.startswith("learner.optimizer") and key.endswith("fn")
    }
    schedules = [key for key in functions if ".schedule." in str(values.given[key])]
    own = [name for key, name in functions.items() if key not in schedules]
    found = [name for name in own if name in _OPTIMIZERS]
    strange = [name for name in own if name not in (*_OPTIMIZERS, *_WRAPPERS)]
    if strange or len(found) != 1:
        raise FileError(
            f"learner.optimizer: {shown((strange or found or ['nothing'])[0])} is not modelled"
            f"{nearest('', _OPTIMIZERS)}"
        )
    values.read.update(functions)
    return _OPTIMIZERS[found[0]]
