"""The timeline of one layer: its Program's tasks in order, with their analytic times."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter, itemgetter

from shardsim.cost.predict import Prediction
from shardsim.cost.price import CollectiveCost
from shardsim.plan import resolve
from shardsim.plan.layout import Layout
from shardsim.program.tasks import Block, Collective, Compute
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
    """One trip through a block of the Program."""

    block: str
    spans: tuple[Span, ...]
    total_s: float

    @property
    def streams(self) -> tuple[str, ...]:
        """Compute first, then communication by mesh axes."""
        names = [COMPUTE, *(span.stream for span in self.spans)]
        return tuple(dict.fromkeys(names))


def layer_timelines(item: Prediction) -> tuple[LayerTimeline, ...]:
    """Return the forward and the backward pass of one layer, recomputation in the latter.

    What runs behind other work is averaged over all layers: the first layer's weights, which
    nothing hides, count as a small wait in each.
    """
    layout = resolve(item.plan)
    return tuple(
        _timeline(item, item.program.block(name), layout)
        for name in ("layer forward", "layer backward")
    )


def _timeline(item: Prediction, block: Block, layout: Layout) -> LayerTimeline:
    trips = float(block.trips)
    computes = [cost for cost in item.price.computes if cost.block == block.name]
    length = {cost.task.name: float(cost.time_s) / trips for cost in computes}
    costs = {cost.task.name: cost for cost in item.price.collectives if cost.block == block.name}
    waits = _ring_waits(block, costs, trips)
    spans: list[Span] = []
    at: dict[str, tuple[float, float]] = {}  # matmul -> its window, waiting included
    tail: list[tuple[str, float]] = []
    free: dict[str, float] = {}  # communication stream -> when it is free
    now = 0.0

    def compute(name: str, kind: str, duration_s: float) -> None:
        nonlocal now
        if duration_s > 0:
            spans.append(
                Span(name=name, stream=COMPUTE, kind=kind, start_s=now, duration_s=duration_s)
            )
            now += duration_s

    def communicate(task: Collective, start_s: float, duration_s: float) -> None:
        stream = _stream(task, layout)
        spans.append(
            Span(
                name=task.name,
                stream=stream,
                kind=task.kind,
                start_s=start_s,
                duration_s=duration_s,
            )
        )
        free[stream] = max(free.get(stream, 0.0), start_s + duration_s)

    for task in block.tasks:
        if isinstance(task, Compute):
            start = now
            compute(task.name, task.kind, length.get(task.name, 0.0))
            compute(f"waiting beside {task.name}", "wait", waits.get(task.name, 0.0))
            at[task.name] = (start, now)
            continue
        if not isinstance(task, Collective):  # only compiled programs have others
            continue
        cost = costs.get(task.name)
        alone = 0.0 if cost is None else float(cost.time_s) / trips
        if cost is None or alone <= 0 or task.schedule == "ring":
            continue
        exposed = float(cost.exposed_s) / trips
        if task.schedule == "behind" and bool(getattr(layout, task.switch)):
            communicate(task, free.get(_stream(task, layout), 0.0), alone)
            tail.append((task.name, exposed))
        else:
            communicate(task, now, alone)
            compute(f"waiting for {task.name}", "wait", exposed)
    for task in block.collectives():
        cost = costs.get(task.name)
        if task.schedule == "ring" and cost is not None and float(cost.time_s) > 0:
            start = min(at[name][0] for name in task.partners)
            end = max(at[name][1] for name in task.partners)
            communicate(task, start, max(end - start, 0.0))
    for name, cost in costs.items():
        if cost.task.kind == "host-transfer":
            communicate(cost.task, 0.0, float(cost.time_s) / trips)
            tail.append((name, float(cost.exposed_s) / trips))
    for name, exposed in tail:
        compute(f"waiting for {name}", "wait", exposed)
    return LayerTimeline(block=block.name, spans=tuple(spans), total_s=now)


def _ring_waits(block: Block, costs: dict[str, CollectiveCost], trips: float) -> dict[str, float]:
    """Return what each matmul waits for the ring beside it; a ring's wait stands at its last."""
    waits: dict[str, float] = {}
    order = {task.name: index for index, task in enumerate(block.tasks)}
    for task in block.collectives():
        cost = costs.get(task.name)
        if task.schedule == "ring" and cost is not None and float(cost.exposed_s) != 0:
            last = max(task.partners, key=lambda name: order[name])
            waits[last] = waits.get(last, 0.0) + float(cost.exposed_s) / trips
    return waits


def _stream(task: Collective, layout: Layout) -> str:
    if task.role == "host":
        return "host"
    return ", ".join(layout.mesh_axes(task.role)) or task.role


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
