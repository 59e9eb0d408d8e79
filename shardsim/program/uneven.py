"""Sequences of many lengths on the devices of a layout: what attention computes of them, and what
the fullest device has over the mean, for which all others wait.

Every device has equally many rows, or sequences, of a batch. Padded rows are all alike. Of packed
rows attention by sequence is uneven, of sequences without rows everything is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from shardsim.graph.arrays import Pairs
from shardsim.plan.layout import Layout, Number
from shardsim.plan.lengths import BY_SEQUENCE, Lengths, fullest, rows_of, sampled
from shardsim.program.shapes import Workload


def tokens_load(work: Workload, layout: Layout) -> Number:
    """Return the tokens of the fullest device over the mean."""
    if work.lengths is None or not work.lengths.unpadded:
        return 1.0
    each, ranks = _drawn(work, layout)
    return fullest(sampled(work.lengths, work.longest), each, ranks)


def attended(work: Workload, layout: Layout, mask: Pairs) -> Number | None:
    """Return the share of the pairs of a device's rows, each against itself, that attention by
    sequence computes on the fullest one; None where it computes whole rows.

    Without rows it is in units of the square of the mean sequence, and may be above 1.
    """
    lengths = work.lengths
    if lengths is None or lengths.held not in BY_SEQUENCE:
        return None
    each, ranks = _drawn(work, layout)
    found = _pairs(lengths, work.longest, mask)
    share = float(np.mean(found)) * fullest(found, each, ranks)
    return share / tokens_load(work, layout)


def load(work: Workload, layout: Layout) -> Number:
    """Return the work of the fullest device over the mean: of attention, where tokens are even."""
    lengths = work.lengths
    if lengths is None or lengths.held != "packed":
        return tokens_load(work, layout)
    each, ranks = _drawn(work, layout)
    squares = [sum(one**2 for one in row) for row in rows_of(lengths, work.longest)]
    return fullest(squares, each, ranks)


@lru_cache(maxsize=64)
def _pairs(lengths: Lengths, longest: int, mask: Pairs) -> tuple[float, ...]:
    """Return the pairs computed of each row or sequence, over those of a row, or the mean one."""
    if lengths.packed:
        return tuple(mask.packed(longest, rows_of(lengths, longest)))
    tokens = sampled(lengths, longest)
    whole = float(round(tokens.mean())) ** 2
    return tuple(one / whole for one in mask.alone([int(count) for count in tokens]))


def _drawn(work: Workload, layout: Layout) -> tuple[Number, Number]:
    """Return how many rows or sequences a device has between two points where all wait, and among
    how many devices they are dealt.

    Gathered weights make every microbatch wait; else the step does, once.
    """
    ranks = layout.data.size * layout.fsdp.size * layout.expert.size
    waits = np.where(np.greater(layout.gather.size, 1), layout.microbatches, 1)
    return work.batch / (ranks * waits), ranks
