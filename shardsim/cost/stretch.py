"""Stretches of a Schedule in closed form: what runs between two starts or awaits of a block.

Inside a stretch nothing but sums is needed, also for the loops in it (rings), which begin and end
with nothing of theirs under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shardsim.cost.costs import ComputeTime, Costs
from shardsim.cost.lines import Lines, Wires, wires_of
from shardsim.cost.total import Total
from shardsim.plan.layout import Number, somewhere
from shardsim.program.schedule import Await, Copy, Move, Repeat, Start, Task, Work


@dataclass(kw_only=True)
class Stretch:
    """What runs in one pass through a stretch."""

    total: Total = field(default_factory=Total)  # seconds
    works: dict[int, tuple[Work, Number]] = field(default_factory=dict)  # with how often they run
    moves: list[tuple[Move, Number, Number]] = field(default_factory=list)
    # ^ with how often they run, and how long they are waited for
    spare: dict[Wires, Number] = field(default_factory=dict)  # see `spare_s`


class Durations:
    """What single tasks of a schedule take."""

    def __init__(self, costs: Costs, lines: Lines) -> None:
        self.costs = costs
        self.lines = lines
        # By identity: arrays have no hash. Tasks are kept, so that no number is used again.
        self._works: dict[int, tuple[ComputeTime, Number, Work]] = {}
        self._alone: dict[int, tuple[Number, Move]] = {}

    def work(self, task: Work) -> ComputeTime:
        """Return the time of one operation."""
        return self._known(task)[0]

    def work_s(self, task: Work) -> Number:
        """Return the seconds of all `count` operations of a task."""
        return self._known(task)[1]

    def _known(self, task: Work) -> tuple[ComputeTime, Number, Work]:
        known = self._works.get(id(task))
        if known is None:
            cost = self.costs.operation(task)
            known = self._works[id(task)] = (cost, _many(cost.total_s, task.count), task)
        return known

    def alone_s(self, task: Move | Copy) -> Number:
        """Return the seconds of all `count` moves on free links, one after the other."""
        if isinstance(task, Copy):
            return task.host_bytes / self.costs.host_bytes_per_s
        known = self._alone.get(id(task))
        if known is None:
            per_byte, per_message = self.lines.line(task)
            once_s = task.bytes * per_byte + task.messages * per_message
            alone_s = _many(once_s, task.count)
            known = self._alone[id(task)] = alone_s, task
        return known[0]


def spare_s(durations: Durations, here: Stretch, wires: Wires) -> Number:
    """Return for how long a stretch leaves `wires` to what was started before it."""
    if wires not in here.spare:
        busy = Total()
        for task, times, _ in here.moves:
            if somewhere(shared := durations.lines.shared(wires, wires_of(task))):
                busy.add(_many(durations.alone_s(task), times) * shared)
        here.spare[wires] = here.total.value - busy.value
    return here.spare[wires]


Part = Stretch | Start | Await | Move


def split(durations: Durations, tasks: tuple[Task, ...]) -> list[Part]:
    """Return the tasks of a block as stretches between points at which something may wait.

    Those are starts, awaits, and moves over the very links on which something is started.
    """
    started = {wires_of(task.task) for task in tasks if isinstance(task, Start)}
    parts: list[Part] = []
    here: Stretch | None = None
    for task in tasks:
        queues = isinstance(task, Move) and wires_of(task) in started
        if isinstance(task, Start | Await) or (queues and isinstance(task, Move)):
            here = None
            parts.append(task)
            continue
        if here is None:
            here = Stretch()
            parts.append(here)
        _add(durations, here, task, 1)
    return parts


def _add(durations: Durations, here: Stretch, task: Task, times: Number) -> None:
    """Add a task that runs `times` times."""
    if isinstance(task, Work):
        _work(here, task, times)
        here.total.add(_many(durations.work_s(task), times))
    elif isinstance(task, Move):
        _move(here, task, times, durations.alone_s(task))
        here.total.add(_many(durations.alone_s(task), times))
    elif isinstance(task, Repeat):
        times = times * task.times
        here.total.add(_round(durations, here, task, times) * times)


def _work(here: Stretch, task: Work, times: Number) -> None:
    _, before = here.works.get(id(task), (task, 0))
    here.works[id(task)] = task, before + times


def _many(value: Number, times: Number) -> Number:
    # Most tasks run once, and copies of large arrays take time.
    return value if isinstance(times, int) and times == 1 else value * times


def _move(here: Stretch, task: Move, times: Number, waited_s: Number) -> None:
    here.moves.append((task, times, waited_s))


def _round(durations: Durations, here: Stretch, repeat: Repeat, times: Number) -> Number:
    """Note what runs in a loop, `times` times in all; return the seconds of one round."""
    now: Number = 0.0
    ends: dict[str, tuple[Move, Number]] = {}
    for task in repeat.tasks:
        if isinstance(task, Work):
            _work(here, task, times)
            now = now + durations.work_s(task)
        elif isinstance(task, Repeat):
            now = now + _round(durations, here, task, times * task.times) * task.times
        elif isinstance(task, Move):
            _move(here, task, times, durations.alone_s(task))
            now = now + durations.alone_s(task)
        elif isinstance(task, Start) and isinstance(task.task, Move):
            ends[task.name] = task.task, now + durations.alone_s(task.task)
        elif isinstance(task, Await) and task.name in ends:
            move, end = ends.pop(task.name)
            _move(here, move, times, np.maximum(end - now, 0.0))
            now = np.maximum(now, end)
    return now
