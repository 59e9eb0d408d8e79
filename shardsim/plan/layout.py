"""The roles that mesh axes play, as numbers: what partitioning and pricing read.

A plan names its mesh axes freely; what costs something is the role of each. A `Layout` holds the
size and the torus placement of each role. Every figure is a number or a numpy array, and arrays
broadcast against each other, so that one `Layout` is one plan or a million of them.

| role | splits the batch | splits the sequence | splits weights |
| --- | --- | --- | --- |
| data | yes | | no: gradients are all-reduced |
| fsdp | yes | | yes: gathered before use, gradients reduce-scattered |
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

ROLES = ("pipeline", "data", "fsdp", "context", "tensor2", "tensor")  # outermost to innermost
# Groups of several roles: see the properties of `Layout`.
JOINT_ROLES = ("gather", "replicas", "embed", "tokens", "tensor_peers", "stage")

# How the residual stream lies over the tensor axis between the matmuls.
REPLICATED, SEQUENCE_SHARDED, EMBED_SHARDED = 0, 1, 2

Number = Any  # float, int, bool or numpy array of them; all of a layout's broadcast together


@dataclass(frozen=True, kw_only=True)
class AxisLayout:
    """One role: how much of each torus axis it takes, and how far apart its members are."""

    factors: tuple[Number, ...]  # along each of `Machine.axes`
    strides: tuple[Number, ...]  # 1: neighbours; s: every s-th device of the torus axis
    slices: Number = 1  # along the axis of slices (DCN)

    @cached_property
    def size(self) -> Number:
        """Devices in one group."""
        size = self.slices
        for factor in self.factors:
            size = size * factor
        return size

    def joined(self, other: AxisLayout, where: Number = True) -> AxisLayout:
        """Return the group of both axes together where `where`, else this one alone."""
        factors = []
        strides = []
        for mine, theirs, a, b in zip(
            self.factors, other.factors, self.strides, other.strides, strict=True
        ):
            taken = np.where(where, theirs, 1)
            factors.append(mine * taken)
            strides.append(
                np.where(taken == 1, a, np.where(np.equal(mine, 1), b, np.minimum(a, b)))
            )
        return AxisLayout(
            factors=tuple(factors),
            strides=tuple(strides),
            slices=self.slices * np.where(where, other.slices, 1),
        )

    def shares_links_with(self, other: AxisLayout) -> Number:
        """Return whether some torus axis carries traffic of both."""
        shared: Number = False
        for mine, theirs in zip(self.factors, other.factors, strict=True):
            shared = shared | (np.greater(mine, 1) & np.greater(theirs, 1))
        return shared


def whole_axis(dims: int) -> AxisLayout:
    """Return the layout of a role that is not used, on a machine of `dims` torus axes."""
    return AxisLayout(factors=(1,) * dims, strides=(1,) * dims)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and placement of every role, and the choices that go with them."""

    data: AxisLayout
    fsdp: AxisLayout
    context: AxisLayout
    tensor: AxisLayout
    tensor2: AxisLayout
    pipeline: AxisLayout
    context_shards_parameters: Number = False
    residual: Number = SEQUENCE_SHARDED
    optimizer_over_data: Number = False  # optimizer state split over the data axis (ZeRO-1)
    microbatches: Number = 1
    # Remat: whether each tensor is kept on the device or on the host (see plan/remat.py).
    keep_qkv: Number = False
    keep_context: Number = False
    keep_attention_output: Number = False
    keep_mlp_hidden: Number = False
    keep_mlp_output: Number = False
    keep_rest: Number = False
    # Overlap.
    matmul_overlap: Number = 2  # 0 off, 1 unidirectional, 2 bidirectional
    weights_overlap: Number = True
    gradients_overlap: Number = True
    dcn_overlap: Number = False
    partitioned: bool = False  # whether the compiler's partitioner writes the collectives
    # Names of the mesh axes behind each role, for reports.
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def known(self) -> dict[tuple[str, str, int], Any]:
        """Dimensions of arrays that `split.dimension` has worked out for this layout."""
        return {}

    def role(self, name: str) -> AxisLayout:
        """Return the layout of the role called `name`."""
        if "+" in name:
            first, *rest = (self.role(part) for part in name.split("+"))
            for other in rest:
                first = first.joined(other)
            return first
        axis: AxisLayout = getattr(self, name)
        return axis

    def keeps(self, tensor: str) -> Number:
        """Return whether a tensor of `remat.TENSORS` is kept for the backward pass."""
        return getattr(self, f"keep_{tensor}")

    @cached_property
    def gather(self) -> AxisLayout:
        """The group over which weights are gathered: fsdp, and context if it splits weights."""
        return self.fsdp.joined(self.context, self.context_shards_parameters)

    @cached_property
    def replicas(self) -> AxisLayout:
        """The group of devices with the same weights after the gather group: all-reduced."""
        return self.data.joined(self.context, np.logical_not(self.context_shards_parameters))

    @cached_property
    def embed(self) -> AxisLayout:
        """The group that holds one token of the residual stream: tensor2, perhaps tensor."""
        return self.tensor2.joined(self.tensor, np.equal(self.residual, EMBED_SHARDED))

    @cached_property
    def tokens(self) -> AxisLayout:
        """The group that holds one sequence of the residual stream: context, perhaps tensor."""
        return self.context.joined(self.tensor, np.equal(self.residual, SEQUENCE_SHARDED))

    @cached_property
    def tensor_peers(self) -> AxisLayout:
        """The devices of a pipeline stage with the same part of heads, mlp and vocab."""
        return self.data.joined(self.fsdp).joined(self.context).joined(self.tensor2)

    @cached_property
    def stage(self) -> AxisLayout:
        """All devices of a pipeline stage."""
        return self.tensor_peers.joined(self.tensor)

    def mesh_axes(self, role: str) -> tuple[str, ...]:
        """Return the names of the mesh axes behind a role or a joint group, of a single plan."""
        splits = bool(self.context_shards_parameters)
        tensor_peers = ("data", "fsdp", "context", "tensor2")
        parts = {
            "gather": ("fsdp", "context") if splits else ("fsdp",),
            "replicas": ("data",) if splits else ("data", "context"),
            "embed": ("tensor2", "tensor") if self.residual == EMBED_SHARDED else ("tensor2",),
            "tokens": ("context", "tensor") if self.residual == SEQUENCE_SHARDED else ("context",),
            "tensor_peers": tensor_peers,
            "stage": (*tensor_peers, "tensor"),
        }.get(role, role.split("+"))
        return tuple(name for part in parts for name in self.names.get(part, ()))

    def reshaped(self, **changes: Any) -> Layout:
        """Return a copy with some fields replaced."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Layout(**(values | changes))
