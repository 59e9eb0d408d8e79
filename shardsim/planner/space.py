"""The space of plans: every way to give a slice's torus axes to roles, and every choice besides.

A mesh gives each torus axis whole to one role, or splits it between two (the inner one gets
neighbours, the outer one every n-th device); the axis of slices goes whole to one role. Torus
axes that are alike (same length, same wrap) are exchanged only once. On every mesh: microbatches,
remat policies, how the residual stream lies, collective matmul, prefetch of weights, and whether
the data axis splits optimizer state. Choices that change nothing on a mesh (collective matmul
without a tensor axis, for example) are counted once.

One choice is settled without pricing both sides, because it is never slower: weights are prefetched
wherever HBM has room for it. One is not made at all: gradients are not reduced behind the backward
pass, because no published set of compiler options does that; a plan file may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from shardsim.machine import Machine, TorusAxis
from shardsim.model import Model
from shardsim.plan.layout import (
    EMBED_SHARDED,
    REPLICATED,
    ROLES,
    SEQUENCE_SHARDED,
    AxisLayout,
    Layout,
)
from shardsim.plan.legality import divides, legal
from shardsim.plan.remat import POLICIES, Remat
from shardsim.plan.split import state_apart
from shardsim.program.rings import BIDIRECTIONAL

Array = np.ndarray[Any, Any]

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
SLICE_ROLES = ("data", "fsdp", "pipeline")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices on meshes that store arrays alike: of those that do not, one; of the others,
    equally long arrays of shape [options]."""

    residual: int  # how the residual stream lies over the tensor axis
    context_shards_parameters: bool
    matmul_overlap: Array
    optimizer_over_data: Array


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the space in which the same choices make sense: [pairs] x [remat] x [options].

    A pair is a mesh with a number of microbatches.
    """

    factors: dict[str, Array]  # role -> [pairs, torus axes]
    slices: dict[str, Array]  # role -> [pairs]
    microbatches: Array  # [pairs]
    choices: Choices
    remats: tuple[Remat, ...]

    @property
    def pairs(self) -> int:
        """How many meshes with microbatches there are."""
        return len(self.microbatches)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pairs, remat policies, options."""
        return self.pairs, len(self.remats), len(self.choices.matmul_overlap)

    def take(self, index: Any) -> Part:
        """Return the part with only some of its pairs."""
        return Part(
            factors={role: array[index] for role, array in self.factors.items()},
            slices={role: array[index] for role, array in self.slices.items()},
            microbatches=self.microbatches[index],
            choices=self.choices,
            remats=self.remats,
        )

    def layout(self) -> Layout:
        """Return all plans of the part as one layout; arrays broadcast to `shape`."""
        inner: dict[str, Array] = {}
        reached = np.ones_like(next(iter(self.factors.values())))
        for role in reversed(ROLES):
            inner[role] = np.where(self.factors[role] > 1, reached, 1)
            reached = reached * self.factors[role]
        axes = {
            role: AxisLayout(
                factors=tuple(column[:, None, None] for column in self.factors[role].T),
                strides=tuple(column[:, None, None] for column in inner[role].T),
                slices=self.slices[role][:, None, None],
            )
            for role in ROLES
        }
        flags = [remat.flags() for remat in self.remats]
        keeps = {name: np.array([flag[name] for flag in flags])[None, :, None] for name in flags[0]}
        return Layout(
            pipeline=axes["pipeline"],
            data=axes["data"],
            fsdp=axes["fsdp"],
            context=axes["context"],
            tensor2=axes["tensor2"],
            tensor=axes["tensor"],
            context_shards_parameters=self.choices.context_shards_parameters,
            residual=self.choices.residual,
            optimizer_over_data=self.choices.optimizer_over_data[None, None, :],
            matmul_overlap=self.choices.matmul_overlap[None, None, :],
            weights_overlap=True,
            gradients_overlap=False,
            microbatches=self.microbatches[:, None, None],
        ).reshaped(**keeps)


def axis_options(axis: TorusAxis) -> Array:
    """Return the ways to give one torus axis to roles: [ways, roles], factors of each role."""
    ways = []
    for role in range(len(ROLES)):
        row = [1] * len(ROLES)
        row[role] = axis.length
        ways.append(row)
    splits = [size for size in range(2, axis.length) if axis.length % size == 0]
    for outer, inner in combinations(range(len(ROLES)), 2):
        for size in splits:
            row = [1] * len(ROLES)
            row[inner] = size
            row[outer] = axis.length // size
            ways.append(row)
    return np.array(ways if axis.length > 1 else [[1] * len(ROLES)])


def meshes(machine: Machine, max_axes: int) -> tuple[Array, Array]:
    """Return every mesh: factors [meshes, torus axes, roles] and slices [meshes, roles].

    Inside a slice at most `max_axes` roles have a size above one.
    """
    factors: Array = np.zeros((1, 0, len(ROLES)), dtype=np.int64)
    last: Array = np.zeros(1, dtype=np.int64)
    before: TorusAxis | None = None
    for axis in machine.axes:
        ways = axis_options(axis)
        count = len(ways)
        old = np.repeat(np.arange(len(factors)), count)
        new = np.tile(np.arange(count), len(factors))
        alike = (
            before is not None and before.length == axis.length and before.wrapped == axis.wrapped
        )
        if alike:
            keep = new >= last[old]
            old, new = old[keep], new[keep]
        factors = np.concatenate([factors[old], ways[new][:, None, :]], axis=1)
        # Only few roles at a time: cut as early as possible.
        few = (factors.prod(axis=1) > 1).sum(axis=1) <= max_axes
        factors, last = factors[few], new[few]
        before = axis
    slices = np.ones((1, len(ROLES)), dtype=np.int64)
    if machine.slices > 1:
        slices = np.ones((len(SLICE_ROLES), len(ROLES)), dtype=np.int64)
        for row, role in enumerate(SLICE_ROLES):
            slices[row, ROLES.index(role)] = machine.slices
    many = len(factors)
    factors = np.repeat(factors, len(slices), axis=0)
    return factors, np.tile(slices, (many, 1))


def _choices(tensor: bool, state: bool, context: bool) -> Iterator[Choices]:
    """Yield the choices that differ on a mesh with or without these roles.

    `state`: whether the data axis can split optimizer state.
    """
    # The sequence first: of plans that take equally long, the first is kept.
    residuals = (REPLICATED, SEQUENCE_SHARDED, EMBED_SHARDED) if tensor else (REPLICATED,)
    for residual in residuals:
        modes = (0, 1, 2) if residual != REPLICATED else (0,)
        rows = [(mode, zero) for mode in modes for zero in ((False, True) if state else (False,))]
        for with_context in (False, True) if context else (False,):
            yield Choices(
                residual=residual,
                context_shards_parameters=with_context,
                matmul_overlap=np.array([mode for mode, _ in rows]),
                optimizer_over_data=np.array([zero for _, zero in rows]),
            )


def parts(
    model: Model, machine: Machine, batch: int, sequence: int, max_axes: int = 3
) -> Iterator[Part]:
    """Yield the space, in parts, with all pairs that some legal plan has."""
    factors, slices = meshes(machine, max_axes)
    sizes = factors.prod(axis=1) * slices
    # What no choice can mend goes first.
    keep = divides(model, batch, sequence, _bare(sizes))
    factors, slices, sizes = factors[keep], slices[keep], sizes[keep]
    count = np.array([number for number in MICROBATCHES if number <= batch])
    mesh = np.repeat(np.arange(len(factors)), len(count))
    microbatches = np.tile(count, len(factors))
    fits = legal(model, batch, sequence, _bare(sizes[mesh], microbatches=microbatches))
    mesh, microbatches = mesh[fits], microbatches[fits]
    # Meshes that store arrays alike: with the same roles, and the same ways of splitting heads.
    bare = _bare(sizes[mesh], optimizer_over_data=True)
    tensor = bare.tensor.size
    local = model.kv_heads / np.minimum(tensor, model.kv_heads)
    flags = (
        tensor > 1,
        state_apart(model, bare),
        bare.context.size > 1,
        model.kv_heads % tensor != 0,
        np.mod(local, bare.tensor2.size) != 0,
    )
    kind = np.zeros(len(mesh), dtype=np.int64)
    for bit, flag in enumerate(flags):
        kind |= np.asarray(flag).astype(np.int64) << bit
    remats = tuple(Remat(save=kept) for kept in POLICIES.values())
    for value in np.unique(kind):
        chosen = np.flatnonzero(kind == value)
        has = [bool(value >> bit & 1) for bit in range(3)]
        for choices in _choices(*has):
            yield Part(
                factors={role: factors[mesh[chosen], :, i] for i, role in enumerate(ROLES)},
                slices={role: slices[mesh[chosen], i] for i, role in enumerate(ROLES)},
                microbatches=microbatches[chosen],
                choices=choices,
                remats=remats,
            )


def _bare(sizes: Array, **choices: Any) -> Layout:
    """Return meshes of role sizes [meshes, roles] as a layout with the choices that split least."""
    axes: dict[str, Any] = {
        role: AxisLayout(factors=(sizes[:, index],), strides=(1,))
        for index, role in enumerate(ROLES)
    }
    return Layout(**axes, residual=REPLICATED, **choices)


def legal_cells(
    part: Part, layout: Layout, model: Model, batch: int, sequence: int
) -> tuple[Array, Array]:
    """Return which plans of a part are legal, and how many plans each cell stands for.

    Both are of the part's shape. A cell stands for the plans with and without prefetching.
    """
    shape = part.shape
    # Of two members one sends the other its piece, in both directions as in one.
    twice = np.equal(part.choices.matmul_overlap, BIDIRECTIONAL) & (layout.tensor.size <= 2)
    # Where context splits what data would, splitting state over it is the plan that does not.
    idle = layout.optimizer_over_data & ~np.asarray(state_apart(model, layout), dtype=bool)
    mask = np.broadcast_to(legal(model, batch, sequence, layout) & ~twice & ~idle, shape)
    # Prefetching is a choice where weights are gathered.
    ways = np.where(np.greater(layout.gather.size, 1), 2, 1)
    return mask, np.broadcast_to(ways, shape)
