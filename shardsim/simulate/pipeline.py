"""What a stage does in order; with several, one forward, one backward (1F1B).

This is the schedule whose idle time the cost model charges, (stages - 1) / (microbatches x
interleave) of the layers' time, and whose memory it counts, as many microbatches as there are
stages (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from shardsim.program.schedule import Schedule, Trip, Visit


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


@dataclass(frozen=True, kw_only=True)
class Message:
    """A microbatch that is passed on to another stage, or comes from one."""

    arriving: bool
    leg: str  # the sender's
    number: int  # the same at both ends


Line = Trip | Message  # of a script


def script(schedule: Schedule, stage: int) -> Iterator[Line]:
    """Yield what the chips of a stage do in order.

    The head runs on the last stage only, with the embedding, as the cost model has it.
    """
    stages, microbatches, chunks = (
        round(float(number))
        for number in (
            schedule.pipeline.stages,
            schedule.pipeline.microbatches,
            schedule.pipeline.chunks,
        )
    )
    if stages == 1:
        yield from schedule.trips()
        return
    visits = {phase: _visits(schedule, phase) for phase in ("forward", "head", "backward")}
    last = stages * chunks - 1
    for turn in one_forward_one_backward(stages, stage, microbatches, chunks):
        place = turn.chunk * stages + stage
        start, end, way = (0, last, 1) if turn.forward else (last, 0, -1)
        # Gradients are complete in the last microbatch.
        which = -1 if turn.microbatch == microbatches - 1 else 0
        leg = "next" if way == 1 else "back"
        if place != start:
            number = turn.microbatch * stages * chunks + place
            before = (stage - way) % stages
            yield Message(arriving=True, leg=f"{leg}:{before}", number=number)
        visit = visits["forward" if turn.forward else "backward"][which]
        head = place == last
        visit = replace(visit, before=turn.forward and head, after=not turn.forward and head)
        yield from visit.each()
        if turn.forward and head:
            yield from visits["head"][0].each()
        if place != end:
            number = turn.microbatch * stages * chunks + place + way
            yield Message(arriving=False, leg=f"{leg}:{stage}", number=number)
    for trip in schedule.trips():
        if schedule.blocks[trip.block].phase in ("reduction", "update"):
            yield trip


def _visits(schedule: Schedule, phase: str) -> list[Visit]:
    return [v for v in schedule.visits() if schedule.blocks[v.block].phase == phase and v.many]
