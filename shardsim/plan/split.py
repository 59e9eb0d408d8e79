"""How an array splits over devices: of weights, their optimizer state and activations.

An array has dimensions with logical names, and its kind says which roles of a `Layout` split each
of them, the outermost first (`graph.place.RULES`, which the graph's placement reads too). Stored
elements, HBM, legality, emitted specs, exports and reports all read `dimension`.

What a group of devices does not divide:

| dimension | is then |
| --- | --- |
| key-value heads | whole on all members of that group, and of those after it |
| vocabulary | padded up to what divides |
| embed of optimizer state, over data | split as the weight is, no further; experts' as others' |
| any other | refused (`legality`) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from shardsim.graph.place import RULES, row
from shardsim.model import Model, Tensor
from shardsim.model import tensors as weights
from shardsim.plan.layout import Layout, Number

# Activation -> its kind and axes, [batch, tokens, width] unless noted: the stream between the
# blocks; a block's normed input, gathered; between the projections; keys and values as projected;
# the same in attention, over all tokens and by heads; and one vector an image after pooling.
ACTIVATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "residual": ("residual", ("batch", "seq", "embed")),
    "input": ("inside", ("batch", "seq", "embed")),
    "wide": ("inside", ("batch", "seq", "mlp")),
    "keys": ("inside", ("batch", "seq", "kv_heads")),
    "all_keys": ("inside", ("batch", "keys", "kv_heads", "head_dim")),
    "logits": ("inside", ("batch", "seq", "vocab")),
    "flat_residual": ("inside", ("batch", "one", "embed")),
    "flat_input": ("inside", ("batch", "one", "embed")),
    "flat_wide": ("inside", ("batch", "one", "mlp")),
    "flat_keys": ("inside", ("batch", "one", "kv_heads")),
}


_Part = tuple[str, str, int]  # kind of array, axis, size


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension of an array under a layout: numbers, or arrays where the layout has them."""

    axis: str
    size: Number  # over all devices, with padding
    ways: Number  # into how many equal parts it is split
    roles: tuple[tuple[str, Number], ...]  # what may split it, and where it does
    exact: bool  # whether `ways` must divide `size`

    @cached_property
    def local(self) -> Number:
        """Size on one device; no whole number where the layout is not legal."""
        return self.size / self.ways

    def split_by(self, role: str) -> Number:
        """Return where a role splits this dimension."""
        return next((splits for name, splits in self.roles if name == role), False)

    def mesh_axes(self, layout: Layout) -> list[str]:
        """Return the mesh axes of a single plan that split this dimension, major to minor."""
        return [
            name
            for role, splits in self.roles
            if splits and layout.role(role).size > 1
            for name in layout.mesh_axes(role)
        ]


def dimension(kind: str, axis: str, size: int, layout: Layout) -> Dimension:
    """Return how `layout` splits the dimension `axis` of an array of a kind of `RULES`.

    >>> from shardsim.plan import load_plan, resolve
    >>> layout = resolve(load_plan("vit-22b-published-tp8"))
    >>> dimension("matrix", "embed", 6144, layout).mesh_axes(layout)
    ['fsdp']
    >>> int(dimension("matrix", "mlp", 24576, layout).local)
    3072
    """
    if (kind, axis, size) not in layout.known:
        layout.known[kind, axis, size] = _dimension(kind, axis, size, layout)
    found: Dimension = layout.known[kind, axis, size]
    return found


def _dimension(kind: str, axis: str, size: int, layout: Layout) -> Dimension:
    roles: list[tuple[str, Number]] = []
    ways: Number = 1
    splits: Number = True
    for role in RULES[kind].get(axis, ()):
        more = ways * layout.role(role).size
        if axis == "layers" and layout.stage_layers:  # as of the fullest stage
            ways = more = sum(layout.stage_layers) / max(layout.stage_layers)
        if axis == "kv_heads":
            splits = splits & np.equal(np.mod(size, more), 0)
            ways = np.where(splits, more, ways)
        elif kind in ("state", "experts state") and role == "data":
            splits = layout.optimizer_over_data & np.equal(np.mod(size, more), 0)
            if kind == "experts state":  # one update for all weights: as of the others
                splits = splits & dimension("state", axis, size, layout).split_by(role)
            ways = np.where(splits, more, ways)
        else:
            ways = more
        roles.append((role, splits))
    exact = bool(roles) and axis not in ("kv_heads", "vocab")
    padded = -(-size // ways) * ways if axis == "vocab" else size
    return Dimension(axis=axis, size=padded, ways=ways, roles=tuple(roles), exact=exact)


def split(
    kind: str, axes: Sequence[str], shape: Sequence[int], layout: Layout
) -> tuple[Dimension, ...]:
    """Return how `layout` splits each dimension of an array."""
    return tuple(
        dimension(kind, axis, size, layout) for axis, size in zip(axes, shape, strict=True)
    )


def named(tensor: Tensor, *, state: bool = False) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Return kind, axes and shape of a weight, or of the `state` that an optimizer keeps of it.

    Weights of the blocks are stacked: their first dimension is the layer.
    """
    kind = row(tensor.kind, tensor.axes, state=state)
    if tensor.part == "block":
        return kind, ("layers", *tensor.axes), (tensor.stack, *tensor.shape)
    return kind, tensor.axes, tensor.shape


def activation(
    name: str, model: Model, batch: int, sequence: int, layout: Layout
) -> tuple[Dimension, ...]:
    """Return how `layout` splits one of `ACTIVATIONS`; a wide dimension is split by its heads."""
    kind, axes = ACTIVATIONS[name]
    sizes = lengths(model, batch, sequence)
    return split(kind, axes, [sizes[axis] for axis in axes], layout)


def lengths(model: Model, batch: Number, sequence: int) -> dict[str, Number]:
    """Return the size of each axis of weights and activations."""
    return {
        **weights.lengths(model),
        **weights.of_tokens(model, sequence),
        "batch": batch,
        "seq": sequence,
        "keys": sequence,
        "one": 1,
    }


def heads_whole(model: Model, layout: Layout) -> tuple[Number, Number]:
    """Return where each tensor axis has several members that cannot split the key-value heads."""
    heads = dimension("inside", "kv_heads", model.kv_heads, layout)
    tensor, tensor2 = (
        np.greater(layout.role(role).size, 1) & np.logical_not(heads.split_by(role))
        for role in ("tensor", "tensor2")
    )
    return tensor, tensor2


def kv_left(model: Model, layout: Layout) -> Number:
    """Return the key-value heads of a device, of those that the tensor axes split among them."""
    over = np.minimum(layout.tensor.size, model.kv_heads)
    return model.kv_heads / over / np.minimum(layout.tensor2.size, model.kv_heads / over)


def state_apart(model: Model, layout: Layout) -> Number:
    """Return where the data axis splits the optimizer state of some weight further than it."""
    apart: Number = False
    for size in {
        size
        for tensor in model.trained_tensors
        if tensor.kind != "vector"
        for axis, size in zip(tensor.axes, tensor.shape, strict=True)
        if axis == "embed"
    }:
        over_data = dimension("state", "embed", size, layout).split_by("data")
        apart = apart | (over_data & np.greater(layout.data.size, 1))
    return apart


def stored_elements(tensors: Sequence[Tensor], layout: Layout, *, state: bool = False) -> Number:
    """Return how many elements of weights, or of one moment of each, a device stores."""
    # A layout can be a million plans, and of all dimensions only embed is split by more than the
    # mesh: it is multiplied once, with the sum over all arrays that have it.
    sums: dict[_Part | None, Number] = {}
    for embed, others, whole in _alike(tuple(tensors), state):
        local = prod((dimension(*part, layout).local for part in others), start=whole)
        sums[embed] = sums.get(embed, 0) + local
    total: Number = 0
    for embed, local in sums.items():
        total = total + (local if embed is None else local * dimension(*embed, layout).local)
    return total


@lru_cache(maxsize=256)
def _alike(
    tensors: tuple[Tensor, ...], state: bool
) -> tuple[tuple[_Part | None, tuple[_Part, ...], int], ...]:
    """Return what may be split, embed apart, and elements of the rest: arrays alike added up."""
    found: dict[tuple[_Part | None, tuple[_Part, ...]], int] = {}
    for tensor in tensors:
        kind, axes, shape = named(tensor, state=state)
        parts = [(kind, axis, size) for axis, size in zip(axes, shape, strict=True)]
        ruled = [part for part in parts if part[1] in RULES[kind]]
        embed = next((part for part in ruled if part[1] == "embed"), None)
        key = embed, tuple(sorted(part for part in ruled if part != embed))
        found[key] = found.get(key, 0) + prod(part[2] for part in parts if part not in ruled)
    return tuple((*key, whole) for key, whole in found.items())
