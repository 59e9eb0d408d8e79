"""A collective as legs: which axes it crosses in which order, in how many parts.

Over several torus axes the array is cut into one part ("colour") per axis. Each part crosses the
axes in another order, so that all links are busy at the same time (Sack and Gropp 2015). The last
axis of a part carries nearly all of its bytes: the parts are sized so that every axis carries what
its rate allows. Where axes differ in length the parts' phases do not line up; large arrays are
then cut into chunks that follow each other, so that one part's last phase runs beside another
part's first one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardsim.cost.network import Group
from shardsim.simulate.groups import Groups

# Chunks cost latency. A part is cut in at most this many, and only where the bytes of a chunk
# take this many times its latency.
MAX_CHUNKS = 8
CHUNK_WORTH = 0.1


@dataclass(frozen=True, kw_only=True)
class Move:
    """One leg of a chain: the leg's name and the bytes of its unit, a shard."""

    leg: str
    unit_bytes: float


Chain = tuple[Move, ...]  # one after the other
Stage = tuple[Chain, ...]  # side by side


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Stages that follow each other; each starts with `overheads` launches."""

    stages: tuple[Stage, ...]
    overheads: int  # launches, spread over the stages: one for a gather, two for an all-reduce


def traffic(
    kind: str, groups: Groups, links: Group, total_bytes: float, stage: str = "all"
) -> Traffic:
    """Return what a collective of `kind` over `total_bytes` (as in `Collective`) moves."""
    size = groups.size
    if size == 1 or total_bytes == 0:
        return Traffic(stages=(), overheads=0)
    if kind == "permute":
        return Traffic(stages=((((Move(leg="shift", unit_bytes=total_bytes)),),),), overheads=1)
    if kind == "all-to-all":
        return Traffic(stages=_exchange(groups, total_bytes), overheads=1)
    gather = _gather(groups, links, total_bytes, stage)
    if not gather:
        return Traffic(stages=(), overheads=0)
    scatter = tuple(_backwards(part) for part in reversed(gather))
    if kind == "all-gather":
        return Traffic(stages=gather, overheads=1)
    if kind == "reduce-scatter":
        return Traffic(stages=scatter, overheads=1)
    if kind == "all-reduce":
        return Traffic(stages=scatter + gather, overheads=2)
    raise ValueError(f"unknown collective '{kind}'")


def leg_names(kind: str, groups: Groups, links: Group, stage: str = "all") -> set[str]:
    """Return the legs that a collective of `kind` may use."""
    found = traffic(kind, groups, links, 1.0, stage)
    return {move.leg for part in found.stages for chain in part for move in chain}


def _gather(groups: Groups, links: Group, total_bytes: float, stage: str) -> tuple[Stage, ...]:
    """Return an all-gather: slices first, while shards are small, then torus, then chip."""
    shard = total_bytes / groups.size
    slices = groups.factors[0]
    held = slices if stage == "torus" else 1  # shards that each member has so far
    stages: list[Stage] = []
    if slices > 1 and stage != "torus":
        stages.append(((Move(leg="gather:dcn", unit_bytes=shard),),))
        held *= slices
    if stage == "dcn":
        return tuple(stages)
    axes = groups.axes()
    if axes:
        stages.append(_colours(groups, links, axes, shard * held))
        held *= math.prod(groups.factors[axis + 1] for axis in axes)
    for axis in groups.inner_axes():
        stages.append(((Move(leg=f"gather:{axis}", unit_bytes=shard * held),),))
        held *= groups.factors[axis + 1]
    return tuple(stages)


def _colours(groups: Groups, links: Group, axes: list[int], shard: float) -> Stage:
    """Return one chain per colour and chunk."""
    orders = colour_orders(groups, axes)
    shares = colour_shares(groups, orders)
    lengths = [groups.factors[axis + 1] for axis in axes]
    latency = float(links.torus.latency_s)
    bytes_s = shard * (math.prod(lengths) - 1) / float(links.torus.bytes_per_s)
    chunks = 1
    if len(axes) > 1 and len({(axis_rate(groups, a), groups.factors[a + 1]) for a in axes}) > 1:
        worth = bytes_s / (CHUNK_WORTH * latency) if latency > 0 else math.inf
        chunks = int(max(1, min(MAX_CHUNKS, worth)))
    # All legs of a twisted group are walks along all its links.
    twisted = groups.twisted_axes()
    turned = (*twisted, *groups.topology.twist[1]) if twisted else ()
    chains: list[Chain] = []
    for _ in range(chunks):
        for order, share in zip(orders, shares, strict=True):
            if share <= 0:
                continue
            held = shard * share / chunks
            moves = []
            for axis, length in zip(order, groups.phase_lengths(order), strict=True):
                leg = f"gather:{axis}:{length}" if axis in turned else f"gather:{axis}"
                moves.append(Move(leg=leg, unit_bytes=held))
                held *= length
            chains.append(tuple(moves))
    return tuple(chains)


def axis_rate(groups: Groups, axis: int) -> float:
    """Return the bytes/s that one member gets along an axis."""
    ways = 2.0 if groups.closed(axis) else 1.0
    return groups.topology.axes[axis].bytes_per_s * ways / groups.strides[axis + 1]


def colour_orders(groups: Groups, axes: list[int]) -> list[tuple[int, ...]]:
    """Return the orders in which parts cross the axes, each ending on another one.

    Rotations where axes are equally fast: in every phase each axis has one part. Else slow axes
    come first, while there is little to carry.
    """
    rates = {axis: axis_rate(groups, axis) for axis in axes}
    if len(set(rates.values())) == 1:
        return [tuple(axes[start:] + axes[:start]) for start in range(len(axes))]
    slow_first = sorted(axes, key=lambda axis: rates[axis])
    return [(*(other for other in slow_first if other != axis), axis) for axis in axes]


def colour_shares(groups: Groups, orders: list[tuple[int, ...]]) -> list[float]:
    """Return the parts of the array per colour that load every axis as its rate allows.

    Solves sum_c share_c load_c(axis) = rate(axis) t for the shares and t. A colour whose share
    would be negative (an axis too slow to end on) is left out.
    """
    axes = list(orders[0])
    if len(axes) == 1:
        return [1.0]
    rates = [axis_rate(groups, axis) for axis in axes]
    load = np.zeros((len(axes), len(orders)))
    for number, order in enumerate(orders):
        held = 1.0
        for axis, length in zip(order, groups.phase_lengths(order), strict=True):
            load[axes.index(axis), number] += held * (length - 1)
            held *= length
    kept = list(range(len(orders)))
    while True:
        last = [axes.index(orders[number][-1]) for number in kept]
        matrix = np.zeros((len(kept) + 1, len(kept) + 1))
        matrix[:-1, :-1] = load[np.ix_(last, kept)]
        matrix[:-1, -1] = [-rates[axis] / max(rates) for axis in last]
        matrix[-1, :-1] = 1.0
        right = np.zeros(len(kept) + 1)
        right[-1] = 1.0
        shares = np.linalg.solve(matrix, right)[:-1]
        if len(kept) == 1 or shares.min() > 0:
            break
        kept.pop(int(np.argmin(shares)))
    result = [0.0] * len(orders)
    for number, share in zip(kept, shares, strict=True):
        result[number] = float(share)
    return result


def _backwards(stage: Stage) -> Stage:
    """Return the same legs the other way round, scattering instead of gathering."""
    return tuple(
        tuple(
            Move(leg=move.leg.replace("gather", "scatter"), unit_bytes=move.unit_bytes)
            for move in reversed(chain)
        )
        for chain in stage
    )


def _exchange(groups: Groups, held_bytes: float) -> tuple[Stage, ...]:
    """Return an all-to-all: each axis exchanges everything, all torus axes at the same time."""
    stages: list[Stage] = []
    if groups.axes():
        stages.append(((Move(leg="exchange", unit_bytes=held_bytes),),))
    for axis in groups.inner_axes():
        unit = held_bytes / groups.factors[axis + 1]
        stages.append(((Move(leg=f"gather:{axis}", unit_bytes=unit),),))
    if groups.factors[0] > 1:
        unit = held_bytes / groups.factors[0]
        stages.append(((Move(leg="gather:dcn", unit_bytes=unit),),))
    return tuple(stages)
