"""The space of plans: every way to give a slice's torus axes to roles, and every choice besides.

A mesh gives each torus axis whole to one role, or splits it between two (the inner one gets
neighbours, the outer one every n-th device); the axis of slices goes whole to one role. Torus
axes that are alike (same length, same wrap) are exchanged only once. On every mesh: microbatches,
remat policies, how the residual stream lies, collective matmul, prefetch of weights, and whether
the data axis splits optimizer state. With experts there is one role more, which splits all other
weights too where it can, and tokens are exchanged over it, or gathered. Keys are gathered over a
context axis; where attention is one kernel and there are too few sequences to split over that axis
as well, they also pass round it, or heads are split over it instead. Choices that change nothing on
a mesh (collective matmul without a tensor axis, for example) are counted once.

What layers keep is the same for all of them here; `planner/layers.py` mixes policies.

Two choices are settled without pricing both sides, because they are never slower: weights are
prefetched wherever HBM has room for it, and under a causal mask tokens are striped over a context
axis, unless that makes parts that are no whole tiles of those that are. One is not made at all:
gradients are not reduced behind the backward pass, because no published set of compiler options
does that; a plan file may.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from shardsim.machine import Machine
from shardsim.model import Model
from shardsim.plan.layout import (
    EMBED_SHARDED,
    REPLICATED,
    ROLES,
    SEQUENCE_SHARDED,
    AxisLayout,
    Kept,
    Layout,
    Number,
    Spread,
)
from shardsim.plan.legality import divides, legal
from shardsim.plan.plan import IN_TURNS, TICKS, WEIGHTS_APART
from shardsim.plan.remat import OFFLOADS, POLICIES, Policy
from shardsim.plan.resolve import stripes
from shardsim.plan.split import heads_whole, state_apart
from shardsim.planner.fixed import Fixed
from shardsim.planner.meshes import Array, Meshes, of_all
from shardsim.program.kept import LAYER_INPUT
from shardsim.program.rings import BIDIRECTIONAL

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
# Experts of a token from which on tokens may be gathered over the expert axis: on a wrapped axis
# that takes 4 / top_k of the time of an all-to-all (`cost.collectives`).
RING_TOP = 4
FREE = Fixed()


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices on meshes that store arrays alike: of those that do not, one; of the others,
    equally long arrays of shape [options]."""

    residual: int  # how the residual stream lies over the tensor axis
    context_shards_parameters: bool
    spread: Spread
    matmul_overlap: Array
    optimizer_over_data: Array


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the space in which arrays are stored alike: [pairs] x [remat] x [options].

    A pair is a mesh with a number of microbatches. `parts` yields one pair for all meshes of a
    form, since memory, operations and what is sent depend on the form alone.
    """

    meshes: Meshes
    mesh: Array  # [pairs]: numbers of meshes
    microbatches: Array  # [pairs]
    striped: Array  # [pairs]: whether tokens are striped over the context axis
    choices: Choices
    remats: tuple[Policy, ...]
    fixed: Fixed = FREE

    @property
    def pairs(self) -> int:
        """How many meshes with microbatches there are."""
        return len(self.microbatches)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pairs, remat policies, options."""
        return self.pairs, len(self.remats), len(self.choices.matmul_overlap)

    @property
    def form(self) -> Array:
        """The form of each pair's mesh: [pairs]."""
        return np.asarray(self.meshes.form[self.mesh])

    @property
    def machine(self) -> Array:
        """The number of the machine of each pair: [pairs]."""
        return np.asarray(self.meshes.machine[self.mesh])

    @property
    def many(self) -> Array:
        """How many meshes have the form of each pair: [pairs]."""
        return np.asarray(self.meshes.many[self.form])

    def take(self, index: Any) -> Part:
        """Return the part with only some of its pairs."""
        chosen = {"mesh": self.mesh, "microbatches": self.microbatches, "striped": self.striped}
        return replace(self, **{name: values[index] for name, values in chosen.items()})

    def spread(self) -> tuple[Part, Array]:
        """Return the part with all meshes of the forms that it has, in the order of meshes and
        microbatches, and which pair of this one each comes from."""
        many = self.many
        place = np.repeat(np.arange(self.pairs), many)
        first = np.repeat(self.meshes.starts[self.form] - (np.cumsum(many) - many), many)
        mesh = self.meshes.by_form[first + np.arange(len(place))]
        order = np.lexsort((self.microbatches[place], mesh))
        place = place[order]
        return replace(self.take(place), mesh=mesh[order]), place

    def layout(self) -> Layout:
        """Return all plans of the part as one layout; arrays broadcast to `shape`."""
        axes: dict[str, Any] = self.meshes.axes(self.mesh)
        return Layout(
            **axes,
            context_shards_parameters=self.choices.context_shards_parameters,
            spread=self.choices.spread,
            residual=self.choices.residual,
            optimizer_over_data=self.choices.optimizer_over_data[None, None, :],
            matmul_overlap=self.choices.matmul_overlap[None, None, :],
            weights_overlap=True,
            gradients_overlap=False,
            microbatches=self.microbatches[:, None, None],
            **_accumulated(self.fixed, axes["pipeline"].size),
            striped=self.striped[:, None, None],
            kept=(kept_by(self.remats, (1, len(self.remats), 1)),),
        )


def policies(model: Model, machine: Machine) -> tuple[Policy, ...]:
    """Return what layers may keep: on the device and, where emitted code can and the way there is
    known, in the host's memory.

    Not a layer's input there where attention and MLP lie side by side: compiled steps of ViT-22B
    wait 0.37 s for such copies, predicted 0, and are slower than those that are priced behind them
    (docs/compiled.md).
    """
    kept = [Policy(save=names) for names in POLICIES.values()]
    if machine.chip.kind == "tpu" and machine.chip.pcie_bytes_per_s is not None:
        side_by_side = model.parallel_block
        kept += [one for one in OFFLOADS if not (side_by_side and LAYER_INPUT in one.offload)]
    return tuple(kept)


def kept_by(remats: Sequence[Policy], shape: tuple[int, ...], layers: Number = 0) -> Kept:
    """Return what `layers` keep by one of several policies, which are an axis of `shape`."""
    names = tuple(policy.kept for policy in remats)
    offloaded = tuple(policy.offload for policy in remats)
    return Kept(names=names, shape=shape, offloaded=offloaded, layers=layers)


def _choices(
    residual: int,
    context_shards: bool,
    spread: Spread,
    state: bool,
    matmul: int | None,
    forward_only: bool,
) -> Choices:
    """Return the choices on meshes of a kind; `state`: whether data splits some optimizer state;
    `matmul`: the mode of collective matmuls, where it is held."""
    state = state and not forward_only
    modes = (0, 1, 2) if residual != REPLICATED else (0,)
    modes = (matmul,) if matmul is not None and residual != REPLICATED else modes
    rows = [(mode, zero) for mode in modes for zero in ((False, True) if state else (False,))]
    return Choices(
        residual=residual,
        context_shards_parameters=context_shards,
        spread=spread,
        matmul_overlap=np.array([mode for mode, _ in rows]),
        optimizer_over_data=np.array([zero for _, zero in rows]),
    )


def parts(
    model: Model,
    machines: Sequence[Machine],
    batch: int,
    sequence: int,
    max_axes: int = 3,
    fixed: Fixed = FREE,
    attention: str = "flash",
) -> Iterator[Part]:
    """Yield the space, in parts, with all forms of meshes that some legal plan has.

    Of choices that are `fixed` it has only those. `attention` is the plans'. Of several `machines`,
    which are of one chip, a part has the meshes of all.
    """
    every = _meshes(model, machines, batch, sequence, max_axes, fixed)
    mesh, microbatches = _pairs(model, batch, sequence, fixed, every)
    bare = _bare(every.sizes[mesh], optimizer_over_data=True)
    heads_split = _heads_split(model, bare)
    state = np.broadcast_to(state_apart(model, bare), mesh.shape)
    remats = policies(model, machines[0]) if fixed.remat is None else (fixed.remat,)
    if fixed.forward_only and fixed.remat is None:  # nothing is kept
        remats = (Policy(),)
    shardable, by_head, switched = (
        np.broadcast_to(
            divides(model, batch, sequence, _bare(every.sizes, spread=spread)), len(every.sizes)
        )[mesh]
        for spread in (Spread(shards=True), Spread(by_head=True), Spread(switched=True))
    )
    groups = bare.data.size * bare.fsdp.size * bare.expert.size * bare.context.size
    needed = (batch < groups * microbatches) | (fixed.keys is not None)
    striped = np.asarray(stripes(model, sequence, bare.context.size))
    # The sequence first: of plans that take equally long, the first is kept.
    for residual, context_shards, spread in product(
        (REPLICATED, SEQUENCE_SHARDED, EMBED_SHARDED),
        (False, True),
        _spreads(model, attention, fixed),
    ):
        differs = shardable == spread.shards
        if residual != REPLICATED:
            differs = differs & (bare.tensor.size > 1)
        elif fixed.matmul:  # what is replicated has no collective matmuls
            differs = differs & (bare.tensor.size == 1)
        if spread.ring:
            differs = differs & (bare.expert.size > 1)
        if context_shards or spread.passed or spread.by_head or spread.switched:
            differs = differs & (bare.context.size > 1)
        if spread.passed:
            differs = differs & needed
        if spread.by_head:
            differs = differs & by_head & needed
        if spread.switched:
            differs = differs & switched & needed
        for heads in np.unique(heads_split[differs]):
            chosen = np.flatnonzero(differs & (heads_split == heads))
            yield Part(
                meshes=every,
                mesh=mesh[chosen],
                microbatches=microbatches[chosen],
                striped=striped[chosen] & (not spread.by_head) & (not spread.switched),
                choices=_choices(
                    residual,
                    context_shards,
                    spread,
                    bool(state[chosen].any()),
                    fixed.matmul,
                    fixed.forward_only,
                ),
                remats=remats,
                fixed=fixed,
            )


def _meshes(
    model: Model,
    machines: Sequence[Machine],
    batch: int,
    sequence: int,
    max_axes: int,
    fixed: Fixed,
) -> Meshes:
    """Return the meshes with the sizes that are held, but for those that no choice can mend."""
    several = sum(size > 1 for size in fixed.sizes.values())
    every = of_all(machines, max(max_axes, several), model.experts is not None)
    for role, size in fixed.sizes.items():
        every = every.take(every.sizes[:, ROLES.index(role)] == size)
    return every.take(divides(model, batch, sequence, _bare(every.sizes)))


def _pairs(
    model: Model, batch: int, sequence: int, fixed: Fixed, every: Meshes
) -> tuple[Array, Array]:
    """Return the legal pairs of a mesh, the first of its form, and a number of microbatches: two
    arrays of shape [pairs]."""
    tried = MICROBATCHES if fixed.microbatches is None else (fixed.microbatches,)
    # Of several parts embeddings are compared with those of the whole batch.
    count = np.array([n for n in tried if n <= batch and (n == 1 or not model.text)], np.int64)
    first = every.by_form[every.starts]
    mesh, microbatches = np.repeat(first, len(count)), np.tile(count, len(first))
    bare = _bare(every.sizes[mesh], microbatches=microbatches)
    bare = bare.reshaped(**_accumulated(fixed, bare.pipeline.size))
    fits = legal(model, batch, sequence, bare, fixed.pipeline_interleave)
    return mesh[fits], microbatches[fits]


def _heads_split(model: Model, bare: Layout) -> Array:
    """Return a number for how each pair's tensor axes split heads of all parts: [pairs]."""
    found = np.zeros((), dtype=np.int64)
    for one in model.parts:  # each may have heads of its own
        whole, whole2 = heads_whole(one.model, bare)
        found = 4 * found + whole + 2 * whole2
    return found


def _spreads(model: Model, attention: str, fixed: Fixed) -> list[Spread]:
    """Return the ways in which tokens and weights lie over expert and context axes."""
    ring = model.experts is not None and model.experts.top_k >= RING_TOP
    rings = [False, True] if ring else [False]
    if fixed.exchange is not None:
        rings = [fixed.exchange == "ring"]
    return [
        Spread(
            shards=shards,
            ring=ring,
            passed=keys == "ring",
            by_head=keys == "ulysses",
            switched=keys == "dsp",
        )
        for keys in _keys(model, attention, fixed)
        for shards in (True, False)
        for ring in rings
    ]


def _accumulated(fixed: Fixed, stages: Array) -> dict[str, Any]:
    """Return how microbatches follow each other in a layout, as a search holds it."""
    return {
        "gathered": fixed.accumulation in ("gathered", "scattered"),
        "scattered": fixed.accumulation == "scattered",
        "layered": fixed.accumulation == "layered",
        "lockstep": (fixed.pipeline_schedule in TICKS) & (stages > 1),
        "split_backward": (fixed.pipeline_schedule in WEIGHTS_APART) & (stages > 1),
        "in_turns": (fixed.pipeline_schedule in IN_TURNS) & (stages > 1),
    }


def _keys(model: Model, attention: str, fixed: Fixed) -> tuple[str, ...]:
    """Return the ways in which keys reach the queries of other members of a context axis."""
    if fixed.keys is not None:
        return (fixed.keys,)
    plain = attention == "unfused" or model.latent or len(model.parts) > 1
    switches = ("dsp",) if "time" in model.attends else ()
    return ("gathered", *(() if plain else ("ring", "ulysses")), *switches)


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
    fits = legal(model, batch, sequence, layout, part.fixed.pipeline_interleave)
    mask = np.broadcast_to(fits & ~twice & ~idle, shape)
    # Prefetching is a choice where weights are gathered.
    ways = np.where(np.greater(layout.gather.size, 1), 2, 1)
    return mask, np.broadcast_to(ways, shape)


def any_legal(
    model: Model,
    machine: Machine,
    batch: int,
    sequence: int,
    max_axes: int,
    fixed: Fixed,
    attention: str,
) -> bool:
    """Return whether the space of `parts` has any legal plan, fitting or not."""
    return any(
        legal_cells(part, part.layout(), model, batch, sequence)[0].any()
        for part in parts(model, [machine], batch, sequence, max_axes, fixed, attention)
        if part.pairs
    )
