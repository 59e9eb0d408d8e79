"""A compiled Program as the operations that every chip plays, block by block.

What needs no other chip (operations, transfers between memories, waits for them) is arithmetic on
the chip's own clock; only collectives are events.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.cost.collectives import sent_bytes
from shardsim.cost.replay import block_order
from shardsim.cost.task_times import TaskTimes, WorkTime
from shardsim.program.tasks import Block, Collective, Compute, Program, Transfer
from shardsim.simulate.groups import Groups
from shardsim.simulate.operations import Spec, Start, Sync
from shardsim.simulate.topology import Topology
from shardsim.simulate.traffic import leg_names


@dataclass(frozen=True, kw_only=True)
class Run:
    """Operations in a row on the compute stream."""

    time: WorkTime  # of all of them
    parts: tuple[tuple[str, float], ...]  # name and seconds


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Start a transfer between memories, which takes HBM as it is spared."""

    name: str
    hbm_s: float


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """Start a transfer to or from the host, one after another."""

    name: str
    host_s: float


@dataclass(frozen=True, kw_only=True)
class End:
    """Wait for what was started."""

    name: str


TapeOp = Run | Copy | HostCopy | End | Sync | Start


@dataclass(frozen=True, kw_only=True)
class Tape:
    """What every chip plays."""

    blocks: tuple[tuple[TapeOp, ...], ...]
    names: tuple[str, ...]  # of the blocks
    fixed: tuple[WorkTime, ...]  # of all operations in a trip through each block
    order: tuple[int, ...]
    groups: dict[str, Groups]
    legs: dict[str, tuple[str, ...]]


class TapeWriter:
    """Writes a Program down as a tape."""

    def __init__(self, topology: Topology, times: TaskTimes) -> None:
        self.topology = topology
        self.times = times
        self.groups: dict[str, Groups] = {}
        self.legs: dict[str, set[str]] = {}
        self.nothing: set[str] = set()  # collectives that move nothing

    def tape(self, program: Program) -> Tape:
        """Return the whole Program."""
        blocks = [self._block(block) for block in program.blocks]
        # An await may stand before its start: in the order of blocks, not of their numbers.
        blocks = [
            [op for op in ops if not (isinstance(op, End) and op.name in self.nothing)]
            for ops in blocks
        ]
        return Tape(
            blocks=tuple(map(tuple, blocks)),
            names=tuple(block.name for block in program.blocks),
            fixed=tuple(
                sum((op.time for op in ops if isinstance(op, Run)), WorkTime()) for ops in blocks
            ),
            order=block_order(program),
            groups=self.groups,
            legs={role: tuple(sorted(names)) for role, names in self.legs.items()},
        )

    def _block(self, block: Block) -> list[TapeOp]:
        ops: list[TapeOp] = []
        run: list[Compute] = []

        def flush() -> None:
            if run:
                times = [self.times.work(task) for task in run]
                parts = [(task.name, time.total_s) for task, time in zip(run, times, strict=True)]
                ops.append(Run(time=sum(times, WorkTime()), parts=tuple(parts)))
                run.clear()

        for task in block.tasks:
            if isinstance(task, Compute):
                run.append(task)
                continue
            flush()
            if isinstance(task, Collective):
                spec = self._spec(task)
                if spec is not None:
                    started = task.schedule == "started"
                    ops.append(Start(spec=spec) if started else Sync(spec=spec))
            elif isinstance(task, Transfer):
                if task.host_bytes:
                    ops.append(HostCopy(name=task.name, host_s=self.times.host_s(task)))
                else:
                    ops.append(Copy(name=task.name, hbm_s=self.times.hbm_s(task)))
            else:
                ops.append(End(name=task.name))
        flush()
        return ops

    def _spec(self, task: Collective) -> Spec | None:
        """Return a collective as numbers; None where it moves nothing."""
        route = self.times.route(task)
        repeat, total = int(task.count), float(task.bytes)
        sent = float(sent_bytes(task.kind, route.group, total))
        if repeat == 0 or sent == 0:
            self.nothing.add(task.name)
            return None
        role = _role(task)
        if role not in self.groups:
            order = route.order if len(task.mesh_axes) == 1 else ()
            self.groups[role] = Groups(self.topology, route.layout, role, order)
            self.legs[role] = set()
        self.legs[role] |= leg_names(task.kind, self.groups[role], shifts=task.shifts)
        return Spec(
            name=task.name,
            kind=task.kind,
            role=role,
            bytes=total,
            messages=float(task.messages),
            stage="all",
            repeat=repeat,
            moves=task.moves,
            sent_bytes=sent,
            alone_s=self.times.alone_s(task) / repeat,
            shifts=task.shifts,
        )


def _role(task: Collective) -> str:
    """Return the mesh axes of a group in words, with the members and stride of parts.

    >>> _role(Collective(name="g", kind="all-gather", role="", bytes=1, mesh_axes=("a", "b"),
    ...                  parts=(("b", 4, 2),)))
    'a+b (4 by 2)'
    """
    parts = {name: f" ({members} by {stride})" for name, members, stride in task.parts}
    return "+".join(name + parts.get(name, "") for name in task.mesh_axes)
