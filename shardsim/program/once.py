"""What a step does once instead of in every microbatch, where weights stay gathered over them.

Where gradients are accumulated with gathered weights, those of the layers and the ends are gathered
before the first microbatch, and their gradients scattered after the last. Where layers run all
microbatches before the next layer (layered), or lie on stages that pass all of them forward
first (gpipe), that holds for the ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from shardsim.plan.layout import Layout, Number
from shardsim.program.schedule import PARAMETER_PURPOSES, Block
from shardsim.program.tasks import Collective, Task


def in_phases(layout: Layout) -> Number:
    """Return whether embedding, layers and head are phases through which all microbatches go."""
    return layout.layered | layout.lockstep


def ends_once(layout: Layout) -> Number:
    """Return whether weights of the embedding and the head are gathered once a step."""
    return layout.gathered | in_phases(layout)


def once(
    block: Block, gathers: Number, scatters: Number, trips: Number
) -> tuple[Block, tuple[Block, ...]]:
    """Return a block without the gathers of weights where `gathers`, and without the scatters of
    their gradients where `scatters`; and the blocks that do them instead, of `trips`: gathers
    before all microbatches, scatters after them.

    What is gathered again backward was whole all the time.
    """
    if not np.any(gathers):
        return block, ()
    ahead: list[Task] = []
    after: list[Task] = []
    tasks: list[Task] = []
    for task in block.tasks:
        assert isinstance(task, Task)
        if not isinstance(task, Collective) or task.purpose not in PARAMETER_PURPOSES:
            tasks.append(task)
            continue
        chosen = gathers if task.kind == "all-gather" else scatters
        apart = replace(task, count=task.count * chosen, schedule="exposed", partners=(), switch="")
        if task.kind == "all-gather":
            ahead += [apart] if block.phase != "backward" else []
        elif np.any(chosen):
            after.append(apart)
        if not np.all(chosen):
            tasks.append(replace(task, count=task.count * np.logical_not(chosen)))
    made = []
    if ahead:
        made.append(_apart(f"gather weights once: {block.name}", "opening", trips, ahead))
    if after:
        made.append(_apart(f"scatter gradients once: {block.name}", "reduction", trips, after))
    return replace(block, tasks=tuple(tasks)), tuple(made)


def _apart(name: str, phase: str, trips: Number, tasks: list[Task]) -> Block:
    return Block(name=name, phase=phase, trips=trips, tasks=tuple(tasks))


def awaited(tasks: Iterable[Task], layout: Layout) -> list[Task]:
    """Return sums of gradients that wait until all microbatches are over, where their loop is not
    the last microbatch's own."""
    chosen = layout.summed_whole | layout.lockstep
    if not np.any(chosen):
        return [*tasks]
    made: list[Task] = []
    for task in tasks:
        if isinstance(task, Collective):
            made.append(replace(task, count=task.count * chosen, schedule="exposed", switch=""))
            task = replace(task, count=task.count * np.logical_not(chosen))
        made += [task] if np.any(task.count) else []
    return made


def repeated_work(tasks: Iterable[Task], times: Number) -> list[Task]:
    """Return the tasks of a layer that runs `times` microbatches in a row on the same weights."""
    if np.all(np.equal(times, 1)):
        return [*tasks]
    return [
        task
        if isinstance(task, Collective) and task.purpose in PARAMETER_PURPOSES
        else replace(task, count=task.count * times)
        for task in tasks
    ]
