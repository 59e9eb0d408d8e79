"""Replaying a compiled Program: its tasks one after another, what is started beside them.

Compute runs on one stream. A collective takes as long as the closed forms say, once every link
direction that it needs is free of those started before it. Transfers between memories take what
the operations of the stream leave of HBM's bandwidth, one after another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.costs import Costs, costs_of
from shardsim.cost.meshlinks import MeshLinks
from shardsim.cost.price import CollectiveCost, ComputeCost, Price
from shardsim.cost.task_times import TaskTimes, Transfers, WorkTime
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.plan.plan import Plan
from shardsim.program.tasks import Await, Block, Collective, Compute, Program, Task, Transfer

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
class Trip:
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

    def add(self, other: Trip) -> None:
        """Add other trips."""
        for name, seconds in other.parts.items():
            self.parts[name] += seconds
        for name, seconds in other.exposed.items():
            self.exposed[name] += seconds


def usual_costs(machine: Machine, where: Plan | Layout) -> Costs:
    """Return the costs that a plan names, on `machine`; physical ones for a mere layout."""
    return costs_of(where.op_costs if isinstance(where, Plan) else "physical", machine.chip)


def replay_program(
    machine: Machine, where: Plan | Layout, program: Program, costs: Costs | None = None
) -> Replayed:
    """Replay `program`, compiled for the mesh of a plan (or layout) on `machine`.

    Operations take `costs`; the usual ones if left out.
    """
    times = TaskTimes(costs or usual_costs(machine, where), MeshLinks(machine, where))
    stream = _Stream(times)
    sums = [Trip() for _ in program.blocks]
    known: dict[tuple[int, frozenset[str]], Trip] = {}
    for number in block_order(program):
        # A trip that begins and ends with nothing under way is like every other such trip.
        before = stream.idle()
        trip = known.get((number, before)) if before is not None else None
        if trip is None:
            trip = stream.run(program.blocks[number])
            if before is not None and stream.idle() == before:
                known[number, before] = trip
        sums[number].add(trip)
    return summed(times, program, sums)


def block_order(program: Program) -> tuple[int, ...]:
    """Return the places of the blocks as they run, every trip for itself."""
    return program.order or tuple(
        number for number, block in enumerate(program.blocks) for _ in range(int(block.trips))
    )


def summed(times: TaskTimes, program: Program, sums: Sequence[Trip]) -> Replayed:
    """Return a step from what all trips through each block took."""
    collectives, computes, blocks = [], [], []
    flops = 0.0
    exposed: dict[str, float] = defaultdict(float)
    for trip in sums:
        for name, seconds in trip.exposed.items():
            exposed[name] += seconds
    for block, trip in zip(program.blocks, sums, strict=True):
        blocks.append(
            BlockTime(
                name=block.name, phase=block.phase, trips=int(block.trips), time=dict(trip.parts)
            )
        )
        for work in block.computes():
            cost = times.costs.operation(work)
            flops += float(work.flops * work.count * block.trips)
            computes.append(
                ComputeCost(
                    task=work,
                    block=block.name,
                    count=work.count * block.trips,
                    time_s=float(cost.total_s * work.count * block.trips),
                    unit_s=float(cost.unit_s * work.count * block.trips),
                    memory_s=float(cost.memory_s * work.count * block.trips),
                    flops=float(work.flops * work.count * block.trips),
                )
            )
        for task in block.collectives():
            sent = float(sent_bytes(task.kind, times.route(task).group, task.bytes))
            collectives.append(
                CollectiveCost(
                    task=task,
                    block=block.name,
                    count=block.trips,
                    sent_bytes=sent * block.trips,
                    time_s=times.alone_s(task) * block.trips,
                    exposed_s=exposed[task.name],
                )
            )
    total = {name: sum(trip.parts[name] for trip in sums) for name in PARTS}
    price = Price(
        **total,
        bubble_s=0.0,
        flops=flops,
        collectives=collectives,
        computes=computes,
    )
    return Replayed(price=price, blocks=tuple(blocks))


class _Stream:
    """The compute stream of one device, the links around it, and its transfers."""

    def __init__(self, times: TaskTimes) -> None:
        self.times = times
        self.now = 0.0
        self.free: dict[str, float] = defaultdict(float)  # by port: when it is
        self.ends: dict[str, float] = {}  # collectives and host transfers that were started
        self.transfers = Transfers()

    def idle(self) -> frozenset[str] | None:
        """Return what has ended but was not awaited, if nothing is under way; else None."""
        busy = self.transfers.queue or any(end > self.now for end in self.ends.values())
        if busy or any(free > self.now for free in self.free.values()):
            return None
        return frozenset(self.ends) | self.transfers.moved

    def run(self, block: Block) -> Trip:
        """Run one trip through a block."""
        trip = Trip()
        for task in block.tasks:
            self._task(task, trip)
        return trip

    def _task(self, task: Task, trip: Trip) -> None:
        if isinstance(task, Compute):
            time = self.times.work(task)
            trip.work(time)
            self._pass(time.total_s, time.spare_s)
        elif isinstance(task, Collective):
            end = self._start(task)
            if task.schedule == "started":
                self.ends[task.name] = end
            else:
                self._wait(task.name, end, trip)
        elif isinstance(task, Transfer):
            self._transfer(task)
        else:
            self._await(task, trip)

    def _start(self, task: Collective) -> float:
        """Put a collective on its links; return when it ends."""
        ports = self.times.route(task).ports
        begin = max([self.now, *(self.free[port] for port in ports)])
        end = begin + self.times.alone_s(task)
        for port in ports:
            self.free[port] = end
        return end

    def _wait(self, name: str, end: float, trip: Trip) -> None:
        waited = max(end - self.now, 0.0)
        trip.wait(name, waited)
        self._pass(waited, waited)

    def _transfer(self, task: Transfer) -> None:
        if task.host_bytes:
            begin = max(self.now, self.free["host"])
            self.free["host"] = self.ends[task.name] = begin + self.times.host_s(task)
        else:
            self.transfers.add(task.name, self.times.hbm_s(task))

    def _await(self, task: Await, trip: Trip) -> None:
        if task.name in self.ends:
            self._wait(task.name, self.ends.pop(task.name), trip)
            return
        left = self.transfers.finish(task.name)
        trip.parts["hbm_bound_s"] += left
        self.now += left
        self.transfers.moved.remove(task.name)

    def _pass(self, seconds: float, spare_s: float) -> None:
        """Let time pass, for `spare_s` of which the stream leaves HBM to the transfers."""
        self.now += seconds
        self.transfers.drain(spare_s)
