"""Collective matmul: a gather or reduce-scatter cut into ring steps beside blocks of a matmul.

Wang et al., "Overlap Communication with Dependent Computation via Decomposition" (ASPLOS 2023),
with the hops of XLA's loops (openxla/xla, `dot_handler.cc`) and, in one direction, the order of the
exported ring (`emit/runtime/collectives.py`), whose sums travel beside products. With N members
the matmul becomes N blocks, and while one is multiplied the next operand (or the partial result)
moves one hop. How much stays exposed follows from the times of a block and of a hop; nothing is
assumed about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.cost.network import Group
from shardsim.plan.layout import Number

OFF, UNIDIRECTIONAL, BIDIRECTIONAL = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class RingTime:
    """A collective together with its matmuls."""

    total_s: Number
    decomposed: Number  # whether the ring was used; otherwise one after the other
    hops: Number  # blocks that a member sends in the ring


def ring_matmul_s(
    *,
    group: Group,
    total_bytes: Number,
    matmul_s: Number,
    block_s: Number,
    collective_s: Number,
    mode: Number,
) -> RingTime:
    """Return the time of an all-gather before, or a reduce-scatter after, matmuls.

    `total_bytes` is the whole gathered or scattered array, `matmul_s` the undivided matmuls,
    `block_s` one of N blocks of them, `collective_s` the collective on its own, `mode` the plan's
    choice (0 off, 1 one direction, 2 both; both need N divisible by 4, as in XLA).

    - one direction: a block at once, then N - 1 times a block beside a hop (of the operand
      of an all-gather, of the sum of a reduce-scatter; the last trip skips its hop);
    - both: N/2 times two blocks beside one hop each way, with one more hop alone, before a gather
      (so that both directions have a block to start with) or after a scatter (to add the two sums).

    On a line the ring closes over the whole way back. In one direction that delays one hop of
    those behind each other; in both, the two ends wait for each other at every hop.

    XLA's own test decides whether cutting pays: the ring's prologue is extra, and where the
    collective alone would use more links than a ring, the ring is slower by that factor.
    """
    members = group.size
    both = np.equal(mode, BIDIRECTIONAL) & (np.mod(members, 4) == 0)
    ways = np.where(both, group.ring_ways, 1.0)
    wire_s = total_bytes / members / group.ring_bytes_per_s
    hop_s = wire_s + group.ring_hop_s
    closing_s = hop_s + group.ring_close_s
    one_way = block_s + (members - 2) * np.maximum(block_s, hop_s) + np.maximum(block_s, closing_s)
    # Where both directions share one link, the bytes of a pair of hops take twice as long.
    pair_s = closing_s + np.where(ways > 1, 0.0, wire_s)
    two_way = closing_s + members / 2.0 * np.maximum(2.0 * block_s, pair_s)
    ring_s = np.where(both, two_way, one_way)
    # The multiplier of XLA's test: bandwidth of the whole collective over that of the ring.
    ring_alone_s = (members - 1) * wire_s / ways
    alone_s = np.where(collective_s > 0, collective_s, 1.0)
    slower = np.maximum(ring_alone_s / alone_s, 1.0) * collective_s
    prologue_s = slower * 2.0 / members
    pays = np.maximum(matmul_s, slower) + prologue_s < matmul_s + collective_s
    used = np.greater(mode, OFF) & np.greater(members, 1) & pays
    return RingTime(
        total_s=np.where(used, ring_s, matmul_s + collective_s),
        decomposed=used,
        hops=np.where(both, members + 1, members - 1),
    )


def behind_s(wanted_s: Number, window_s: Number, switched_on: Number) -> Number:
    """Return how much of `wanted_s` of communication outlasts a window of other work."""
    on = np.asarray(switched_on, dtype=bool)
    return np.where(on, np.maximum(wanted_s - window_s, 0.0), wanted_s)
