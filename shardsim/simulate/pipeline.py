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
    all_forward_all_backward,
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


Line = Trip | Message | Part  # of a script


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
    if schedule.pipeline.in_turns:
        yield from _in_turns(schedule, stage, stages, microbatches)
        yield from _once(schedule, "reduction", "update")
        return
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
    """Yield what a stage does between a step's beginning and its end, with all microbatches forward
    first.

    The first stage has embedding and head: the last one passes microbatches on to it, and gets
    their gradients back, as in the emitted loop.
    """
    visits = {phase: _visits(schedule, phase) for phase in ("forward", "head", "backward")}
    turns = all_forward_all_backward(microbatches, chunks)
    last, halfway = stages * chunks - 1, len(turns) // 2

    def message(arriving: bool, way: int, microbatch: int, place: int) -> Message:
        leg, sender = "next" if way == 1 else "back", (stage - way * arriving) % stages
        number = microbatch * stages * chunks + place
        return Message(arriving=arriving, leg=f"{leg}:{sender}", number=number)

    for at, turn in enumerate(turns):
        if stage == 0 and at == halfway:
            for microbatch in range(microbatches):
                yield message(True, 1, microbatch, last + 1)
            for _ in range(microbatches):
                yield from visits["head"][0].each()
        if stage == 0 and at >= halfway:
            # What the last stage gets in the next tick; before the first one, what it got so far.
            begin = at + stages - 1 if at > halfway else at
            for sent in turns[begin : at + stages]:
                yield message(False, -1, sent.microbatch, sent.chunk * stages + stages - 1)
        place, way = turn.chunk * stages + stage, 1 if turn.forward else -1
        if not turn.forward or place > 0:
            yield message(True, way, turn.microbatch, place)
        final = at == len(turns) - 1
        visit = visits["forward" if turn.forward else "backward"][-1 if final else 0]
        yield from replace(visit, before=False, after=False).each()
        if turn.forward or stage > 0:
            yield message(False, way, turn.microbatch, place + way)


def _in_turns(schedule: Schedule, stage: int, stages: int, microbatches: int) -> Iterator[Line]:
    """Yield the same where a tick has one microbatch forward and one backward.

    Rings close: in each tick every stage passes something on both ways. Gradients of weights that
    are apart are those of one microbatch on all stages, before a tick passes gradients on.
    """
    phases = ("forward", "head", "backward", "weights")
    visits = {phase: _visits(schedule, phase) for phase in phases}
    last = stages - 1

    def message(arriving: bool, way: int, microbatch: int) -> Message:
        leg, sender = "next" if way == 1 else "back", (stage - way * arriving) % stages
        number = microbatch * stages + sender
        return Message(arriving=arriving, leg=f"{leg}:{sender}", number=number)

    def layers(phase: str, final: bool) -> Iterator[Trip]:
        visit = visits[phase][-1 if final else 0]
        return replace(visit, before=False, after=False).each()

    for tick in range(microbatches + 2 * last):
        there, back = tick - stage, tick - 2 * last + stage
        if 0 <= there < microbatches:
            if stage > 0:
                yield message(True, 1, there)
            yield from layers("forward", False)
            yield message(False, 1, there)
            if stage == last:
                yield from visits["head"][0].each()
        if 0 <= back < microbatches:
            if stage < last:
                yield message(True, -1, back)
            yield from layers("backward", back == microbatches - 1)
        made = tick - 2 * last
        if visits["weights"] and 0 <= made < microbatches:
            yield from layers("weights", made == microbatches - 1)
        if 0 <= back < microbatches:
            yield message(False, -1, back)


def _visits(schedule: Schedule, phase: str) -> list[Visit]:
    return [v for v in schedule.visits() if schedule.blocks[v.block].phase == phase and v.many]
