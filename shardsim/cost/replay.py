"""Replaying a Schedule: its tasks one after another, what is started beside them.

Compute runs on one stream. A collective takes as long as the closed forms say, once every link
direction that it needs is free of those started before it. Copies between memories take what
the operations of the stream leave of HBM's bandwidth, one after another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardsim.cost.costs import Costs, costs_of
from shardsim.cost.meshlinks import MeshLinks
from shardsim.cost.price import CollectiveCost, Price, work_cost
from shardsim.cost.task_times import Copies, TaskTimes, WorkTime
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.plan.plan import Plan
from shardsim.program.schedule import Await, Block, Copy, Move, Repeat, Schedule, Task, Trip, Work

PARTS = ("compute_s", "hbm_bound_s", "exposed_comm_s", "overhead_s")


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """One block over a whole step."""

    name: str
    phase: str
    trips: int
    time: dict[str, float]  # keys: PARTS

    @property
    def time_s(self) -> float:
        """Seconds of all trips."""
        return sum(self.time.values())


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A step as it was replayed."""

    price: Price
    blocks: tuple[BlockTime, ...]


@dataclass
class Spent:
    """What trips through a block took."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    exposed: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by collective

    def work(self, time: WorkTime, weight: float = 1.0) -> None:
        """Add operations, so many times."""
        self.parts["compute_s"] += time.compute_s * weight
        self.parts["hbm_bound_s"] += time.hbm_bound_s * weight
        self.parts["overhead_s"] += time.overhead_s * weight

    def wait(self, name: str, seconds: float) -> None:
        """Add the wait for a collective."""
        self.parts["exposed_comm_s"] += seconds
        self.exposed[name] += seconds

    def add(self, other: Spent) -> None:
        """Add other trips."""
        for name, seconds in other.parts.items():
            self.parts[name] += seconds
        for name, seconds in other.exposed.items():
            self.exposed[name] += seconds


def usual_costs(machine: Machine, where: Plan | Layout) -> Costs:
    """Return the costs that a plan names, on `machine`; physical ones for a mere layout."""
    return costs_of(where.op_costs if isinstance(where, Plan) else "physical", machine.chip)


def replay_schedule(
    machine: Machine, where: Plan | Layout, schedule: Schedule, costs: Costs | None = None
) -> Replayed:
    """Replay `schedule`, compiled for the mesh of a plan (or layout) on `machine`.

    Operations take `costs`; the usual ones if left out.
    """
    costs = costs or usual_costs(machine, where)
    return replay(TaskTimes(costs, MeshLinks(machine, where)), schedule)


def replay(times: TaskTimes, schedule: Schedule) -> Replayed:
    """Replay a single schedule; pipeline stages do not wait for each other."""
    stream = Stream(times)
    sums = [Spent() for _ in schedule.blocks]
    known: dict[tuple[Trip, frozenset[str]], Spent] = {}
    for trip in schedule.trips():
        # A trip that begins and ends with nothing under way is like every other such trip.
        before = stream.idle()
        spent = known.get((trip, before)) if before is not None else None
        if spent is None:
            spent = stream.run(schedule.blocks[trip.block], trip)
            if before is not None and stream.idle() == before:
                known[trip, before] = spent
        sums[trip.block].add(spent)
    return summed(times, schedule, sums)


def summed(times: TaskTimes, schedule: Schedule, sums: Sequence[Spent]) -> Replayed:
    """Return a step from what all trips through each block took."""
    blocks = tuple(
        BlockTime(
            name=block.name,
            phase=block.phase,
            trips=round(float(block.trips)),
            time=dict(spent.parts),
        )
        for block, spent in zip(schedule.blocks, sums, strict=True)
    )
    exposed: dict[str, float] = defaultdict(float)
    for spent in sums:
        for name, seconds in spent.exposed.items():
            exposed[name] += seconds
    counts: dict[int, tuple[int, Work | Move | Copy, float]] = {}  # by identity of the task
    for number, task, many in schedule.runs():
        _, _, before = counts.get(id(task), (number, task, 0.0))
        counts[id(task)] = number, task, before + float(many)
    collectives, computes = [], []
    for number, task, many in counts.values():
        name = schedule.blocks[number].name
        if isinstance(task, Work):
            computes.append(work_cost(task, times.costs.operation(task), name, task.count * many))
        elif isinstance(task, Move):
            collectives.append(
                CollectiveCost(
                    task=task,
                    block=name,
                    count=task.count * many,
                    sent_bytes=times.sent_bytes(task) * task.count * many,
                    time_s=times.alone_s(task) * many,
                    exposed_s=exposed[task.name],
                )
            )
        elif task.host_bytes:
            collectives.append(
                CollectiveCost(
                    task=task,
                    block=name,
                    count=many,
                    sent_bytes=task.host_bytes * many,
                    time_s=times.host_s(task) * many,
                    exposed_s=exposed[task.name],
                )
            )
    total = {name: sum(spent.parts[name] for spent in sums) for name in PARTS}
    price = Price(
        **total,
        bubble_s=0.0,
        flops=sum(cost.flops for cost in computes),
        collectives=collectives,
        computes=computes,
    )
    return Replayed(price=price, blocks=blocks)


# Told of what runs from when to when: work, moves and copies, and waits for those.
Watch = Callable[[Work | Move | Copy | Await, float, float], None]


class Stream:
    """The compute stream of one device, the links around it, and its copies."""

    def __init__(self, times: TaskTimes, watch: Watch | None = None) -> None:
        self.times = times
        self.watch = watch
        self.now = 0.0
        self.free: dict[str, float] = defaultdict(float)  # by port: when it is
        self.ends: dict[str, float] = {}  # moves and host copies that were started
        self.copies = Copies()

    def idle(self) -> frozenset[str] | None:
        """Return what has ended but was not awaited, if nothing is under way; else None."""
        busy = self.copies.queue or any(end > self.now for end in self.ends.values())
        if busy or any(free > self.now for free in self.free.values()):
            return None
        return frozenset(self.ends) | self.copies.moved

    def run(self, block: Block, trip: Trip) -> Spent:
        """Run one trip through a block."""
        spent = Spent()
        self._tasks(block.tasks, trip, spent)
        return spent

    def _tasks(self, tasks: tuple[Task, ...], trip: Trip, spent: Spent) -> None:
        for task in tasks:
            if isinstance(task, Repeat):
                for _ in range(round(float(task.times))):
                    self._tasks(task.tasks, trip, spent)
            elif isinstance(task, Work):
                time = self.times.work(task)
                spent.work(time)
                self._tell(task, self.now, self.now + time.total_s)
                self._pass(time.total_s, time.spare_s)
            elif isinstance(task, Move):
                self._wait(task.name, self._launch(task), spent)
            elif isinstance(task, Copy):
                self._copy(task)
                self._await(task.name, spent)
            elif not trip.has(task.when):
                continue
            elif isinstance(task, Await):
                self._await(task.name, spent)
            elif isinstance(task.task, Move):
                self.ends[task.name] = self._launch(task.task)
            else:
                self._copy(task.task)

    def _launch(self, task: Move) -> float:
        """Put a move on its links; return when it ends."""
        ports = self.times.route(task).ports
        begin = max([self.now, *(self.free[port] for port in ports)])
        end = begin + self.times.alone_s(task)
        for port in ports:
            self.free[port] = end
        self._tell(task, begin, end)
        return end

    def _wait(self, name: str, end: float, spent: Spent) -> None:
        waited = max(end - self.now, 0.0)
        spent.wait(name, waited)
        self._tell(Await(name=name), self.now, self.now + waited)
        self._pass(waited, waited)

    def _copy(self, task: Copy) -> None:
        if task.host_bytes:
            begin = max(self.now, self.free["host"])
            self.free["host"] = self.ends[task.name] = begin + self.times.host_s(task)
            self._tell(task, begin, self.ends[task.name])
        else:
            self.copies.add(task.name, self.times.hbm_s(task))

    def _await(self, name: str, spent: Spent) -> None:
        if name in self.ends:
            self._wait(name, self.ends.pop(name), spent)
        elif name in self.copies:
            left = self.copies.finish(name)
            self._tell(Await(name=name), self.now, self.now + left)
            spent.parts["hbm_bound_s"] += left
            self.now += left
            self.copies.moved.remove(name)

    def _pass(self, seconds: float, spare_s: float) -> None:
        """Let time pass, for `spare_s` of which the stream leaves HBM to the copies."""
        self.now += seconds
        self.copies.drain(spare_s)

    def _tell(self, task: Work | Move | Copy | Await, start_s: float, end_s: float) -> None:
        if self.watch is not None and end_s > start_s:
            self.watch(task, start_s, end_s)
