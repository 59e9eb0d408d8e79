"""Pricing a Schedule: the analytic level. One plan or a million go through the same lines.

Work and moves run one after another. What is started runs beside them on its own links: behind
what was started there before, and in the time that moves which are waited for leave them. So what
is left of it, where it is awaited, follows from sums over the stretches of a block, and only there
something has to be compared. A trip through a block of a planned schedule begins and ends with
nothing under way; a loop's first trip, those in its middle and its last one differ in what they
start, and those in the middle are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import ComputeTime, Costs
from shardsim.cost.lines import LayoutLines, Lines
from shardsim.cost.network import Group
from shardsim.cost.stretch import Durations
from shardsim.cost.total import Total
from shardsim.cost.trips import Clock
from shardsim.cost.waiting import bubble_s
from shardsim.machine import Machine
from shardsim.plan.layout import Layout, Number
from shardsim.program.schedule import Block, Copy, Move, Schedule, Work


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """One collective over a whole step, on one device."""

    task: Move | Copy
    block: str
    count: Number
    sent_bytes: Number
    time_s: Number
    exposed_s: Number


@dataclass(frozen=True, kw_only=True)
class ComputeCost:
    """One compute task over a whole step, on one device."""

    task: Work
    block: str
    count: Number
    time_s: Number
    unit_s: Number
    memory_s: Number
    overhead_s: Number
    flops: Number


@dataclass(kw_only=True)
class Price:
    """The time of a step by what it is made of; the five parts add up to `step_time_s`."""

    compute_s: Number
    hbm_bound_s: Number
    exposed_comm_s: Number
    bubble_s: Number
    overhead_s: Number
    flops: Number  # executed by one device in a step, recomputation included
    collectives: list[CollectiveCost] = field(default_factory=list)
    computes: list[ComputeCost] = field(default_factory=list)

    @property
    def step_time_s(self) -> Number:
        """Seconds of one optimizer step."""
        return (
            self.compute_s
            + self.hbm_bound_s
            + self.exposed_comm_s
            + self.bubble_s
            + self.overhead_s
        )


def step_time_s(machine: Machine, layout: Layout, schedule: Schedule, costs: Costs) -> Number:
    """Return only the seconds of a step, for many plans at once."""
    clock = Clock(Durations(costs, LayoutLines(machine, layout)), _with_head(schedule))
    return _step_s(clock, bubble_s(clock, schedule))


def least_step_s(lines: Lines, schedule: Schedule, costs: Costs) -> Number:
    """Return seconds that a step takes on no links that are better than `lines`.

    All that runs ends no earlier where a byte or a message takes longer, or where links are shared
    that were not: ends are sums and maxima of durations. What stages of a pipeline wait for each
    other is the exception, since it does not count waits for what belongs to the head, and those
    shorten others. So here it has no waits at all, only work and what is sent between it.
    """
    clock = Clock(Durations(costs, lines), _with_head(schedule))
    return _step_s(clock, bubble_s(clock, schedule, waits=False))


def _with_head(schedule: Schedule) -> Schedule:
    """Return what the stage with the head does, which is the last one."""
    return schedule.of_stage(-1)


def _step_s(clock: Clock, waited_s: Number) -> Number:
    total = Total()
    for number, block in enumerate(clock.schedule.blocks):
        for stretch in clock.stretches(number):
            total.add(stretch.total.value * block.trips)
        total.add(clock.waits[number].value)
    total.add(waited_s)
    return total.value


def price(machine: Machine, layout: Layout, schedule: Schedule, costs: Costs) -> Price:
    """Return the time of a step by what takes it, down to every task: of the stage with the head,
    or where stages differ on average of all, one of which has it."""
    lines = LayoutLines(machine, layout)
    clock = Clock(Durations(costs, lines), _with_head(schedule))
    waited_s = bubble_s(clock, schedule)
    parts: dict[str, float] = {}
    if shares := schedule.pipeline.shares:
        step_s, stages = _step_s(clock, waited_s), len(shares)
        clock = Clock(clock.durations, schedule.with_share(sum(shares) / stages, head=True))
        parts = {"head": 1 / stages, "boundary": 2 * (stages - 1) / stages}
    computes = list(_computes(clock, parts))
    collectives = list(_collectives(clock, lines.links, parts))
    found = Price(
        compute_s=sum(cost.unit_s for cost in computes),
        hbm_bound_s=sum(cost.memory_s for cost in computes),
        exposed_comm_s=sum(cost.exposed_s for cost in collectives),
        bubble_s=waited_s,
        overhead_s=sum(cost.overhead_s for cost in computes),
        flops=sum(cost.flops for cost in computes),
        collectives=collectives,
        computes=computes,
    )
    return replace(found, bubble_s=waited_s + step_s - found.step_time_s) if shares else found


def _collectives(
    clock: Clock, links: Mapping[str, Group], parts: Mapping[str, float]
) -> Iterator[CollectiveCost]:
    """Yield every move and every copy to or from the host over a whole step, of phases in `parts`
    as many times what there is."""
    blocks = clock.schedule.blocks
    share = [parts.get(block.phase, 1) for block in blocks]
    for number, block in enumerate(blocks):
        for stretch in clock.stretches(number):
            for move, times, exposed_s in stretch.moves:
                many = times * block.trips * share[number]
                yield _collective(clock.durations, links, block, move, many, exposed_s * many)
    counts: dict[tuple[int, int], tuple[Move | Copy, Number]] = {}
    for number, task, times in clock.schedule.runs():
        key = number, id(task)
        if key in clock.waited and isinstance(task, Move | Copy):
            _, before = counts.get(key, (task, 0))
            counts[key] = task, before + times
    for key, (task, many) in counts.items():
        waited_s, of = clock.waited[key] * share[key[0]], blocks[key[0]]
        yield _collective(clock.durations, links, of, task, many * share[key[0]], waited_s)


def _collective(
    durations: Durations,
    links: Mapping[str, Group],
    block: Block,
    task: Move | Copy,
    many: Number,
    exposed_s: Number,
) -> CollectiveCost:
    if isinstance(task, Copy):
        count, sent = many, task.host_bytes
    else:
        sent = sent_bytes(task.kind, links[task.role], task.bytes, task.stage)
        count = many * task.count * np.greater(sent, 0)  # what crosses no link is none
    return CollectiveCost(
        task=task,
        block=block.name,
        count=count,
        sent_bytes=sent * count,
        time_s=durations.alone_s(task) * many,
        exposed_s=exposed_s,
    )


def work_cost(task: Work, cost: ComputeTime, block: str, count: Number) -> ComputeCost:
    """Return what `count` operations take."""
    return ComputeCost(
        task=task,
        block=block,
        count=count,
        time_s=cost.total_s * count,
        unit_s=cost.unit_s * count,
        memory_s=cost.memory_s * count,
        overhead_s=cost.overhead_s * count,
        flops=task.flops * count,
    )


def _computes(clock: Clock, parts: Mapping[str, float]) -> Iterator[ComputeCost]:
    """Yield all work over a whole step, of phases in `parts` as many times what there is."""
    for number, block in enumerate(clock.schedule.blocks):
        share = parts.get(block.phase, 1)
        for stretch in clock.stretches(number):
            for task, many in stretch.works.values():
                cost = clock.durations.work(task)
                yield work_cost(task, cost, block.name, task.count * many * block.trips * share)
