"""Replaying a compiled Program: its tasks one after another, what is started beside them.

Compute runs on one stream. A collective takes as long as the closed forms say, once every link
direction that it needs is free of those started before it. Transfers between memories take what
the operations of the stream leave of HBM's bandwidth, one after another.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shardsim.cost.collectives import collective_s, sent_bytes
from shardsim.cost.compute import compute_time
from shardsim.cost.meshlinks import MeshLinks, Route
from shardsim.cost.price import CollectiveCost, ComputeCost, Price
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
class _Trip:
    """What one trip through a block took."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    exposed: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by collective

    def add(self, other: _Trip) -> None:
        """Add another trip."""
        for name, seconds in other.parts.items():
            self.parts[name] += seconds
        for name, seconds in other.exposed.items():
            self.exposed[name] += seconds


def replay_program(machine: Machine, where: Plan | Layout, program: Program) -> Replayed:
    """Replay `program`, compiled for the mesh of a plan (or layout) on `machine`."""
    stream = _Stream(machine, MeshLinks(machine, where))
    order = program.order or tuple(_block_after_block(program))
    sums = [_Trip() for _ in program.blocks]
    known: dict[tuple[int, frozenset[str]], _Trip] = {}
    for number in order:
        # A trip that begins and ends with nothing under way is like every other such trip.
        before = stream.idle()
        trip = known.get((number, before)) if before is not None else None
        if trip is None:
            trip = stream.run(program.blocks[number])
            if before is not None and stream.idle() == before:
                known[number, before] = trip
        sums[number].add(trip)
    return _result(stream, program, sums)


def _block_after_block(program: Program) -> Iterator[int]:
    for number, block in enumerate(program.blocks):
        yield from [number] * int(block.trips)


def _result(stream: _Stream, program: Program, sums: list[_Trip]) -> Replayed:
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
            cost = compute_time(stream.machine.chip, work)
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
            route = stream.route(task)
            sent = float(sent_bytes(task.kind, route.group, task.bytes))
            collectives.append(
                CollectiveCost(
                    task=task,
                    block=block.name,
                    count=block.trips,
                    sent_bytes=sent * block.trips,
                    time_s=stream.alone_s(task) * block.trips,
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

    def __init__(self, machine: Machine, links: MeshLinks) -> None:
        self.machine = machine
        self.links = links
        chip = machine.chip
        self.hbm_bytes_per_s = chip.hbm_bytes_per_s / chip.devices_per_chip * chip.hbm_efficiency
        self.host_bytes_per_s = (chip.pcie_bytes_per_s or float("inf")) / chip.devices_per_chip
        self.now = 0.0
        self.free: dict[str, float] = defaultdict(float)  # by port: when it is
        self.ends: dict[str, float] = {}  # collectives and host transfers that were started
        self.queue: deque[list[str | float]] = deque()  # transfers: name, seconds of HBM left
        self.moved: set[str] = set()  # transfers that ended and were not awaited yet
        self._alone: dict[str, float] = {}

    def route(self, task: Collective) -> Route:
        """Return the links of a collective."""
        return self.links.route(task.mesh_axes, task.parts, task.shifts)

    def alone_s(self, task: Collective) -> float:
        """Return what a collective takes on free links."""
        if task.name not in self._alone:
            route = self.route(task)
            # Each link carries the blocks of all members that a permute passes over.
            amount = task.bytes * route.hops if task.kind == "permute" else task.bytes
            self._alone[task.name] = float(
                collective_s(task.kind, route.group, amount, task.messages) * task.count
            )
        return self._alone[task.name]

    def idle(self) -> frozenset[str] | None:
        """Return what has ended but was not awaited, if nothing is under way; else None."""
        busy = self.queue or any(end > self.now for end in self.ends.values())
        if busy or any(free > self.now for free in self.free.values()):
            return None
        return frozenset(self.ends) | self.moved

    def run(self, block: Block) -> _Trip:
        """Run one trip through a block."""
        trip = _Trip()
        for task in block.tasks:
            self._task(task, trip)
        return trip

    def _task(self, task: Task, trip: _Trip) -> None:
        if isinstance(task, Compute):
            cost = compute_time(self.machine.chip, task)
            trip.parts["compute_s"] += float(cost.unit_s * task.count)
            trip.parts["hbm_bound_s"] += float(cost.memory_s * task.count)
            trip.parts["overhead_s"] += float(cost.overhead_s * task.count)
            own_s = float(task.hbm_bytes * task.count) / self.hbm_bytes_per_s
            self._pass(float(cost.total_s * task.count), own_s)
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
        ports = self.route(task).ports
        begin = max([self.now, *(self.free[port] for port in ports)])
        end = begin + self.alone_s(task)
        for port in ports:
            self.free[port] = end
        return end

    def _wait(self, name: str, end: float, trip: _Trip) -> None:
        waited = max(end - self.now, 0.0)
        trip.parts["exposed_comm_s"] += waited
        trip.exposed[name] += waited
        self._pass(waited, 0.0)

    def _transfer(self, task: Transfer) -> None:
        if task.host_bytes:
            begin = max(self.now, self.free["host"])
            self.free["host"] = self.ends[task.name] = (
                begin + float(task.host_bytes) / self.host_bytes_per_s
            )
        else:
            self.queue.append([task.name, float(task.hbm_bytes) / self.hbm_bytes_per_s])
            self._drain(0.0)

    def _await(self, task: Await, trip: _Trip) -> None:
        if task.name in self.ends:
            self._wait(task.name, self.ends.pop(task.name), trip)
            return
        left = 0.0
        if task.name not in self.moved:
            # Taken out one by one: time that is summed and passed would leave a rest of rounding.
            while task.name not in self.moved:
                name, seconds = self.queue.popleft()
                left += float(seconds)
                self.moved.add(str(name))
            trip.parts["hbm_bound_s"] += left
            self.now += left
        self.moved.remove(task.name)

    def _pass(self, seconds: float, hbm_s: float) -> None:
        """Let time pass, of which the stream itself keeps HBM busy for `hbm_s`."""
        self.now += seconds
        self._drain(max(seconds - hbm_s, 0.0))

    def _drain(self, seconds: float) -> None:
        """Let the transfers have HBM for so long."""
        while self.queue and float(self.queue[0][1]) <= seconds * (1 + 1e-12):
            name, took = self.queue.popleft()
            seconds -= float(took)
            self.moved.add(str(name))
        if self.queue:
            self.queue[0][1] = float(self.queue[0][1]) - max(seconds, 0.0)
