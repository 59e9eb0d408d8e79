"""How large a placed array is on one device: lengths of dimensions over sizes of mesh axes.

Sizes are numbers, or numpy arrays of one entry a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from shardsim.graph.arrays import Array, Dims, Split
from shardsim.graph.place import ROLE, Kind, Spread
from shardsim.model import Model
from shardsim.ops.attend_blocks import KEYS_AT_ONCE
from shardsim.ops.attend_kernels import KERNEL_MULTIPLE
from shardsim.plan.layout import ROLES, Layout, Number
from shardsim.plan.split import dimension, heads_whole, kv_left, lengths
from shardsim.program.shapes import Workload
from shardsim.program.uneven import tokens_load

BLOCK = "block"  # of the keys on one device, what attention without a kernel takes at once
BY_BLOCKS = "by blocks"  # 1 where keys that pass round are no whole tiles, which need it, else 0
SUBLANES = 8  # of a TPU's tile in HBM; `shardsim/emit/runtime/collectives.py` gathers by it


def kind_of(model: Model, layout: Layout) -> Kind:
    """Return how arrays are stored on a layout whose plans all store them alike."""
    whole, whole2 = heads_whole(model, layout)
    return Kind(
        residual=_one(layout.residual),
        context_shards=bool(_one(layout.context_shards_parameters)),
        kv_whole=bool(_one(whole)),
        kv_whole2=bool(_one(whole2)),
        spread=Spread(
            shards=bool(_one(layout.spread.shards)),
            ring=bool(_one(layout.spread.ring)),
            by_expert=bool(_one(layout.spread.by_expert)),
            passed=bool(_one(layout.spread.passed)),
            by_head=bool(_one(layout.spread.by_head)),
            switched=bool(_one(layout.spread.switched)),
        ),
    )


def _one(value: Number) -> int:
    if np.ndim(value) == 0:
        return int(value)
    found = np.unique(value)
    if len(found) != 1:
        raise ValueError("a layout of several kinds of meshes: take those of one kind at a time")
    return int(found[0])


def _by_blocks(work: Workload, layout: Layout) -> Number:
    part = work.sequence / layout.context.size
    part = part / np.where(np.logical_and(layout.striped, work.model.causal), 2, 1)
    return 1.0 * np.not_equal(np.mod(part, KERNEL_MULTIPLE), 0)


class Sizes:
    """Sizes on one device under a layout, of a microbatch or of one of its `tiles`."""

    def __init__(self, work: Workload, layout: Layout, tiles: int = 1) -> None:
        model = work.model
        self.kind = kind_of(model, layout)
        tensor, tensor2 = layout.tensor.size, layout.tensor2.size
        over_kv = np.minimum(tensor, model.kv_heads)
        over_kv2 = np.minimum(tensor2, model.kv_heads / over_kv)
        context = layout.context.size
        if _one(layout.spread.by_head):
            context = np.minimum(context, kv_left(model, layout))
        self.axes: Mapping[str, Number] = {
            "data": layout.data.size,
            "fsdp": layout.fsdp.size,
            "expert": layout.expert.size,
            "context": context,
            "context_shared": layout.context.size / context,
            "tensor": over_kv,
            "tensor_shared": tensor / over_kv,
            "tensor2": over_kv2,
            "tensor2_shared": tensor2 / over_kv2,
        }
        self.lengths: dict[str, Number] = {
            **lengths(model, work.batch / (layout.microbatches * tiles), work.sequence),
            "vocab": dimension("inside", "vocab", model.vocab, layout).size,
            **_slots(model, work.sequence),
            "others": work.batch / layout.microbatches,
            BLOCK: np.minimum(work.sequence / layout.context.size, KEYS_AT_ONCE),
            BY_BLOCKS: _by_blocks(work, layout),
        }
        if work.lengths and work.lengths.unpadded:  # the fullest device is waited for
            self.lengths |= {"batch": self.lengths["batch"] * tokens_load(work, layout)}
        several = np.greater(layout.expert.size, 1)
        # Of tokens that are sorted: on the fullest device, and what there is room for.
        dropless = model.experts is not None and model.experts.dropless
        # All tokens on one device are as many times the mean as there are devices.
        most = np.minimum(work.imbalance, layout.expert.size)
        self.load: Number = np.where(several, most, 1.0) if dropless else 1.0
        room = np.minimum(max(work.padding, work.imbalance), layout.expert.size)
        self.room: Number = np.where(several, room, 1.0) if dropless else 1.0
        self._parts: dict[tuple[str, tuple[str, ...]], Number] = {}
        self._elements: dict[Any, Number] = {}
        self._several: dict[frozenset[str], Number] = {}

    def part(self, d: str, axes: Iterable[str]) -> Number:
        """Return the length of a dimension that `axes` split, on one device."""
        key = (d, tuple(axes))
        if key not in self._parts:
            length = self.lengths[d]
            for axis in key[1]:
                length = length / self.axes[axis]
            self._parts[key] = length
        return self._parts[key]

    def length(self, d: str, place: Split) -> Number:
        """Return the length of a dimension on one device of an op (or array) placed so."""
        return self.part(d, [axis for axis, other in place.items() if other == d])

    def product(self, dims: Dims, place: Split) -> Number:
        """Return the number of elements of `dims` on one device of what is placed so."""
        key = (dims, tuple(place.items()))
        if key not in self._elements:
            total: Number = 1.0
            for d in dims:
                total = total * self.length(d, place)
            if "slot" in dims and place.get("expert") == "expert":
                total = total * (self.room if "expert" in dims else self.load)
            self._elements[key] = total
        return self._elements[key]

    def moved(self, dims: Dims, by: tuple[tuple[str, str], ...]) -> Number:
        """Return the elements of a transfer: all axes in `by` leave a part."""
        elements = self.product(dims, {axis: d for axis, d in by if d in dims})
        for axis, d in by:
            if d not in dims:
                elements = elements / self.axes[axis]
        return elements

    def odd(self, d: str, axes: Iterable[str]) -> Number:
        """Return whether `axes` cut a dimension into pieces that are no whole tiles.

        In HBM of a TPU the last two dimensions of an array are tiles of at least `SUBLANES` x 128.
        """
        return np.not_equal(np.mod(self.part(d, sorted(axes)), SUBLANES), 0)

    def stored(self, array: Array) -> Number:
        """Return the elements of an array that one device stores."""
        return self.product(array.dims, array.split)

    def gathered(self, array: Array) -> Number:
        """Return the elements of a weight on one device once it is gathered."""
        groups = ("by_expert", "by_embed") if "expert" in array.dims else ("gather",)
        kind = self.kind
        over = {
            axis for group in groups for role in kind.roles(group) for axis in kind.axes_of(role)
        }
        return self.product(array.dims, {a: d for a, d in array.split.items() if a not in over})

    def several(self, axes: Iterable[str]) -> Number:
        """Return whether a group over `axes` has more than one member."""
        key = frozenset(axes)
        if key not in self._several:
            many: Number = False
            for axis in sorted(key):
                many = many | np.greater(self.axes[axis], 1)
            self._several[key] = many
        return self._several[key]

    def members(self, axes: Iterable[str]) -> Number:
        """Return the members of a group over `axes`."""
        found: Number = 1
        for axis in axes:
            found = found * self.axes[axis]
        return found


def _slots(model: Model, sequence: int) -> dict[str, float]:
    """Return the lengths of dimensions that tokens have on their way to experts."""
    experts = model.experts
    if experts is None:
        return {}
    groups, slots = experts.groups(sequence), float(experts.slots(sequence))
    return {"slot": slots, "place": slots, "chunk": groups, "member": sequence / groups}


def role_of(axes: Iterable[str]) -> str:
    """Return the roles behind mesh axes in one word.

    >>> role_of(["tensor_shared", "data", "tensor"])
    'data+tensor'
    """
    roles = {ROLE.get(axis, axis) for axis in axes}
    return "+".join(role for role in ROLES if role in roles)
