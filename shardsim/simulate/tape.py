"""A Schedule as the operations that every chip plays, block by block, trip by trip.

What needs no other chip (operations, copies between memories, waits for them) is arithmetic on
the chip's own clock; only moves are events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from shardsim.cost.lines import wires_of
from shardsim.cost.task_times import TaskTimes, WorkTime
from shardsim.program.schedule import (
    Await,
    Copy,
    Move,
    Repeat,
    Schedule,
    Start,
    Task,
    Trip,
    When,
    Work,
)
from shardsim.simulate import operations
from shardsim.simulate.groups import Groups
from shardsim.simulate.pipeline import Idle, Line, Message, script
from shardsim.simulate.topology import Topology
from shardsim.simulate.traffic import leg_names


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trip through a block of the tape, in the order of a stage."""

    trip: Trip
    message: int = 0  # what a `Send` or `Receive` in it is about
    idle: bool = False  # on nothing: time that its stage waits


@dataclass(frozen=True, kw_only=True)
class Tape:
    """What every chip plays."""

    blocks: tuple[tuple[operations.Op, ...], ...]
    names: tuple[str, ...]  # of the blocks
    fixed: tuple[WorkTime, ...]  # of all operations in a trip through each block
    scripts: tuple[tuple[Entry, ...], ...]  # of every pipeline stage: one where there are none
    groups: dict[str, Groups]
    legs: dict[str, tuple[str, ...]]


class TapeWriter:
    """Writes a single Schedule down as a tape."""

    def __init__(self, topology: Topology, times: TaskTimes) -> None:
        self.topology = topology
        self.times = times
        self.groups: dict[str, Groups] = {}
        self.legs: dict[str, set[str]] = {}

    def tape(self, schedule: Schedule) -> Tape:
        """Return the whole Schedule."""
        stages = round(float(schedule.pipeline.stages))
        blocks = [tuple(self._ops(block.tasks)) for block in schedule.blocks]
        names = [block.name for block in schedule.blocks]
        places: dict[tuple[bool, str], int] = {}

        def place(arriving: bool, leg: str) -> int:
            """Return the block that sends or receives on a leg, a new one if need be."""
            if (arriving, leg) not in places:
                places[arriving, leg] = len(blocks)
                blocks.append((self._message(schedule, arriving, leg),))
                names.append("wait for a stage" if arriving else "send to a stage")
            return places[arriving, leg]

        halves: dict[int, tuple[int, int]] = {}

        def half(block: int, closing: bool) -> int:
            """Return the block that has a block's tasks, or what it closes with."""
            if block not in halves:
                ends = _closing(blocks[block])
                halves[block] = (block, -1)
                if ends:
                    halves[block] = (len(blocks), len(blocks) + 1)
                    blocks.extend((blocks[block][: -len(ends)], ends))
                    names.extend((names[block], f"{names[block]}, its end"))
            return halves[block][closing]

        def entries(line: Line, own: dict[int, int]) -> Iterator[Entry]:
            if isinstance(line, Idle):
                yield from (replace(entry, idle=True) for entry in entries(line.line, own))
            elif isinstance(line, Trip):
                yield Entry(trip=replace(line, block=own.get(line.block, line.block)))
            elif isinstance(line, Message):
                block = place(line.arriving, line.leg)
                trip = Trip(block=block, first=True, last=True, after=False, before=False)
                yield Entry(trip=trip, message=line.number)
            elif (block := half(line.trip.block, line.closing)) >= 0:
                yield Entry(trip=replace(line.trip, block=block))

        scripts = []
        for stage in range(stages):
            own: dict[int, int] = {}  # places of what this stage does otherwise than others
            for number, block in enumerate(schedule.of_stage(stage).blocks):
                if block.tasks is not schedule.blocks[number].tasks:
                    own[number] = len(blocks)
                    blocks.append(tuple(self._ops(block.tasks)))
                    names.append(block.name)
            lines = script(schedule, stage)
            scripts.append(tuple(entry for line in lines for entry in entries(line, own)))
        return Tape(
            blocks=tuple(blocks),
            names=tuple(names),
            fixed=tuple(_fixed(ops) for ops in blocks),
            scripts=tuple(scripts),
            groups=self.groups,
            legs={role: tuple(sorted(names)) for role, names in self.legs.items()},
        )

    def _message(self, schedule: Schedule, arriving: bool, leg: str) -> operations.Op:
        boundary = next(block for block in schedule.blocks if block.phase == "boundary")
        spec = self._spec(replace(next(boundary.collectives()), count=1))
        assert spec is not None
        self.legs[spec.role] -= {"shift"}
        if arriving:
            return operations.Receive(leg=leg)
        self.legs[spec.role].add(leg)
        return operations.Send(spec=spec, leg=leg)

    def _ops(self, tasks: Iterable[Task]) -> list[operations.Op]:
        ops: list[operations.Op] = []
        run: list[Work] = []

        def flush() -> None:
            if run:
                times = [self.times.work(task) for task in run]
                parts = [(task.name, time.total_s) for task, time in zip(run, times, strict=True)]
                ops.append(operations.Run(time=sum(times, WorkTime()), parts=tuple(parts)))
                run.clear()

        for task in tasks:
            if isinstance(task, Work):
                run += [task] if task.count else []
                continue
            flush()
            if isinstance(task, Move):
                spec = self._spec(task)
                ops += [] if spec is None else [operations.Sync(spec=spec)]
            elif isinstance(task, Repeat):
                if times := round(float(task.times)):
                    ops.append(operations.Rounds(times=times, ops=tuple(self._ops(task.tasks))))
            elif isinstance(task, Await):
                ops.append(operations.End(name=task.name, when=task.when))
            elif isinstance(task, Start):
                ops += self._start(task.task, task.when)
            else:
                ops += [*self._start(task, "each"), operations.End(name=task.name, when="each")]
        flush()
        return ops

    def _start(self, task: Move | Copy, when: When) -> list[operations.Op]:
        if isinstance(task, Move):
            spec = self._spec(task)
            return [] if spec is None else [operations.Launch(spec=spec, when=when)]
        if task.host_bytes:
            return [operations.HostCopy(name=task.name, host_s=self.times.host_s(task), when=when)]
        return [operations.HbmCopy(name=task.name, hbm_s=self.times.hbm_s(task), when=when)]

    def _spec(self, task: Move) -> operations.Spec | None:
        """Return a move as numbers; None where it moves nothing."""
        route = self.times.route(task)
        repeat, sent = int(task.count), self.times.sent_bytes(task)
        if repeat == 0 or sent == 0:
            return None
        role = task.role or _role(task)
        if role not in self.groups:
            order = route.order if len(task.mesh_axes) == 1 else ()
            self.groups[role] = Groups(self.topology, route.layout, role, order)
            self.legs[role] = set()
        stage, held = task.stage, float(task.bytes)
        if task.ways:
            stage = "ring+-" if task.ways == 2 else "closing+" if stage == "closing" else "ring+"
            held /= task.ways
        self.legs[role] |= leg_names(task.kind, self.groups[role], stage, task.shifts)
        return operations.Spec(
            name=task.name,
            kind=task.kind,
            role=role,
            bytes=held,
            messages=float(task.messages),
            stage=stage,
            repeat=repeat,
            moves=task.moves,
            sent_bytes=sent,
            alone_s=self.times.alone_s(task) / repeat,
            shifts=task.shifts,
            # Of a planned group, as on one communicator; a compiler's share links.
            queue=wires_of(task).stage if task.role and not task.ways else "",
        )


def _closing(ops: Sequence[operations.Op]) -> tuple[operations.Op, ...]:
    """Return what a block does after its last trip alone."""
    start = len(ops)
    while start and isinstance(op := ops[start - 1], operations.Launch | operations.End):
        if op.when != "last":
            break
        start -= 1
    return tuple(ops[start:])


def _fixed(ops: Iterable[operations.Op]) -> WorkTime:
    """Return the time of all operations."""
    total = WorkTime()
    for op in ops:
        if isinstance(op, operations.Run):
            total = total + op.time
        elif isinstance(op, operations.Rounds):
            inside = _fixed(op.ops)
            for _ in range(op.times):
                total = total + inside
    return total


def _role(task: Move) -> str:
    """Return the mesh axes of a group in words, with the members and stride of parts.

    >>> _role(Move(name="g", kind="all-gather", bytes=1, mesh_axes=("a", "b"),
    ...            parts=(("b", 4, 2),)))
    'a+b (4 by 2)'
    """
    parts = {name: f" ({members} by {stride})" for name, members, stride in task.parts}
    return "+".join(name + parts.get(name, "") for name in task.mesh_axes)
