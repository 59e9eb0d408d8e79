"""What a trainer's file, just written for a plan, does not say of it: found by importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from shardsim.carried import BOTH, TIME, NotCarried, written
from shardsim.emit.dialects.nearest import differences, told_in
from shardsim.errors import ShardsimError
from shardsim.model import Tensor
from shardsim.plan import Plan, resolve
from shardsim.plan.layout import ROLES, AxisLayout
from shardsim.plan.plan import CONTEXT_ORDERS
from shardsim.validate.imports import import_text

FORMS: Mapping[str, str] = {
    "maxtext": "MaxText",
    "levanter": "Levanter",
    "big_vision": "big_vision",
}
# What changes a program of one's own, and leaves the rest of it.
_PARTS: Mapping[str, str] = {
    "axlearn": "model, batch, sequence, formats, optimizer and attention stay the config's own",
    "flax": "it lays out arrays; the program they are for, remat and all else is yours",
    "flax-linen": "it lays out arrays; the program they are for, remat and all else is yours",
    "keras": "it lays out arrays; the program they are for, remat and all else is yours",
}
# Named by the file, compared as `resolve` reads them, or by what they hold.
_APART = (
    *("name", "note", "model", "machine", "mesh", "parameters", "activations"),
    *("optimizer_rules", "remat"),
)
_TIME_ONLY = ("overlap", "op_costs")


def left_out(plan: Plan, text: str, form: str, path: str = "") -> list[NotCarried]:
    """Return each key of a plan that is another when the `text` of its export to `form` is
    imported again; `path` is the config that `text` was made of.

    What the text itself says of a difference is not said again. Of a form that is no config of its
    own there is one entry, on what it leaves; forms that hold all of a plan give none.
    """
    if form not in FORMS:
        why = _PARTS.get(form)
        return [NotCarried("model", plan.model.name, why, BOTH)] if why else []
    try:
        found = import_text(Path(path or "plan.yml"), text, form, machine=plan.machine.name).plan
    except ShardsimError as error:
        return [NotCarried("model", plan.model.name, f"the file alone gives no plan: {error}")]
    told = {_key(line.strip()) for line in told_in(text)}
    own, theirs = said_by(plan), said_by(found)
    models = [line for line in differences(plan.model, found.model) if _key(line) not in told]
    if form == "levanter" and not path and "\n  type: " not in text:
        models = ["defaults: Levanter has no such model, and its section is yours to write"]
        told.add("sequence")
    left = [
        NotCarried(
            key,
            _plain(own.get(key), plan),
            f"{FORMS[form]}'s file gives {written(_plain(theirs.get(key), plan))}",
            (TIME,) if key.startswith(_TIME_ONLY) else BOTH,
        )
        for key in {**own, **theirs}
        if own.get(key) != theirs.get(key) and key not in told
    ]
    if models:
        left.append(
            NotCarried("model", plan.model.name, f"the file gives {'; '.join(models)}", BOTH)
        )
    return left


def _key(line: str) -> str:
    return line.partition(":")[0]


def _plain(value: Any, plan: Plan) -> Any:
    return shown_of(value, plan, value) if isinstance(value, AxisLayout) else value


def said_by(plan: Plan) -> dict[str, Any]:
    """Return what a plan says, by key: axes by their roles, whatever they are called."""
    layout = resolve(plan)
    said: dict[str, Any] = {f"axes of {role}": layout.role(role) for role in ROLES}
    said |= {"machine": plan.machine.name, "residual": int(layout.residual)}
    said |= {"rules.optimizer": layout.optimizer_over_data, "remat": plan.remat.to_data()}
    said |= {"rules of context": layout.context_shards_parameters, "spread": layout.spread}
    for field in fields(Plan):
        value = getattr(plan, field.name)
        if field.name in _APART:
            continue
        if is_dataclass(value):
            value = {item.name: getattr(value, item.name) for item in fields(value)}
        if isinstance(value, Mapping):
            said |= {f"{field.name}.{key}": inner for key, inner in value.items()}
        else:
            said[field.name] = value
    return said | {"context.order": CONTEXT_ORDERS[bool(layout.striped)]}


def shown_of(value: Any, plan: Plan, other: Any) -> str:
    """Return a value in words: places as plans write them, of weights the one that differs."""
    if isinstance(value, AxisLayout):
        where = zip(plan.machine.axes, value.factors, value.strides, strict=True)
        places = [
            f"{axis.name}{factor}" + (f" (every {stride}.)" if stride > 1 else "")
            for axis, factor, stride in where
            if factor > 1
        ]
        places += [f"dcn{value.slices}"] * bool(value.slices > 1)
        text = " ".join(places) or "one device"
    elif isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        mine, theirs = ({item.name: item for item in side} for side in (value, other))
        differ = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        first = min(differ, default="")
        if first in mine:
            sizes = " x ".join(str(length) for length in mine[first].shape)
            text = f"{mine[first].stack} {first} of {sizes}"
        else:
            text = f"no {first}"
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
