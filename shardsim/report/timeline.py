"""The timeline of one layer: its tasks as the Schedule has them, with their analytic times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter

from shardsim.cost.costs import costs_of
from shardsim.cost.meshlinks import RoleLinks
from shardsim.cost.predict import Prediction
from shardsim.cost.replay import Stream
from shardsim.cost.task_times import TaskTimes
from shardsim.plan import resolve
from shardsim.plan.layout import Layout
from shardsim.program.schedule import Await, Block, Copy, Move, Trip, Work
from shardsim.views.table import Column, Table, table

COMPUTE = "compute"


@dataclass(frozen=True, kw_only=True)
class Span:
    """One task on one stream, in seconds from the start of the layer's pass."""

    name: str
    stream: str  # COMPUTE, or the mesh axes that a collective runs over
    kind: str  # "matmul", "attention", "elementwise", ... ; "wait" for exposed communication
    start_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.start_s + self.duration_s


@dataclass(frozen=True, kw_only=True)
class LayerTimeline:
    """One trip through a block of the Schedule."""

    block: str
    spans: tuple[Span, ...]
    total_s: float

    @property
    def streams(self) -> tuple[str, ...]:
        """Compute first, then communication by mesh axes."""
        names = [COMPUTE, *(span.stream for span in self.spans)]
        return tuple(dict.fromkeys(names))


def layer_timelines(item: Prediction) -> tuple[LayerTimeline, ...]:
    """Return a trip through a layer forward, and one backward with recomputation, of each group of
    layers.

    They are trips in the middle of a pass over the layers: their weights are on the way when they
    begin, and they start on those of the next layer.
    """
    layout = resolve(item.plan)
    costs = costs_of(item.costs, item.plan.machine.chip)
    times = TaskTimes(costs, RoleLinks(item.plan.machine, layout))
    blocks = item.schedule.blocks
    numbers: dict[tuple[str, int], int] = {}
    for number, block in enumerate(blocks):
        if block.phase in ("forward", "backward"):
            numbers.setdefault((block.phase, block.group), number)
    return tuple(_timeline(times, layout, blocks[number], number) for number in numbers.values())


def _timeline(times: TaskTimes, layout: Layout, block: Block, number: int) -> LayerTimeline:
    spans: list[Span] = []

    def watch(task: Work | Move | Copy | Await, start_s: float, end_s: float) -> None:
        stream, kind, name = COMPUTE, "wait", f"waiting for {task.name}"
        if isinstance(task, Work):
            kind, name = task.kind, task.name
        elif isinstance(task, Move):
            stream = ", ".join(layout.mesh_axes(task.role)) or task.role
            kind, name = task.kind, task.name
        elif isinstance(task, Copy):
            stream, kind, name = "host", "host-transfer", task.name
        spans.append(
            Span(name=name, stream=stream, kind=kind, start_s=start_s, duration_s=end_s - start_s)
        )

    player = Stream(times, watch)
    began = 0.0
    for first in (True, False, False):
        began = player.now
        trip = Trip(block=number, first=first, last=False, after=False, before=False)
        player.run(block, trip)
    inside = (_clipped(span, began, player.now) for span in spans)
    return LayerTimeline(
        block=block.name,
        spans=tuple(span for span in inside if span.duration_s > 0),
        total_s=player.now - began,
    )


def _clipped(span: Span, began_s: float, ended_s: float) -> Span:
    """Return what of a span lies in a trip, from the trip's start."""
    start_s, end_s = max(span.start_s, began_s), min(span.end_s, ended_s)
    return replace(span, start_s=start_s - began_s, duration_s=end_s - start_s)


def spans(item: Prediction, least: float = 0.0) -> Table:
    """Return the tasks of one layer's passes, those that take at least a share of their pass."""
    rows = [
        (one.block, span)
        for one in layer_timelines(item)
        for span in one.spans
        if span.duration_s >= least * one.total_s
    ]
    own = [
        Column("stream", "stream", attrgetter("stream")),
        Column("task", "task", attrgetter("name")),
        Column("kind", "kind", attrgetter("kind")),
        Column("start_s", "starts at", attrgetter("start_s"), "time"),
        Column("duration_s", "takes", attrgetter("duration_s"), "time"),
    ]
    head = Column("pass", "pass", itemgetter(0))
    return table([head, *(one.within(itemgetter(1)) for one in own)], rows)
