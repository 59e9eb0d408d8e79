"""What the chips of a pipeline stage do in order, as trips through blocks and messages.

The idle time that the cost model charges of 1F1B and GPipe is (stages - 1) / (microbatches x
interleave) of the layers' time, where nothing is sent and all stages are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardsim.program.schedule import Schedule, Trip, Visit
from shardsim.program.turns import (
    Turn,
    one_forward_one_backward,
    only_forward,
    zero_bubble,
)


@dataclass(frozen=True, kw_only=True)
class Message:
    """A microbatch that is passed on to another stage, or comes from one."""

    arriving: bool
    leg: str  # the sender's
    number: int  # the same at both ends


@dataclass(frozen=True, kw_only=True)
class Part:
    """A trip through a block up to what follows its tasks, or from there on."""

    trip: Trip
    closing: bool


@dataclass(frozen=True, kw_only=True)
class Idle:
    """What a stage does on nothing, in a tick that all stages run alike."""

    line: Trip | Message


Line = Trip | Message | Part | Idle  # of a script


def script(schedule: Schedule, stage: int) -> Iterator[Line]:
    """Yield what the chips of a stage do in order.

    The head runs on the last stage only, with the embedding, as the cost model has it.
    """
    schedule = schedule.of_stage(stage)
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
    yield from _once(schedule, "opening")
    if schedule.pipeline.lockstep:
        yield from _in_ticks(schedule, stage, stages, microbatches, chunks)
        yield from _once(schedule, "reduction", "update")
        return
    phases = ("forward", "head", "backward", "weights")
    visits = {phase: _visits(schedule, phase) for phase in phases}
    last = stages * chunks - 1
    for turn in _turns(schedule, stage, stages, microbatches, chunks):
        place = turn.chunk * stages + stage
        if turn.weights:
            which = -1 if turn.microbatch == microbatches - 1 else 0
            yield from replace(visits["weights"][which], before=False, after=False).each()
            continue
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
        trips = [*visit.each()]
        final = trips.pop() if trips else None
        yield from trips
        number = turn.microbatch * stages * chunks + place + way
        if turn.forward and head:
            yield from ((final,) if final else ())
            yield from visits["head"][0].each()
        elif place == end:
            yield from ((final,) if final else ())
        elif final is None:
            yield Message(arriving=False, leg=f"{leg}:{stage}", number=number)
        else:
            # What a last trip closes with, sums of gradients, others need not wait for.
            yield Part(trip=final, closing=False)
            yield Message(arriving=False, leg=f"{leg}:{stage}", number=number)
            yield Part(trip=final, closing=True)
    yield from _once(schedule, "reduction", "update")


def _turns(
    schedule: Schedule, stage: int, stages: int, microbatches: int, chunks: int
) -> tuple[Turn, ...]:
    """Return the turns of a stage, of schedules without ticks."""
    if schedule.pipeline.split_backward:
        return zero_bubble(stages, stage, microbatches)
    if any(block.phase == "backward" for block in schedule.blocks):
        return one_forward_one_backward(stages, stage, microbatches, chunks)
    return only_forward(stages, microbatches, chunks)


def _once(schedule: Schedule, *phases: str) -> Iterator[Trip]:
    """Yield the trips of a step's beginning or end, in order."""
    for trip in schedule.trips():
        if schedule.blocks[trip.block].phase in phases:
            yield trip


def _in_ticks(
    schedule: Schedule, stage: int, stages: int, microbatches: int, chunks: int
) -> Iterator[Line]:
    """Yield what a stage does between a step's beginning and its end in ticks that all stages run
    alike, also on nothing, as the emitted loops do.

    In each tick every stage passes something on round the ring, and waits for what it gets: the
    last one passes microbatches on to the first. The way back of GPipe's loop (arXiv 1811.06965)
    has its ticks in reverse, and the head is the first stage's. Where a tick has one microbatch
    forward and one backward, a stage passes back what it made in the tick before; gradients of
    weights that are apart are those of one microbatch on all stages.
    """
    phases = ("forward", "head", "backward", "weights")
    visits = {phase: _visits(schedule, phase) for phase in phases}
    turns, last = microbatches * chunks, stages - 1

    def turn(phase: str, number: int) -> Iterator[Line]:
        final = phase != "forward" and number == turns - 1
        visit = replace(visits[phase][-1 if final else 0], before=False, after=False)
        for trip in visit.each():
            yield trip if 0 <= number < turns else Idle(line=trip)

    def shift(way: int, tick: int, number: int) -> Iterator[Line]:
        leg = "next" if way == 1 else "back"
        for arriving, sender in ((False, stage), (True, (stage - way) % stages)):
            message = Message(arriving=arriving, leg=f"{leg}:{sender}", number=tick)
            yield message if 0 <= number < turns else Idle(line=message)

    def head(mine: bool) -> Iterator[Line]:
        for trip in visits["head"][0].each():
            yield trip if mine else Idle(line=trip)

    if not schedule.pipeline.in_turns:
        for tick in range(turns + last):
            yield from turn("forward", tick - stage)
            yield from shift(1, tick, tick - stage)
        for _ in range(microbatches):
            yield from head(stage == 0)
        for tick in range(turns + last):
            yield from shift(-1, tick, tick - last + (stage - 1) % stages)
            yield from turn("backward", tick - last + stage)
        return
    for tick in range(turns + 2 * last):
        if tick < turns + last:
            yield from turn("forward", tick - stage)
            yield from shift(1, tick, tick - stage)
        back = tick - 2 * last + stage
        if last <= tick < turns + last:
            yield from head(stage == last)
        if tick >= last:
            yield from shift(-1, tick, back - 1)
            yield from turn("backward", back)
        if visits["weights"] and tick >= 2 * last:
            yield from turn("weights", tick - 2 * last)


def _visits(schedule: Schedule, phase: str) -> list[Visit]:
    return [v for v in schedule.visits() if schedule.blocks[v.block].phase == phase and v.many]
