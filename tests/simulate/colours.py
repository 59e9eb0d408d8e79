"""A gather cut into parts ("colours") that cross the torus axes in different orders, and into
chunks that follow each other: what `messages.py` plays hop by hop.

The last axis of a part carries nearly all of its bytes: the parts are sized so that every axis
carries what its rate allows (Sack and Gropp 2015). Where axes differ in length the parts' phases
do not line up, and chunks let one part's last phase run beside another part's first one.
"""

from __future__ import annotations

import math

import numpy as np

from shardsim.simulate.groups import Groups

Chain = tuple[tuple[int, float], ...]  # (axis, bytes of a shard at that time), one after the other


def colour_chains(groups: Groups, shard_bytes: float, chunks: int = 1) -> tuple[Chain, ...]:
    """Return one chain of phases per chunk and colour of an all-gather."""
    axes = groups.axes()
    orders = colour_orders(groups, axes)
    chains: list[Chain] = []
    for _ in range(chunks):
        for order, share in zip(orders, colour_shares(groups, orders), strict=True):
            held = shard_bytes * share / chunks
            moves = []
            for axis in order:
                moves.append((axis, held))
                held *= groups.factors[axis + 1]
            chains.append(tuple(moves))
    return tuple(chains)


def colour_orders(groups: Groups, axes: list[int]) -> list[tuple[int, ...]]:
    """Return the orders in which parts cross the axes, each ending on another one.

    Rotations where axes are equally fast: in every phase each axis has one part. Else slow axes
    come first, while there is little to carry.
    """
    rates = {axis: groups.axis_rate(axis) for axis in axes}
    if len(set(rates.values())) == 1:
        return [tuple(axes[start:] + axes[:start]) for start in range(len(axes))]
    slow_first = sorted(axes, key=lambda axis: rates[axis])
    return [(*(other for other in slow_first if other != axis), axis) for axis in axes]


def colour_shares(groups: Groups, orders: list[tuple[int, ...]]) -> list[float]:
    """Return the parts of the array per colour that load every axis as its rate allows.

    Solves sum_c share_c load_c(axis) = rate(axis) t for the shares and t.
    """
    axes = sorted(orders[0])
    count = len(orders)
    matrix = np.zeros((count + 1, count + 1))
    for number, order in enumerate(orders):
        held = 1.0
        for axis in order:
            length = groups.factors[axis + 1]
            matrix[axes.index(axis), number] = held * (length - 1)
            held *= length
    matrix[:-1, -1] = [-groups.axis_rate(axis) for axis in axes]
    matrix[-1, :-1] = 1.0
    right = np.zeros(count + 1)
    right[-1] = 1.0
    shares = np.linalg.solve(matrix, right)[:-1]
    if shares.min() < 0 or not math.isclose(shares.sum(), 1.0):
        raise ValueError("an axis is too slow to end on")
    return [float(share) for share in shares]
