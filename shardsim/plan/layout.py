"""The roles that mesh axes play, as numbers: what partitioning and pricing read.

A plan names its mesh axes freely; what costs something is the role of each. A `Layout` holds the
size and the torus placement of each role. Every figure is a number or a numpy array, and arrays
broadcast against each other, so that one `Layout` is one plan or a million of them.

| role | splits the batch | splits the sequence | splits weights |
| --- | --- | --- | --- |
| data | yes | | no: gradients are all-reduced |
| fsdp | yes | | yes: gathered before use, gradients reduce-scattered |
| expert | yes | | yes: by expert; the others only if `spread.shards` |
| context | | yes, in attention too | only if `context_shards_parameters` |
| tensor | | (residual, if `residual` says so) | yes: heads, mlp, vocab stay split |
| tensor2 | | | yes: the embed dimension stays split (2-D tensor parallelism) |
| pipeline | | | yes: by layers |
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from shardsim.graph.place import EMBED_SHARDED as EMBED_SHARDED
from shardsim.graph.place import JOINT_ROLES as JOINT_ROLES
from shardsim.graph.place import REPLICATED as REPLICATED
from shardsim.graph.place import SEQUENCE_SHARDED as SEQUENCE_SHARDED
from shardsim.graph.place import USUAL as USUAL_SPREAD
from shardsim.graph.place import Spread as Spread
from shardsim.graph.place import members
from shardsim.machine import Chip, TorusAxis

# Outermost to innermost.
ROLES = ("pipeline", "data", "fsdp", "expert", "context", "tensor2", "tensor")

Number = Any  # float, int, bool or numpy array of them; all of a layout's broadcast together


def somewhere(value: Number) -> bool:
    """Return whether something holds, or is not 0, in any plan; of a number at once."""
    return bool(value if isinstance(value, int | float) else np.asarray(value).any())


@dataclass(frozen=True, kw_only=True)
class AxisLayout:
    """One role: how much of each torus axis it takes, and how far apart its members are."""

    factors: tuple[Number, ...]  # along each of `Machine.axes`
    strides: tuple[Number, ...]  # 1: neighbours; s: every s-th device of the torus axis
    slices: Number = 1  # along the axis of slices (DCN)
    slice_stride: Number = 1  # of its members along it

    @cached_property
    def size(self) -> Number:
        """Devices in one group."""
        size = self.slices
        for factor in self.factors:
            size = size * factor
        return size

    def joined(self, other: AxisLayout, where: Number = True) -> AxisLayout:
        """Return the group of both axes together where `where`, else this one alone."""
        if np.ndim(where) == 0 and not where:
            return self
        factors = []
        strides = []
        for mine, theirs, a, b in zip(
            self.factors, other.factors, self.strides, other.strides, strict=True
        ):
            taken = np.where(where, theirs, 1)
            factors.append(mine * taken)
            strides.append(_stride(mine, taken, a, b))
        slices = np.where(where, other.slices, 1)
        return AxisLayout(
            factors=tuple(factors),
            strides=tuple(strides),
            slices=self.slices * slices,
            slice_stride=_stride(self.slices, slices, self.slice_stride, other.slice_stride),
        )

    def shares_links_with(self, other: AxisLayout) -> Number:
        """Return whether some torus axis carries traffic of both."""
        shared: Number = False
        for mine, theirs in zip(self.factors, other.factors, strict=True):
            shared = shared | (np.greater(mine, 1) & np.greater(theirs, 1))
        return shared


def _stride(mine: Number, taken: Number, a: Number, b: Number) -> Number:
    """Return the stride of a group with `mine` members at stride `a`, and `taken` at `b`."""
    return np.where(np.equal(taken, 1), a, np.where(np.equal(mine, 1), b, np.minimum(a, b)))


def closes(axis: TorusAxis, factor: Number, stride: Number) -> Number:
    """Return whether every `stride`-th of `factor` devices along a torus axis are a ring, and
    receive from both sides; else they are a line, whose end member has one inbound link."""
    return axis.wrapped & np.equal(factor * stride, axis.length) & np.greater(factor, 2)


def whole_axis(dims: int) -> AxisLayout:
    """Return the layout of a role that is not used, on a machine of `dims` torus axes."""
    return AxisLayout(factors=(1,) * dims, strides=(1,) * dims)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What layers that follow each other keep for the backward pass, by one policy or by many."""

    names: tuple[frozenset[str], ...] = (frozenset(),)  # of `remat.TENSORS`, for each policy
    shape: tuple[int, ...] = ()  # of arrays over policies; () where there is one
    offloaded: tuple[frozenset[str], ...] = ()  # of those, what lies in the host's memory, if any
    layers: Number = 0  # 0: all that the model has

    @property
    def stores(self) -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
        """What is kept, and what of that in the host's memory, for each policy."""
        return tuple(
            zip(self.names, self.offloaded or (frozenset(),) * len(self.names), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and placement of every role, and the choices that go with them."""

    data: AxisLayout
    fsdp: AxisLayout
    expert: AxisLayout
    context: AxisLayout
    tensor: AxisLayout
    tensor2: AxisLayout
    pipeline: AxisLayout
    context_shards_parameters: Number = False
    spread: Spread = USUAL_SPREAD
    residual: Number = SEQUENCE_SHARDED
    optimizer_over_data: Number = False  # optimizer state split over the data axis (ZeRO-1)
    microbatches: Number = 1
    gathered: Number = False  # weights are gathered once a step
    scattered: Number = False  # their gradients are scattered in each microbatch nevertheless
    layered: Number = False  # a layer runs all microbatches before the next one does
    lockstep: Number = False  # stages run tick by tick: all microbatches forward, then all backward
    in_turns: Number = False  # tick by tick, but in each one forward and one backward
    split_backward: Number = False  # stages make gradients of weights when they have time
    stage_layers: tuple[int, ...] = ()  # of each stage; (): as many each
    kept: tuple[Kept, ...] = (Kept(),)  # by groups of layers, first to last
    # Overlap.
    matmul_overlap: Number = 2  # 0 off, 1 unidirectional, 2 bidirectional
    weights_overlap: Number = True
    gradients_overlap: Number = True
    dcn_overlap: Number = False
    keys_overlap: Number = True  # of keys that pass round: each hop beside the block that is there
    # Whether a member of the context axis has an early and a late part of the tokens, not the next.
    striped: Number = False
    partitioned: bool = False  # whether the compiler's partitioner writes the collectives
    # Names of the mesh axes behind each role, for reports.
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def summed_whole(self) -> Number:
        """Whether gradients are summed over microbatches before they are scattered."""
        return self.gathered & np.logical_not(self.scattered)

    @cached_property
    def known(self) -> dict[tuple[str, str, int], Any]:
        """Dimensions of arrays that `split.dimension` has worked out for this layout."""
        return {}

    def role(self, name: str) -> AxisLayout:
        """Return the layout of a role, or of a group of several (`graph.place.members`)."""
        if name not in self._groups:
            (first, always), *others = self._members(name)
            if first == name:
                raise KeyError(name)
            joined = self.role(first)
            if always is not True:
                joined = whole_axis(len(joined.factors)).joined(joined, always)
            for role, belongs in others:
                joined = joined.joined(self.role(role), belongs)
            self._groups[name] = joined
        return self._groups[name]

    def _members(self, name: str) -> tuple[tuple[str, Any], ...]:
        return members(name, self.residual, self.context_shards_parameters, self.spread)

    @cached_property
    def _groups(self) -> dict[str, AxisLayout]:
        """The roles, and groups of several that were asked for."""
        return {
            "data": self.data,
            "fsdp": self.fsdp,
            "expert": self.expert,
            "context": self.context,
            "tensor": self.tensor,
            "tensor2": self.tensor2,
            "pipeline": self.pipeline,
        }

    @property
    def gather(self) -> AxisLayout:
        """The group over which weights are gathered."""
        return self.role("gather")

    def mesh_axes(self, role: str) -> tuple[str, ...]:
        """Return the names of the mesh axes behind a role or a joint group, of a single plan."""
        parts = self._members(role)
        return tuple(
            name for part, belongs in parts if belongs for name in self.names.get(part, ())
        )

    def reshaped(self, **changes: Any) -> Layout:
        """Return a copy with some fields replaced."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Layout(**(values | changes))


def heads_as_columns(chip: Chip, layout: Layout, head_dim: Number) -> Number:
    """Return whether products of heads narrower than the matrix unit run over columns as emitted:
    not beside a tensor axis, whose collectives then hide less (Llama 3 70B on tpu7x, an axis of 4
    without rings: operations 12.21 -> 11.81 s, waiting 7.80 -> 8.73).
    """
    alone = np.equal(layout.tensor.size, 1) & np.equal(layout.tensor2.size, 1)
    return chip.heads_as_columns & alone & np.less(head_dim, chip.mxu_dim)
