"""`export --over CONFIG`: a trainer's config that was imported, with what a plan changes of it.

Only keys are written in which the plan differs from the config's own, at their place in its text;
all else, also what is in no plan, stays to the letter. What was written is imported again, and has
to give the plan: a plan that would need more (rules of its own, another model) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from shardsim.emit.dialects import maxtext_tables
from shardsim.emit.dialects.levanter import levanter_code
from shardsim.errors import PlanError
from shardsim.files import read_text
from shardsim.plan import Plan, resolve
from shardsim.plan.remat import Policy
from shardsim.validate.imports import import_text
from shardsim.validate.imports.levanter import INCLUDE
from shardsim.validate.imports.maxtext_attention import CONTEXTS
from shardsim.validate.imports.maxtext_given import is_script, last_command
from shardsim.validate.imports.maxtext_remat import NAMES
from shardsim.validate.round_trip import said_by, shown_of
from shardsim.validate.words import REMAT_POLICIES

FORMS = ("maxtext", "levanter")
# What of a plan is not the trainer's to say: how others call it, and what compilers are told.
_OWN = ("name", "note", "op_costs", "own_chip", "execution", "compiler_options", "overlap")
_ELSEWHERE = "_included_"
_OWN_OF = {"maxtext": _OWN, "levanter": (*_OWN, "model")}
_AXES = ("data", "fsdp", "context", "tensor", "expert", "pipeline")


def export_over(plan: Plan, form: str, config: str) -> str:
    """Return the text of a config with what `plan` changes of it.

    Raises `PlanError` where the trainer's config cannot say the plan.
    """
    if form not in FORMS:
        raise PlanError(
            f"export over a config: of {', '.join(FORMS)}; what is written for {form} changes a "
            "config by itself"
        )
    path = Path(config)
    text = read_text(path)
    machine = plan.machine.name
    before = import_text(path, text, form, machine=machine).plan
    if form == "maxtext":
        made = _maxtext(text, before, plan, is_script(path, text))
    else:
        made = _levanter(text, before, plan)
    found = import_text(path, made, form, machine=machine).plan
    own, theirs = _meaning(plan, form), _meaning(found, form)
    for key in {**own, **theirs}:
        if (wanted := own.get(key)) != (gives := theirs.get(key)):
            raise PlanError(
                f"export over {config}: {key}: {shown_of(wanted, plan, gives)} cannot be said "
                f"in its keys, which give {shown_of(gives, plan, wanted)}; leave --over out "
                "for a file of its own"
            )
    return made


def _meaning(plan: Plan, form: str) -> dict[str, Any]:
    """Return what a plan says that a config of the trainer has to say, by name."""
    said = said_by(plan)
    mine = {key: said[key] for key in said if key.partition(".")[0] not in _OWN_OF[form]}
    tensors = {} if form == "levanter" else {"model": plan.model.tensors}
    return {**mine, **tensors, "weights": plan.model.parameters_all}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in after.items() if before.get(key) != value}


def _maxtext(text: str, before: Plan, plan: Plan, script: bool) -> str:
    """Return MaxText's YAML, or script, with the keys of the plan that differ."""
    after = maxtext_keys(plan)
    changed = _changed(maxtext_keys(before), after)
    if any(key.endswith("_parallelism") for key in changed):
        # Axes that are counted with others, as ici_fsdp_transpose_parallelism, are none any more.
        others = re.findall(r"(?<![\w.])((?:ici|dcn)_\w+_parallelism)\s*[:=]", text)
        others = [key for key in dict.fromkeys(others) if key not in after]
        sizes = {key: size for key, size in after.items() if key.startswith(("ici_", "dcn_"))}
        if others:
            changed |= {key: size for key, size in sizes.items() if size > 1}
            changed |= dict.fromkeys(others, 1)
    if after["remat_policy"] == "custom":
        kept = [name for name in NAMES if re.search(rf"(?<![\w.]){name}\s*[:=]", text)]
        changed |= dict.fromkeys((name for name in kept if name not in after), "remat")
    return _script_with(text, changed) if script else _yaml_with(text, changed)


def maxtext_keys(plan: Plan) -> dict[str, Any]:
    """Return MaxText's keys for everything of a plan but its model."""
    layout, machine = resolve(plan), plan.machine
    keys: dict[str, Any] = {}
    by_sequence = plan.activations.get("seq", ())
    for key in ("ici", "dcn"):
        keys |= {f"{key}_{name}_parallelism": 1 for name in (*_AXES, "tensor_sequence")}
    for axis in plan.mesh:
        role = next((one for one, names in layout.names.items() if axis.name in names), "")
        if role not in _AXES:
            if axis.size == 1:
                continue
            raise PlanError(f"export over a config: MaxText has no axis for '{axis.name}'")
        name = role
        if name == "tensor" and axis.name in by_sequence:
            name = "tensor_sequence"
        over = axis.torus.get("dcn", 1)
        keys[f"ici_{name}_parallelism"] = axis.size // over
        keys[f"dcn_{name}_parallelism"] = over
    stages = int(layout.pipeline.size)
    steps = 1 if stages > 1 else plan.microbatches
    share = Fraction(plan.batch, machine.devices * steps)
    if stages > 1:
        keys["num_pipeline_microbatches"] = plan.microbatches
        keys["num_pipeline_repeats"] = plan.pipeline_interleave
    precision = plan.precision
    adam = "bfloat16" if plan.optimizer.endswith("-bf16-mu") else ""
    narrow = precision.compute in ("int8", "fp8")
    formats = maxtext_tables.DTYPES
    return keys | {
        "per_device_batch_size": int(share) if share.denominator == 1 else float(share),
        "gradient_accumulation_steps": steps,
        "max_target_length": plan.sequence,
        **_remat(plan),
        "attention": "flash" if plan.attention.startswith("flash") else "dot_product",
        "dtype": "bfloat16" if narrow else formats.get(precision.compute, precision.compute),
        "quantization": precision.compute if narrow else "",
        "weight_dtype": formats.get(precision.parameters, precision.parameters),
        "grad_dtype": "bfloat16" if precision.gradients == "bf16" else "float32",
        "mu_dtype": adam,
        "opt_type": "sgd" if plan.optimizer == "sgd" else "adamw",
        "num_vocab_tiling": plan.vocab_tiles,
        "optimizer_memory_host_offload": plan.offload_optimizer,
        "parameter_memory_host_offload": plan.offload_parameters,
        "shard_optimizer_over_data": bool(plan.optimizer_rules.get("embed")),
        "use_ring_of_experts": plan.experts.exchange == "ring",
        **_context(plan),
    }


def _context(plan: Plan) -> dict[str, Any]:
    """Return how members of a context axis attend: what MaxText does anyway where there is none."""
    layout = resolve(plan)
    alone = int(layout.context.size) == 1
    strategies = {keys: strategy for strategy, keys in CONTEXTS.items()}
    keys = "gathered" if alone else plan.context.keys
    if keys not in strategies:
        raise PlanError(f"export over a config: context.keys: MaxText has no {keys}")
    return {
        "context_parallel_strategy": strategies[keys],
        "context_parallel_load_balance": alone or bool(layout.striped),
    }


def _remat(plan: Plan) -> dict[str, Any]:
    """Return the name of a policy, or a custom one with its arrays."""
    policy = plan.remat.only("MaxText")
    own: tuple[str, ...] = (
        "full",
        "minimal",
        "minimal_with_context",
        "save_qkv_proj",
        "save_out_proj",
    )
    own += ("qkv_proj_offloaded", "minimal_offloaded", "save_dot_except_mlp")
    named = next((name for name in own if _same(REMAT_POLICIES[name], policy)), None)
    if named:
        return {"remat_policy": named}
    if "rest" in policy.save | policy.offload:
        raise PlanError(
            "export over a config: remat: MaxText cannot keep everything of a scanned layer, as "
            f"'{plan.remat.name}' does; choose dots_and_context for the most that it keeps"
        )
    keys: dict[str, Any] = {"remat_policy": "custom"}
    for where, tensors in (("device", policy.save), ("offload", policy.offload)):
        for tensor in sorted(tensors):
            names = maxtext_tables.REMAT.get(tensor)
            if names is None:
                raise PlanError(f"export over a config: remat: MaxText has no array for '{tensor}'")
            if tensor == "mlp_hidden" and plan.model.gated_mlp:
                names = maxtext_tables.GATED_HIDDEN
            if tensor == "context" and plan.attention == "unfused":
                names = ("attention_out",)
            keys |= dict.fromkeys(names, where)
    return keys


def _same(one: Policy, other: Policy) -> bool:
    """Return whether they keep the same, but for sums of norms, which have no name in MaxText."""
    return (one.save, one.offload) == (other.save - {"statistics"}, other.offload)


def _word(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value or "''"


def _yaml_with(text: str, changed: Mapping[str, Any]) -> str:
    """Return YAML with keys at the margin changed, and those that it lacks behind it."""
    for key, value in changed.items():
        line = f"{key}: {_word(value)}"
        # A key's lines: its own, and those indented (or items) behind it.
        pattern = re.compile(rf"^{key}[ ]*:.*(?:\n(?:[ \t]+\S|- ).*)*", re.M)
        text, found = pattern.subn(lambda _, line=line: line, text)  # type: ignore[misc]
        if not found:
            text = f"{text.rstrip()}\n{line}\n"
    return text


def _script_with(text: str, changed: Mapping[str, Any]) -> str:
    """Return a script with words of its last command changed, and those that it lacks added."""
    start, first, end = last_command(text)
    command, more = text[start:end], ""
    for key, wanted in changed.items():
        word = f"{key}={_word(wanted)}"
        # A value ends before the backslash that goes on in the next line.
        value = r"(?:\"[^\"]*\"|'[^']*'|(?:[^\s\"'\\]|\\(?!\n))*)"
        pattern = re.compile(rf"(?<![\w.]){key}={value}")
        if pattern.search(command):
            command = pattern.sub(lambda _, word=word: word, command)  # type: ignore[misc]
        else:
            more += f"{word} "
    at = first - start  # nothing in front of the first word changes
    return text[:start] + command[:at] + more + command[at:] + text[end:]


def _levanter(text: str, before: Plan, plan: Plan) -> str:
    """Return Levanter's YAML with what differs of its trainer section and of remat."""
    old, new = (yaml.safe_load(levanter_code(one)) for one in (before, plan))
    # A section of another file stays as it is written.
    data = yaml.safe_load(INCLUDE.sub(rf"\1: {_ELSEWHERE} \2", text))
    for section in ("trainer", "model"):
        changed = _changed(old.get(section, {}), new.get(section, {}))
        if section == "trainer" and plan.microbatches != before.microbatches:
            changed["per_device_parallelism"] = new[section]["per_device_parallelism"]
        dropped = [key for key in old.get(section, {}) if key not in new.get(section, {})]
        data[section] = {**data[section], **changed, **dict.fromkeys(dropped)}
    made: str = yaml.safe_dump(data, sort_keys=False, width=96)
    return made.replace(f": {_ELSEWHERE} ", ": !include ")
