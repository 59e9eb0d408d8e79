"""Collective matmul: a gather or a scatter over the tensor axis as hops beside blocks of matmuls.

Wang et al., "Overlap Communication with Dependent Computation via Decomposition" (ASPLOS 2023),
with the hops of the exported loops (`emit/runtime/collectives.py`): every member sends the N - 1
pieces that the plain collective sends too. In both directions N // 2 of them go up and
(N - 1) // 2 down.

Of a gather, the matmul of the own piece runs beside the first hop, that of each piece that came
beside the next:

| N, directions | blocks beside hops | at last |
| --- | --- | --- |
| one | N - 1 times one beside a hop | 1 |
| both, N even | one beside a pair, N/2 - 2 times two beside a pair, two beside a hop | 1 |
| both, N odd | one beside a pair, (N - 1)/2 - 1 times two beside a pair | 2 |

A scatter is the same backwards: its products are what the sums that arrive take up.

What a block moves through HBM depends on what the ring cuts: pieces of the sequence are rows, and
every block reads the weights again; pieces of the embed axis are summands of the whole result,
which is read and written in float32 for every block but the first. How products that are scattered
add up is the implementation's to say (`Compute.ring`):

- "scattered": in a sum that travels, as in the exported loops and in rings of XLA's partitioner.
  Products of one block join one float32 sum, which the last of them joins with the sum that
  arrived (read off TPU programs).
- "sent": nowhere on the way. Every member is sent its summand as products have made it, in their
  format, and adds up what came in a pass of its own, at last (`gpu_rules.add_up_summands`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardsim.plan.layout import EMBED_SHARDED, Layout, Number, somewhere
from shardsim.plan.plan import MATMUL_OVERLAP
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.program.schedule import Await, Move, Repeat, Start, Task, Work
from shardsim.program.tasks import Collective, Compute
from shardsim.records import replace

SUM_BYTES = 4.0  # sums of products are float32
SCATTERED = ("scattered", "sent")  # `Compute.ring` of products whose results leave in pieces
UNIDIRECTIONAL, BIDIRECTIONAL = (
    MATMUL_OVERLAP.index(name) for name in ("unidirectional", "bidirectional")
)


def runs_as_ring(task: Collective, layout: Layout) -> Number:
    """Return whether the plan wants a collective as a ring: 1 or 0, or an array of them."""
    if task.schedule != "ring":
        return 0
    wanted = np.greater(layout.matmul_overlap, 0) & np.greater(layout.role(task.role).size, 1)
    return wanted & np.greater(task.count, 0)


def parted(task: Collective, layout: Layout) -> tuple[Collective, list[Task]]:
    """Return a collective where it is no ring, perhaps nowhere, and where it is one, if it is."""
    on = runs_as_ring(task, layout)
    apart = replace(task, count=task.count * np.logical_not(on))
    return apart, [replace(task, count=task.count * on)] if somewhere(on) else []


def ring(task: Collective, partners: Sequence[Compute], layout: Layout, on: Number) -> list[Task]:
    """Return a collective as hops beside blocks of its `partners`, where `on`."""
    members = layout.role(task.role).size
    both = on & np.equal(layout.matmul_overlap, BIDIRECTIONAL) & np.greater(members, 2)
    one = on & np.logical_not(both)
    odd = both & np.equal(np.mod(members, 2), 1)
    even = both & np.logical_not(odd)
    embed = np.equal(layout.residual, EMBED_SHARDED)
    starts = (1 + both) * np.logical_not(layout.partitioned)  # the partitioner sends zeros first
    before = [_any(partners[:number]) for number in range(len(partners))]
    after = [_any(partners[number + 1 :]) for number in range(len(partners))]
    blocks = tuple(
        ring_block(partner, members, embed, np.logical_not(some), np.logical_not(more), starts)
        for partner, some, more in zip(partners, before, after, strict=True)
    )
    two = (Repeat(times=2, tasks=blocks),)

    def hop(ways: int, stage: str) -> Move:
        piece = task.bytes / members
        return Move(
            name=f"{task.name}, {'a pair of hops' if ways == 2 else 'a hop'}",
            kind="permute",
            role=task.role,
            bytes=piece * ways,
            count=task.count,
            purpose=task.purpose,
            stage=stage,
            ways=ways,
        )

    # On a line the ring closes over the whole way back. In one direction that delays one hop of
    # those behind each other; in both, the two ends wait for each other at every hop.
    pair, single, last = hop(2, "closing"), hop(1, "all"), hop(1, "closing")

    def beside(move: Move, times: Number, work: tuple[Task, ...]) -> list[Task]:
        if not np.any(times):
            return []
        if task.hops_wait:
            hops = move if move.ways == 1 else Repeat(times=2, tasks=(last,))
            return [Repeat(times=times, tasks=(hops, *work))]
        return [Repeat(times=times, tasks=(Start(task=move), *work, Await(name=move.name)))]

    order = [
        *beside(pair, both * 1, blocks),
        *beside(pair, both * ((members - 1) // 2 - 1), two),
        *beside(last, even * 1, two),
        *beside(last, one * 1, blocks),
        *beside(single, one * (members - 2), blocks),
        Repeat(times=on + odd * 1, tasks=blocks),
    ]
    return order if task.kind == "all-gather" else order[::-1]


def _any(partners: Sequence[Compute]) -> Number:
    """Return whether any of `partners` adds to what a ring scatters: an array if that differs."""
    return np.logical_or.reduce(
        [np.greater(one.count, 0) for one in partners if one.ring in SCATTERED] or [False]
    )


def ring_block(
    task: Compute,
    members: Number,
    embed: Number,
    first: Number = True,
    last: Number = True,
    starts: Number = 1,
) -> Work:
    """Return one block (the mean of `members` blocks) of a matmul that a ring cuts.

    `embed` says whether the ring passes pieces of the embed axis, else of the sequence; `first` and
    `last`, where it stands among the products that a block of a scatter adds up, of which so many
    `starts` begin a sum that travels.
    """
    wire = max(2.0, float(DTYPE_BYTES[task.dtype]))
    task = replace(task, grid=None)  # a part of one
    m, k, n = task.m, task.k, task.n
    rows: Number
    deep: Number
    wide: Number
    rest = task.hbm_bytes - (m * k + k * n + m * n) * wire  # what is fused into its end reads
    if task.ring == "gathered":
        # A piece of embed gives a summand: the first is written, the others are added to it.
        rows, deep, wide = np.where(embed, 1, members), np.where(embed, members, 1), 1
        summed = 2.0 * SUM_BYTES - (2.0 * SUM_BYTES - wire) / members
        result = m * n / rows * np.where(embed, summed, wire)
    elif task.ring in SCATTERED:
        rows, deep, wide = np.where(embed, 1, members), 1, np.where(embed, members, 1)
        if task.ring == "sent":
            summed = wire * (2.0 - first)
        else:
            summed = _travelling_bytes(wire, members, first, last, starts)
        result = m * n / members * summed
    else:
        return replace(
            task,
            m=m / members,
            hbm_bytes=task.hbm_bytes / members,
            vector_ops=task.vector_ops / members,
        )
    operands = (m / rows * k / deep + k / deep * n / wide) * wire
    return replace(
        task,
        m=m / rows,
        k=k / deep,
        n=n / wide,
        hbm_bytes=operands + result + rest / members,
        vector_ops=task.vector_ops / members,
    )


def _travelling_bytes(
    wire: float, members: Number, first: Number, last: Number, starts: Number
) -> Number:
    """Return the bytes that an element of a block's result moves where the sum travels.

    A product is added to those before it. The sum leaves, or joins those which arrived, in a pass
    of its own as the product is done before they come.
    """
    read = np.where(first, 0.0, SUM_BYTES)
    joined = wire + (1.0 - starts / members) * 2.0 * SUM_BYTES
    joined = joined + (1.0 - np.minimum(starts, 1) / members) * wire
    return read + np.where(last, joined, SUM_BYTES)
