"""How long the stages of a pipeline wait for each other in a Schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from shardsim.cost.stages import StageTurns, Took, Turns, in_ticks_s, waiting_s, walked_s
from shardsim.cost.trips import Clock, trip_s
from shardsim.plan.layout import Number
from shardsim.program.schedule import Schedule

LAYERS = ("forward", "backward")  # phases in which stages of a pipeline work and wait
WALKED = (*LAYERS, "weights", "head", "boundary")  # the same where their turns are walked


def bubble_s(clock: Clock, schedule: Schedule, waits: bool = True) -> Number:
    """Return how long the stages of a pipeline wait for each other; the clock is that of the one
    with the head.

    What is of the head makes none but the last one wait, and sums over replicas behind the last
    microbatch none at all. `waits`: whether they wait for what others wait for.
    """
    pipeline = schedule.pipeline
    if not np.any(pipeline.bubble):
        return 0.0
    if pipeline.shares:
        return _walked_s(clock, schedule, waits)
    apart = pipeline.split_backward & np.logical_not(pipeline.lockstep)
    apart = apart | np.greater(pipeline.in_a_row, 1)
    if np.all(walked := apart | np.less_equal(pipeline.stages, 1)):
        return _walked_of_many_s(clock, schedule, waits)
    found = _formula_s(clock, waits)
    if np.any(apart):
        found = np.where(walked, _walked_of_many_s(clock, schedule, waits), found)
    return found


def _walked_of_many_s(clock: Clock, schedule: Schedule, waits: bool) -> Number:
    """Return the same of plans with stages that are alike, by walking their turns: plans of one
    size of pipeline at a time."""
    pipeline = schedule.pipeline
    names = ("stages", "microbatches", "chunks", "in_a_row")
    sizes = np.broadcast_arrays(*(getattr(pipeline, name) for name in names))
    found: Number = 0.0
    for each in {*zip(*(size.ravel().tolist() for size in sizes), strict=True)}:
        own = replace(pipeline, **dict(zip(names, each, strict=True)))
        if own.stages > 1:
            one = _walked_s(clock, replace(schedule, pipeline=own), waits, pipeline.microbatches)
            here = [np.equal(size, mine) for size, mine in zip(sizes, each, strict=True)]
            found = np.where(np.logical_and.reduce(here), one, found)
    return found


def _walked_s(clock: Clock, schedule: Schedule, waits: bool, many: Number = None) -> Number:
    """Return the same of pipelines of one size, by walking the turns of all stages."""
    pipeline = schedule.pipeline
    stages = round(float(pipeline.stages))
    many = pipeline.microbatches if many is None else many
    trained = any(block.phase == "backward" for block in schedule.blocks)
    head = _took(clock, many, waits)
    made: dict[float, StageTurns] = {}
    shares = pipeline.shares or (1.0,) * stages
    for share in shares[:-1]:
        if share not in made:
            alone = clock
            if waits:
                own = schedule.with_share(share, head=False) if pipeline.shares else schedule
                alone = Clock(clock.durations, own, head=False)
            made[share] = _turns_of(_took(alone, many, waits))
    each = [made[share] for share in shares[:-1]]
    each.append(replace(_turns_of(head), head=head["head"]))
    (boundary,) = (block for block in schedule.blocks if block.phase == "boundary")
    # Sums that no layer of the last stage hides, which none but that stage waits for.
    after = () if shares[-1] else schedule.beside_the_head()[1]
    after_s = sum(clock.durations.alone_s(task) for task in after)
    own_s = sum(took.total_s(pipeline.microbatches) for took in head.values()) + after_s
    row = round(float(pipeline.in_a_row))
    send = next(boundary.collectives())
    far_s, near_s = (
        clock.durations.alone_s(replace(send, count=1, stage=where)) for where in ("all", "torus")
    )
    sends_s = [far_s if (number + 1) % row == 0 else near_s for number in range(stages)]
    return walked_s(pipeline, each, sends_s, trained, after_s) - own_s


def _turns_of(found: Mapping[str, Took]) -> StageTurns:
    return StageTurns(
        forward=found["forward"], backward=found["backward"], weights=found["weights"]
    )


def _took(clock: Clock, many: Number, waits: bool) -> dict[str, Took]:
    """Return the seconds of each phase of a microbatch on one stage; `many` are a step's."""
    found = dict.fromkeys(WALKED, Took())
    for phase in WALKED:
        blocks = [n for n, block in enumerate(clock.schedule.blocks) if block.phase == phase]
        if not blocks:
            continue
        trips = [clock.schedule.blocks[number].trips for number in blocks]
        each = sum(trips) / many
        turn_s = [trip_s(clock, number, waits) * each for number in blocks]
        closing_s = [
            clock.closing[number].value / np.where(np.greater(own, 0), own, 1) * each * waits
            for number, own in zip(blocks, trips, strict=True)
        ]
        found[phase] = Took(
            turn_s=turn_s[-1],
            closing_s=closing_s[-1],
            last_turn_s=turn_s[0],
            last_closing_s=closing_s[0],
        )
    return found


def _formula_s(clock: Clock, waits: bool) -> Number:
    """Return the same of stages that are alike, each of which runs back in one turn."""
    pipeline = clock.schedule.pipeline
    alone = Clock(clock.durations, clock.schedule, head=False) if waits else clock
    each_s: dict[str, Number] = defaultdict(float)  # of a microbatch on one stage, by phase
    of_head_s: Number = 0.0
    last_s: Number = 0.0
    closing_s: Number = 0.0
    for phase in (*LAYERS, "head", "boundary"):
        blocks = [n for n, block in enumerate(clock.schedule.blocks) if block.phase == phase]
        if not blocks:
            continue
        trips = [clock.schedule.blocks[number].trips for number in blocks]
        own_s = [trip_s(alone, number, waits) for number in blocks]
        many = sum(trips) / pipeline.microbatches
        each_s[phase] = own_s[-1] * many
        of_head_s = of_head_s + (trip_s(clock, blocks[-1], waits) - own_s[-1]) * many
        if waits:
            number, (*_, usual) = blocks[-1], trips
            last = alone.closing[number].value / np.where(np.greater(usual, 0), usual, 1)
            closing_s = closing_s + last * many
        if phase == "backward":
            last_s = (own_s[0] - own_s[-1]) * trips[0]
    send_s, trained = own_s[-1], "backward" in each_s
    found: Number = 0.0
    lockstep = pipeline.lockstep
    if np.any(lockstep):
        each = sum(each_s[phase] for phase in (*LAYERS, "boundary")) + closing_s
        found = in_ticks_s(pipeline, each) * lockstep
    if not np.all(lockstep):
        turns = Turns(
            forward_s=each_s["forward"],
            backward_s=each_s["backward"],
            last_s=last_s,
            head_s=each_s["head"] + of_head_s,
            send_s=send_s,
        )
        usual_s = waiting_s(pipeline, turns, trained)
        found = found + usual_s * np.logical_not(lockstep)
    return found
