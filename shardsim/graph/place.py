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

_WEIGHT: dict[str, tuple[str, ...]] = {
    "layers": ("pipeline",),
    "expert": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "delta": ("tensor",),
}
_MATRIX: dict[str, tuple[str, ...]] = {**_WEIGHT, "embed": ("tensor2", "gather")}
_EXPERTS: dict[str, tuple[str, ...]] = {
    **_WEIGHT,
    "expert": ("expert", "by_expert"),
    "embed": ("tensor2", "by_embed"),
}
_BATCH = ("data", "fsdp", "expert")
# What one expert's device has of the tokens that chose it.
_SLOTS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "chunk": ("context",),
    "slot": ("context",),
    "expert": ("expert",),
    "embed": ("tensor2",),
    "mlp": ("tensor", "tensor2"),
}
# The same where the tokens are. In a ring of experts they are where the experts are.
_COPIES: dict[str, tuple[str, ...]] = _SLOTS | {
    "batch": ("data", "fsdp", "exchanged"),
    "expert": ("reached",),
}

BY_LOCATION = "by location"

# Kind of array -> logical axis -> the roles that split it, the outermost first. "state" is what an
# optimizer keeps of a matrix or table; that of a vector lies as the vector does. "residual" is the
# stream between a block's branches, "inside" what is in a branch, "attended" the result of
# attention where its kernel makes it. The weights of "experts", and
# what is kept of them, have their own rows, and so have tokens on their way: "tokens" that experts
# choose from, "masks" of which token goes where, "copies" of tokens for each expert that they
# chose, "slots" of an expert, what it makes of them ("made"), that again where the tokens are
# ("returned"), and its "sum" for each token. What is "handed" to another stack is whole. A video's
# tokens are frames and locations: the residual stream "by frame" or "by location", and the results
# of attention "in space" or "in time".
RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vector": _WEIGHT,
    "matrix": _MATRIX,
    "table": _MATRIX,
    "state": _MATRIX | {"embed": ("tensor2", "gather", "data")},
    "experts": _EXPERTS,
    "experts state": _EXPERTS | {"embed": ("tensor2", "by_embed", "data")},
    "residual": {"batch": _BATCH, "seq": ("tokens",), "embed": ("embed",)},
    "inside": {
        "batch": _BATCH,
        "seq": ("context",),
        "embed": ("tensor2",),
        "heads": ("tensor", "tensor2"),
        "kv_heads": ("tensor", "tensor2"),
        "mlp": ("tensor", "tensor2"),
        "vocab": ("tensor",),
        "delta": ("tensor", "tensor2"),
    },
    "attended": {
        "batch": _BATCH,
        "seq": ("by_token",),
        "heads": ("tensor", "tensor2", "by_head"),
    },
    "in space": {
        "batch": _BATCH,
        "frame": ("context",),
        "heads": ("tensor", "tensor2"),
    },
    "in time": {
        "batch": _BATCH,
        "frame": ("by_time",),
        "location": ("by_space",),
        "heads": ("tensor", "tensor2", "by_head"),
    },
    "by frame": {"batch": _BATCH, "frame": ("tokens",), "embed": ("embed",)},
    BY_LOCATION: {
        "batch": _BATCH,
        "frame": ("unswitched",),
        "location": ("switched",),
        "embed": ("embed",),
    },
    "tokens": {
        "batch": ("data", "fsdp", "exchanged"),
        "seq": ("context",),
        "embed": ("tensor2",),
    },
    "masks": {
        "batch": ("data", "fsdp", "exchanged"),
        "seq": ("context",),
        "chunk": ("context",),
        "expert": ("reached",),
    },
    "handed": {"batch": _BATCH},
    "copies": _COPIES,
    "slots": _SLOTS,
    "made": _SLOTS | {"embed": ("tensor2", "tensor")},
    "returned": _COPIES | {"embed": ("tensor2", "tensor")},
    "sum": {
        "batch": _BATCH,
        "seq": ("context",),
        "chunk": ("context",),
        "embed": ("tensor2", "tensor"),
    },
}

# Groups of several roles: see `members`.
JOINT_ROLES = ("gather", "replicas", "embed", "tokens", "tensor_peers", "stage")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the expert axis, experts' weights and the context axis are used: numbers, or arrays of
    one entry a plan."""

    shards: Any = False  # the expert axis splits all other weights too, along embed
    ring: Any = False  # tokens are gathered over the expert axis, instead of exchanged
    by_expert: Any = False  # fsdp splits experts' weights by expert, not along embed
    passed: Any = False  # keys and values pass round the context axis, instead of being gathered
    by_head: Any = False  # in attention the context axis splits heads, not tokens
    switched: Any = False  # it splits locations, not frames, where layers attend through time


USUAL = Spread()


def members(
    role: str, residual: Any, context_shards: Any, spread: Spread
) -> tuple[tuple[str, Any], ...]:
    """Return the roles behind a role or a group of several, each with where it belongs to it.

    The arguments are numbers, or arrays of one entry a plan. "gather" is over which weights are
    gathered, "replicas" the devices that then hold the same, "embed" and "tokens" what holds a
    token and a sequence of the residual stream, "tensor_peers" the devices of a pipeline stage
    with the same part of heads, MLP and vocabulary, "stage" all of them. "by_expert" and "by_embed"
    gather experts' weights, "exchanged" and "reached" are the expert axis, as tokens are exchanged
    over it or gathered; "by_token" and "by_head" the context axis, as attention splits tokens over
    it or heads. "switched" and "unswitched" hold a sequence of the residual stream, as it is split
    by location through time or by frame; "by_space" and "by_time" are the context axis there.
    """
    if role == "gather":
        return ("fsdp", True), ("expert", spread.shards), ("context", context_shards)
    if role in ("by_expert", "by_embed"):
        on = spread.by_expert if role == "by_expert" else _no(spread.by_expert)
        return ("fsdp", on), ("context", on & np.asarray(context_shards, dtype=bool))
    if role == "exchanged":
        return (("expert", _no(spread.ring)),)
    if role == "reached":
        return (("expert", spread.ring),)
    if role == "by_token":
        return (("context", _no(spread.by_head)),)
    if role == "by_head":
        return (("context", spread.by_head),)
    if role == "by_space":
        return (("context", spread.switched),)
    if role == "by_time":
        return (("context", _no(spread.switched) & _no(spread.by_head)),)
    if role in ("switched", "unswitched"):
        on = spread.switched if role == "switched" else _no(spread.switched)
        return ("context", on), ("tensor", on & np.equal(residual, SEQUENCE_SHARDED))
    if role == "replicas":
        return ("data", True), ("expert", _no(spread.shards)), ("context", _no(context_shards))
    if role == "embed":
        return ("tensor2", True), ("tensor", np.equal(residual, EMBED_SHARDED))
    if role == "tokens":
        return ("context", True), ("tensor", np.equal(residual, SEQUENCE_SHARDED))
    peers = ("data", "fsdp", "expert", "context", "tensor2")
    found = {"tensor_peers": peers, "stage": (*peers, "tensor")}.get(role, role.split("+"))
    return tuple((part, True) for part in found)


def _no(flag: Any) -> Any:
    return np.logical_not(flag)


# The mesh axes of a graph behind each role that is two where it cannot split the key-value heads.
TENSOR = ("tensor", "tensor_shared")
TENSOR2 = ("tensor2", "tensor2_shared")
CONTEXT = ("context", "context_shared")
EVERY = ("data", "fsdp", "expert", *CONTEXT, *TENSOR, *TENSOR2)
ROLE = {axis: axis.removesuffix("_shared") for axis in (*TENSOR, *TENSOR2, *CONTEXT)}


@dataclass(frozen=True)
class Kind:
    """All that decides how arrays are stored; meshes of one kind differ only in sizes."""

    residual: int = SEQUENCE_SHARDED  # how the residual stream lies over tensor
    context_shards: bool = False  # context splits weights too
    kv_whole: bool = False  # tensor cannot split the key-value heads: their weights are whole
    kv_whole2: bool = False  # tensor2 cannot split what is left of them: all its members hold them
    spread: Spread = USUAL

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes."""
        return tuple(
            axis
            for role in ("data", "fsdp", "expert", "context", "tensor", "tensor2")
            for axis in self.axes_of(role)
        )

    def axes_of(self, role: str) -> tuple[str, ...]:
        """Return the mesh axes of one role."""
        if role == "tensor":
            return TENSOR if self.kv_whole else TENSOR[:1]
        if role == "tensor2":
            return TENSOR2 if self.kv_whole2 else TENSOR2[:1]
        if role == "context":
            return CONTEXT if self.spread.by_head else CONTEXT[:1]
        return (role,)

    def attending(self, op: Op) -> Op:
        """Return an op that says, if it is attention in one kernel, what the context axis does."""
        if not (op.kernel and op.kernel.mask) or op.kernel.mask.local:
            return op
        if self.spread.by_head:
            heads = next(pair for pair in GROUPS.items() if pair[0] in op.out.dims)
            return replace(op, over=dict(zip(CONTEXT, heads, strict=True)))
        return replace(op, passed=frozenset(CONTEXT[:1])) if self.spread.passed else op

    def roles(self, group: str) -> Iterator[str]:
        """Yield the roles behind a role or a group of several."""
        for role, belongs in members(group, self.residual, self.context_shards, self.spread):
            if belongs:
                yield role


def placed(ops: Sequence[Op], kind: Kind) -> tuple[Op, ...]:
    """Return ops whose arrays say how they are stored on meshes of a kind."""

    def place(array: Array) -> Array:
        if array.renamed == (("seq", "location"),) and not kind.spread.switched:
            frames = next(d for d in array.dims if d.endswith("frame"))
            array = replace(array, renamed=(("seq", frames),))
        return array.stored(split(array.original or array, kind))

    return tuple(
        replace(
            kind.attending(op),
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
    rules = RULES[row(array.weight, array.dims) or array.lies or _usual(array)]
    found: dict[str, str] = {}
    for d in array.dims:
        logical = logical_axis(d, has_groups(array.dims))
        for role in (role for group in rules.get(logical, ()) for role in kind.roles(group)):
            axes = kind.axes_of(role)
            if d in GROUPS:
                whole = {"tensor": kind.kv_whole and array.weight, "tensor2": kind.kv_whole2}
                axes = () if logical == "kv_heads" and whole[role] else axes[:1]
            elif d in GROUPS.values():
                axes = axes[1:]
            found |= dict.fromkeys(axes, d)
    return found


def row(weight: str, dims: Sequence[str], *, state: bool = False) -> str:
    """Return the row of `RULES` for a kind of weight with such dimensions, or for the `state` that
    an optimizer keeps of it; "" for an activation."""
    if weight in ("matrix", "table") and "expert" in dims:
        return "experts state" if state else "experts"
    return "state" if state and weight != "vector" else weight


def _usual(array: Array) -> str:
    return "residual" if array.stream else "inside"


# Dimensions that are split as others are: widths of hidden layers as the MLP's, what a latent's
# up-projection reads as embed, which it does not have, and tokens and width of another stack.
_ALIKE = {
    "expert_mlp": "mlp",
    "shared_mlp": "mlp",
    "query_latent": "embed",
    "key_value_latent": "embed",
    "memory": "seq",
    "memory_embed": "embed",
    "memory_hidden": "mlp",
    "prompt_embed": "embed",
    "condition": "mlp",
    "global_head_dim": "head_dim",
    "branch_embed": "embed",
    "branch_norm": "norm",
    "branch_mlp": "mlp",
    "index_heads": "mlp",
    "scoring_heads": "mlp",
    "index_keys": "keys",
    "delta_keys": "delta",
    "delta_heads": "delta",
}
# Key-value heads, and the queries that share each of them: of all layers, or of those without a
# window where those have others.
GROUPS: Mapping[str, str] = {"kv": "group", "global_kv": "global_group"}
# Widths of a head's part of queries, keys and values.
HEAD_WIDTHS = frozenset({"head_dim", "global_head_dim", "nope", "value_dim"})


def has_groups(dims: Sequence[str]) -> bool:
    """Return whether an array has key-value heads and groups of them, so is one of queries."""
    return any(group in dims for group in GROUPS.values())


def logical_axis(d: str, grouped: bool) -> str:
    """Return the logical axis of a dimension: heads are one axis, not `kv` and `group`.

    `grouped` says whether the array has both, so is one of queries.
    """
    if d in GROUPS:
        return "heads" if grouped else "kv_heads"
    return "heads" if d in GROUPS.values() else _ALIKE.get(d, d)
