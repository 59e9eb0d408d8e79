"""A collective as movements on links, one after the other: slices, torus, chip.

Over several torus axes an array is cut into parts that cross the axes in different orders, so that
all links are busy at the same time (Sack and Gropp 2015). How the parts are sized decides what
each axis carries; where parts also follow each other in small pieces, the whole gather is one
movement in which every axis carries its share from the first byte to the last (`axis_loads`), and
the last piece then has the hops of all axes before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardsim.simulate.groups import Groups

RING_LEGS = ("ring+", "closing+", "ring+-")  # see `Groups`
GATHERS = ("gather", "scatter", "exchange")  # how legs begin that are no permutes


@dataclass(frozen=True, kw_only=True)
class Move:
    """One movement: the leg's name and the bytes of its unit, a shard."""

    leg: str
    unit_bytes: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Movements that follow each other, and how many launches they start with."""

    moves: tuple[Move, ...]
    overheads: int  # one for a gather, two for an all-reduce


def traffic(
    kind: str,
    groups: Groups,
    total_bytes: float,
    stage: str = "all",
    shifts: Sequence[int] = (),
) -> Traffic:
    """Return what a collective of `kind` over `total_bytes` (as in `Collective`) moves.

    A permute without `shifts` passes data to the next member of a ring that does not close, or,
    where `stage` names a leg of a ring, round that ring: a hop beside work, which needs no launch.
    """
    if groups.size == 1 or total_bytes == 0:
        return Traffic(moves=(), overheads=0)
    if stage in RING_LEGS:
        return Traffic(moves=(Move(leg=stage, unit_bytes=total_bytes),), overheads=0)
    if kind == "permute":
        leg = f"permute:{','.join(map(str, shifts))}" if shifts else "shift"
        return Traffic(moves=(Move(leg=leg, unit_bytes=total_bytes),), overheads=1)
    if kind == "all-to-all":
        return Traffic(moves=_exchange(groups, total_bytes, stage), overheads=1)
    gather = _gather(groups, total_bytes, stage)
    if not gather:
        return Traffic(moves=(), overheads=0)
    scatter = tuple(
        Move(leg=move.leg.replace("gather", "scatter"), unit_bytes=move.unit_bytes)
        for move in reversed(gather)
    )
    if kind == "all-gather":
        return Traffic(moves=gather, overheads=1)
    if kind == "reduce-scatter":
        return Traffic(moves=scatter, overheads=1)
    if kind == "all-reduce":
        return Traffic(moves=scatter + gather, overheads=2)
    raise ValueError(f"unknown collective '{kind}'")


def leg_names(
    kind: str, groups: Groups, stage: str = "all", shifts: Sequence[int] = ()
) -> set[str]:
    """Return the legs that a collective of `kind` may use."""
    return {move.leg for move in traffic(kind, groups, 1.0, stage, shifts).moves}


def _gather(groups: Groups, total_bytes: float, stage: str) -> tuple[Move, ...]:
    """Return an all-gather: slices first, while shards are small, then torus, then chip."""
    shard = total_bytes / groups.size
    slices = groups.factors[0]
    held = slices if stage == "torus" else 1  # shards that each member has so far
    moves: list[Move] = []
    if slices > 1 and stage != "torus":
        moves.append(Move(leg="gather:dcn", unit_bytes=shard))
        held *= slices
    if stage == "dcn":
        return tuple(moves)
    axes = groups.axes()
    if axes:
        moves.append(Move(leg="gather:torus", unit_bytes=shard * held))
        held *= math.prod(groups.factors[axis + 1] for axis in axes)
    for axis in groups.inner_axes():
        moves.append(Move(leg=f"gather:{axis}", unit_bytes=shard * held))
        held *= groups.factors[axis + 1]
    return tuple(moves)


def _exchange(groups: Groups, held_bytes: float, stage: str) -> tuple[Move, ...]:
    """Return an all-to-all: each axis exchanges everything, all torus axes at the same time."""
    moves: list[Move] = []
    if groups.axes() and stage != "dcn":
        moves.append(Move(leg="exchange", unit_bytes=held_bytes))
    for axis in groups.inner_axes() if stage != "dcn" else ():
        unit = held_bytes / groups.factors[axis + 1]
        moves.append(Move(leg=f"gather:{axis}", unit_bytes=unit))
    if groups.factors[0] > 1 and stage != "torus":
        unit = held_bytes / groups.factors[0]
        moves.append(Move(leg="gather:dcn", unit_bytes=unit))
    return tuple(moves)
