"""Where arrays are stored: which roles of a mesh split each of their dimensions, one table for all.

`RULES` says it for weights, what an optimizer keeps of them and activations. `plan.split` reads it
for the mesh of a plan and `split` here for meshes of a kind, whose sizes come later. Heads of a
graph are two dimensions: `kv`, the key-value heads, and `group`, the queries that share each of
them. An axis that cannot split the key-value heads is two axes: one over as many of them as it can,
one (`_shared`) over their groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardsim.graph.arrays import Array, Op, Split

# How the residual stream lies over the tensor axis between the matmuls.
REPLICATED, SEQUENCE_SHARDED, EMBED_SHARDED = 0, 1, 2

_WEIGHT = {
    "layers": ("pipeline",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
_MATRIX = _WEIGHT | {"embed": ("tensor2", "gather")}

# Kind of array -> logical axis -> the roles that split it, the outermost first. "state" is what an
# optimizer keeps of a matrix or table; that of a vector lies as the vector does. "residual" is the
# stream between a block's branches, "inside" what is in a branch.
RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vector": _WEIGHT,
    "matrix": _MATRIX,
    "table": _MATRIX,
    "state": _MATRIX | {"embed": ("tensor2", "gather", "data")},
    "residual": {"batch": ("data", "fsdp"), "seq": ("tokens",), "embed": ("embed",)},
    "inside": {
        "batch": ("data", "fsdp"),
        "seq": ("context",),
        "embed": ("tensor2",),
        "heads": ("tensor", "tensor2"),
        "kv_heads": ("tensor", "tensor2"),
        "mlp": ("tensor", "tensor2"),
        "vocab": ("tensor",),
    },
}

# Groups of several roles: see `members`.
JOINT_ROLES = ("gather", "replicas", "embed", "tokens", "tensor_peers", "stage")


def members(role: str, residual: Any, context_shards: Any) -> tuple[tuple[str, Any], ...]:
    """Return the roles behind a role or a group of several, each with where it belongs to it.

    The arguments are numbers, or arrays of one entry a plan. "gather" is over which weights are
    gathered, "replicas" the devices that then hold the same, "embed" and "tokens" what holds a
    token and a sequence of the residual stream, "tensor_peers" the devices of a pipeline stage
    with the same part of heads, MLP and vocabulary, "stage" all of them.
    """
    if role == "gather":
        return ("fsdp", True), ("context", context_shards)
    if role == "replicas":
        return ("data", True), ("context", np.logical_not(context_shards))
    if role == "embed":
        return ("tensor2", True), ("tensor", np.equal(residual, EMBED_SHARDED))
    if role == "tokens":
        return ("context", True), ("tensor", np.equal(residual, SEQUENCE_SHARDED))
    peers = ("data", "fsdp", "context", "tensor2")
    found = {"tensor_peers": peers, "stage": (*peers, "tensor")}.get(role, role.split("+"))
    return tuple((part, True) for part in found)


# The mesh axes of a graph behind each role that is two where it cannot split the key-value heads.
TENSOR = ("tensor", "tensor_shared")
TENSOR2 = ("tensor2", "tensor2_shared")
ROLE = {axis: axis.removesuffix("_shared") for axis in (*TENSOR, *TENSOR2)}


@dataclass(frozen=True)
class Kind:
    """All that decides how arrays are stored; meshes of one kind differ only in sizes."""

    residual: int = SEQUENCE_SHARDED  # how the residual stream lies over tensor
    context_shards: bool = False  # context splits weights too
    kv_whole: bool = False  # tensor cannot split the key-value heads: their weights are whole
    kv_whole2: bool = False  # tensor2 cannot split what is left of them: all its members hold them

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes."""
        return tuple(
            axis
            for role in ("data", "fsdp", "context", "tensor", "tensor2")
            for axis in self.axes_of(role)
        )

    def axes_of(self, role: str) -> tuple[str, ...]:
        """Return the mesh axes of one role."""
        if role == "tensor":
            return TENSOR if self.kv_whole else TENSOR[:1]
        if role == "tensor2":
            return TENSOR2 if self.kv_whole2 else TENSOR2[:1]
        return (role,)

    def roles(self, group: str) -> Iterator[str]:
        """Yield the roles behind a role or a group of several."""
        for role, belongs in members(group, self.residual, self.context_shards):
            if belongs:
                yield role


def placed(ops: Sequence[Op], kind: Kind) -> tuple[Op, ...]:
    """Return ops whose arrays say how they are stored on meshes of a kind."""

    def place(array: Array) -> Array:
        return array.stored(split(array.original or array, kind))

    return tuple(
        replace(
            op,
            ins=tuple(map(place, op.ins)),
            out=place(op.out),
            needs=tuple(map(place, op.needs)),
            vectors=tuple(map(place, op.vectors)),
        )
        for op in ops
    )


def split(array: Array, kind: Kind) -> Split:
    """Return the dimension of an array that each mesh axis splits: what `RULES` says of its kind.

    Key-value heads that an axis cannot split are whole in weights, and in activations over the
    second tensor axis; of the others a device makes those that its own queries read.
    """
    rules = RULES[array.weight or ("residual" if array.stream else "inside")]
    found: dict[str, str] = {}
    for d in array.dims:
        logical = logical_axis(d, "group" in array.dims)
        for role in (role for group in rules.get(logical, ()) for role in kind.roles(group)):
            axes = kind.axes_of(role)
            if d == "kv":
                whole = {"tensor": kind.kv_whole and array.weight, "tensor2": kind.kv_whole2}
                axes = () if logical == "kv_heads" and whole[role] else axes[:1]
            elif d == "group":
                axes = axes[1:]
            found |= dict.fromkeys(axes, d)
    return found


def logical_axis(d: str, grouped: bool) -> str:
    """Return the logical axis of a dimension: heads are one axis, not `kv` and `group`.

    `grouped` says whether the array has both, so is one of queries.
    """
    if d == "kv":
        return "heads" if grouped else "kv_heads"
    return "heads" if d == "group" else d
