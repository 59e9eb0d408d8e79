"""The model that a trainer has in place of the plan's: the nearest of its blocks, and what differs.

State and activations are then counted for what the trainer trains, not for what the plan names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any

from shardsim.model import Biases, Model
from shardsim.plan import Plan
from shardsim.plan.precision import wire

# What a trainer's file can say of any model; other options have their defaults in it, unless its
# block fixes them.
_CARRIED = (
    *("name", "family", "layers", "embed", "mlp", "heads", "head_dim", "kv_heads", "sequence"),
    *("vocab", "parallel_block", "gated_mlp", "activation", "causal", "tied_embeddings"),
    *("qk_norm", "norm", "post_norms", "final_norm", "positions", "biases", "patch", "image"),
    *("channels", "pooling", "classes", "parameter_convention", "note", "source"),
)
# Options that change what is computed or kept; names, notes and counting conventions do not.
_SILENT = ("name", "note", "source", "parameter_convention", "sequence")
_LESS = "cannot do all that the plan says; this file is the nearest that it can:"
ALL_BIASES = Biases(qkv=True, attention_output=True, mlp=True, norm=True)


@dataclass(frozen=True)
class Block:
    """One kind of block that a trainer has, with the options of a model that it fixes."""

    name: str
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Nearest:
    """A trainer's block, the model made of it, and where that differs from the plan's."""

    block: str
    model: Model
    differences: tuple[str, ...]


def nearest_model(model: Model, blocks: tuple[Block, ...], changes: Mapping[str, Any]) -> Nearest:
    """Return the model made of the block that differs least from `model`'s.

    `changes` are made whatever the block: what the trainer has only one of.
    """
    made = []
    for block in blocks:
        fixed = {**block.fixed, **changes}
        if fixed.get("kv_heads") == 0:
            fixed["kv_heads"] = model.heads
        options = {name: getattr(model, name) for name in _CARRIED}
        other = Model(**{**options, **fixed})
        made.append(Nearest(block.name, other, differences(model, other)))
    return min(made, key=lambda nearest: len(nearest.differences))


def differences(model: Model, other: Model) -> tuple[str, ...]:
    """Return every option of `model` that is another in `other`, as `key: this, not that`."""
    found = []
    for field in fields(Model):
        if field.name in _SILENT:
            continue
        mine, theirs = getattr(model, field.name), getattr(other, field.name)
        if field.name == "biases":
            found += [
                f"biases.{item.name}: {_show(getattr(theirs, item.name))}, "
                f"not {_show(getattr(mine, item.name))}"
                for item in fields(Biases)
                if getattr(mine, item.name) != getattr(theirs, item.name)
            ]
        elif mine != theirs:
            found.append(f"{field.name}: {_show(theirs)}, not {_show(mine)}")
    return tuple(found)


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def reduced(plan: Plan) -> list[str]:
    """Return in which format a trainer that casts no gradient sends them, if the plan has another.

    Compiled for ViT-22B in big_vision, reductions are as many bytes as in bf16.
    """
    made = wire(plan.precision.compute)
    if plan.precision.reduce == made:
        return []
    return [f"precision.reduce: {made} as matmuls make gradients, not {plan.precision.reduce}"]


def comments(trainer: str, differences: tuple[str, ...], remarks: tuple[str, ...]) -> list[str]:
    """Return the comment lines of a file for a trainer that say how it differs from the plan."""
    lines = []
    for title, told in ((f"{trainer} {_LESS}", differences), ("Beside the plan:", remarks)):
        if told:
            lines += ["#", f"# {title}", *(f"#   {text}" for text in told)]
    return lines


def told_in(text: str) -> list[str]:
    """Return what such a file says that the trainer cannot do: its title, then one thing a line."""
    head = [line[2:] for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    start = next((at for at, line in enumerate(head) if line.endswith(_LESS)), len(head))
    return [*head[start : start + 1], *takewhile(bool, head[start + 1 :])]
