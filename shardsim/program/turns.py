"""What a pipeline stage does in order, chunk by chunk and microbatch by microbatch.

1F1B has as many microbatches under way as there are stages (Narayanan et al. 2021, arXiv
2104.04473, section 2.2), zero-bubble H1 as many, and gradients of weights apart, for which nobody
waits (arXiv 2401.10241, section 2). What stages do in ticks is in `simulate/pipeline.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from shardsim.plan.layout import Layout, Number


def stages_in_a_row(layout: Layout) -> Number:
    """Return how many stages lie in a slice where some sends stay inside one and others cross to
    the next; 1 where all take as long: in ticks the slowest."""
    axis = layout.pipeline
    inner = axis.size / axis.slices
    mixed = np.greater(axis.slices, 1) & np.greater(inner, 1) & np.logical_not(layout.lockstep)
    return np.where(mixed, inner, 1)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One chunk of a stage's layers, forward or backward, for one microbatch; or the gradients of
    its `weights`, where those are apart from the way back."""

    forward: bool
    microbatch: int
    chunk: int
    weights: bool = False


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
    forward = only_forward(stages, microbatches, chunks)
    backward = [replace(turn, forward=False, chunk=chunks - 1 - turn.chunk) for turn in forward]
    if chunks == 1:
        ahead = stages - stage - 1
    else:
        groups = max(microbatches // stages, 1)
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * -(-microbatches // groups)
    ahead = min(ahead, len(forward))
    steady = [turn for pair in zip(forward[ahead:], backward, strict=False) for turn in pair]
    return (*forward[:ahead], *steady, *backward[len(forward) - ahead :])


def only_forward(stages: int, microbatches: int, chunks: int = 1) -> tuple[Turn, ...]:
    """Return the forward turns of every stage in order.

    >>> [(turn.microbatch, turn.chunk) for turn in only_forward(2, 3, 2)]
    [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    """
    groups = max(microbatches // stages, 1)
    firsts = [number * microbatches // groups for number in range(groups + 1)]
    return tuple(
        Turn(forward=True, microbatch=microbatch, chunk=chunk)
        for first, end in pairwise(firsts)
        for chunk in range(chunks)
        for microbatch in range(first, end)
    )


def zero_bubble(stages: int, stage: int, microbatches: int) -> tuple[Turn, ...]:
    """Return the turns of one stage in order, gradients of weights apart.

    Stage s runs ahead as in 1F1B, and lets the gradients of weights of s microbatches wait: so
    activations of as many microbatches as there are stages are there on each. With F, B and W
    seconds of a turn P stages idle (P - 1) (F + B - W), a third of 1F1B where all three are equal.

    >>> turns = zero_bubble(2, 1, 3)
    >>> ["FBW"[(not turn.forward) + turn.weights] + str(turn.microbatch) for turn in turns]
    ['F0', 'B0', 'F1', 'B1', 'W0', 'F2', 'B2', 'W1', 'W2']
    """
    ahead = min(stages - stage, microbatches)
    turns = [Turn(forward=True, microbatch=number, chunk=0) for number in range(ahead)]
    for number in range(microbatches + stage):
        if number < microbatches:
            turns.append(Turn(forward=False, microbatch=number, chunk=0))
        if number >= stage:
            turns.append(Turn(forward=False, microbatch=number - stage, chunk=0, weights=True))
        if ahead + number < microbatches:
            turns.append(Turn(forward=True, microbatch=ahead + number, chunk=0))
    return tuple(turns)
