"""The order in which a pipeline stage works: one forward, one backward (1F1B).

This is the schedule whose idle time the cost model charges, (stages - 1) / (microbatches x
interleave) of the layers' time, and whose memory it counts, as many microbatches as there are
stages (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One chunk of a stage's layers, forward or backward, for one microbatch."""

    forward: bool
    microbatch: int
    chunk: int


def one_forward_one_backward(
    stages: int, stage: int, microbatches: int, chunks: int = 1
) -> tuple[Turn, ...]:
    """Return the turns of one stage in order.

    A stage runs ahead by as many chunks as it takes until the first gradient comes back, then
    alternates. With several chunks, microbatches go through them in groups of `stages`, or a few
    more where they do not come in whole groups.

    >>> turns = one_forward_one_backward(2, 0, 3)
    >>> [("F" if turn.forward else "B") + str(turn.microbatch) for turn in turns]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    groups = max(microbatches // stages, 1)
    firsts = [number * microbatches // groups for number in range(groups + 1)]
    places = [
        (microbatch, chunk)
        for first, end in pairwise(firsts)
        for chunk in range(chunks)
        for microbatch in range(first, end)
    ]
    forward = [Turn(forward=True, microbatch=m, chunk=c) for m, c in places]
    backward = [Turn(forward=False, microbatch=m, chunk=chunks - 1 - c) for m, c in places]
    if chunks == 1:
        ahead = stages - stage - 1
    else:
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * -(-microbatches // groups)
    ahead = min(ahead, len(forward))
    steady = [turn for pair in zip(forward[ahead:], backward, strict=False) for turn in pair]
    return (*forward[:ahead], *steady, *backward[len(forward) - ahead :])
