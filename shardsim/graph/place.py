"""Where arrays are stored: which of its dimensions each mesh axis splits, one rule for all arrays.

| mesh axis | activations | weights |
| --- | --- | --- |
| data | batch | |
| fsdp | batch | embed |
| context | seq | embed, if it shards parameters |
| tensor | heads, mlp, vocab; of the residual stream seq or embed | heads, mlp, vocab |
| tensor2 | heads, mlp; of the residual stream embed | embed |

Vectors are split over tensor as the activations they are added to, and whole else. Heads are two
dimensions: `kv`, the key-value heads, and `group`, the queries that share each of them. An axis
that cannot split the key-value heads is two axes: one over as many of them as it can, one
(`_shared`) over their groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardsim.graph.arrays import Array, Dims, Op, Split

REPLICATED, SEQUENCE_SHARDED, EMBED_SHARDED = 0, 1, 2

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
        return ("data", "fsdp", "context", *self.tensor, *self.tensor2)

    @property
    def tensor(self) -> tuple[str, ...]:
        """The axes of tensor."""
        return TENSOR if self.kv_whole else TENSOR[:1]

    @property
    def tensor2(self) -> tuple[str, ...]:
        """The axes of tensor2."""
        return TENSOR2 if self.kv_whole2 else TENSOR2[:1]


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
    """Return the dimension of an array that each mesh axis splits."""
    if array.weight:
        return _weight(array, kind)
    rules = {"data": "batch", "fsdp": "batch", "context": "seq"}
    axes = (*kind.tensor, *kind.tensor2)
    rules |= dict.fromkeys(kind.tensor2, "embed") | _inside(array.dims, kind, axes)
    if array.stream and kind.residual != REPLICATED:
        along = "seq" if kind.residual == SEQUENCE_SHARDED else "embed"
        rules |= dict.fromkeys(kind.tensor, along)
    return {axis: d for axis, d in rules.items() if d in array.dims}


def _weight(array: Array, kind: Kind) -> Split:
    inside = _inside(array.dims, kind, kind.tensor)
    if "kv" in array.dims and "group" not in array.dims and kind.kv_whole:
        inside = {}
    if array.weight == "vector" or "embed" not in array.dims:
        return inside
    shards = ("fsdp", "context") if kind.context_shards else ("fsdp",)
    return inside | dict.fromkeys((*shards, *kind.tensor2), "embed")


def _inside(dims: Dims, kind: Kind, axes: Sequence[str]) -> dict[str, str]:
    """Return how tensor axes split heads, the MLP or the vocabulary."""
    if "kv" in dims:
        shared = "group" in dims
        own = {"tensor": "kv", "tensor_shared": "group"}
        own |= {"tensor2": "kv"} if shared or not kind.kv_whole2 else {}
        own |= {"tensor2_shared": "group"}
        return {axis: d for axis, d in own.items() if axis in axes and d in dims}
    wide = next((d for d in dims if d in ("heads", "mlp")), "")
    if wide:
        return dict.fromkeys(axes, wide)
    return (
        dict.fromkeys([axis for axis in axes if axis in TENSOR], "vocab") if "vocab" in dims else {}
    )
