"""From a scheduled module to a Schedule: blocks of tasks in the order of execution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardsim.program.schedule import Await, Block, Copy, Start, Task
from shardsim.xla.hlo.between import Part, array_bytes, kind_of, rendezvous_of
from shardsim.xla.hlo.calls import copied_first, is_prepared, offloaded
from shardsim.xla.hlo.collect import CompiledCollective, chain_of, custom_target, read_collective
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.kernels import Masks
from shardsim.xla.hlo.loops import trips_of
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import ASYNC_DONE, FREE, FREE_TARGETS, KINDS, MOVES, TRANSFERS
from shardsim.xla.hlo.operations import Operation, Works, transfer_of
from shardsim.xla.hlo.sources import named, source_of
from shardsim.xla.hlo.stacks import stack_sizes

MOST_TRIPS = 10**6  # through all blocks inside a loop
MOST_CALLS = 10**5  # walked through: calls of calls could be without end
_REFUSED = frozenset("fusion-start fusion-done custom-call-start custom-call-done".split())
_HOST = frozenset("send send-done recv recv-done infeed outfeed".split())
PALLAS = "tpu_custom_call"  # the target of every kernel of Pallas
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"


def _opened_as(fusion: str, collective: Instruction) -> str:
    """Return the name under which a collective that a fusion starts stays open."""
    return f"{fusion}/{collective.name}"


@dataclass
class _Draft:
    """A block while its instructions are read."""

    name: str
    trips: int
    tasks: list[Task] = field(default_factory=list)
    weight: dict[str, float] = field(default_factory=dict)  # phase: cycles


@dataclass
class Steps:
    """What the instructions of a module do, in order."""

    module: Module
    mesh: Mapping[str, int]
    masks: Masks
    slices: tuple[Part, ...] = ()  # what mesh axes have of several slices
    blocks: list[Block] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    collectives: list[CompiledCollective] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._works = Works(self.module, self.masks)
        self._open: dict[str, str] = {}  # what is started -> what is awaited, "" for nothing
        # Computation and number: the fusion that starts it, and the collective in that.
        self._chains: dict[tuple[str, str], tuple[str, Instruction]] = {}
        self._between: dict[str, str] = {}  # rendezvous of slices -> what is awaited
        self._ended: set[tuple[str, str]] = set()
        self._loops = self._calls = 0
        self._lengths: dict[str, tuple[int, int]] = {}
        entry = self.module.computations[self.module.entry]
        self.order = self._walk(entry, "entry", 1)

    def _walk(self, computation: Computation, title: str, trips: int) -> list[int]:
        """Read a computation that runs `trips` times in a step; return its blocks as they run."""
        order: list[int] = []
        part = 1
        draft = _Draft(f"{title}, part {part}", trips)
        for home, item in self._inline(computation):
            if item.opcode != "while":
                self._instruction(home, item, draft)
                continue
            order += self._close(draft)
            self._loops += 1
            body = self.module.computations[item.attribute("body").removeprefix("%")]
            count = self._trips(home, item, body)
            if count:
                inside = self._walk(body, f"loop {self._loops}", trips * count)
                if len(inside) * count > MOST_TRIPS:
                    raise HloError(f"%{item.name} runs {count} times: too often", item.line)
                order += inside * count
            part += 1
            draft = _Draft(f"{title}, part {part}", trips)
        order += self._close(draft)
        left = [name.partition("/")[0] for name in self._open]
        left = [name for name in left if name in computation.instructions]
        if left:
            raise HloError(f"%{left[0]} is started but never awaited", computation[left[0]].line)
        return order

    def _inline(self, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
        """Yield instructions with where they stand; those of calls and branches in their place."""
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise HloError(f"%{computation.name}: more than {MOST_CALLS} calls", computation.line)
        for item in computation.instructions.values():
            if item.opcode == "call":
                yield from self._inline(self.module.called(item))
            elif item.opcode == "conditional":
                branches = [self.module.computations[name] for name in item.called]
                if not branches:
                    raise HloError(f"%{item.name}: conditional without branches", item.line)
                self.warnings[
                    f"%{item.name}: counted as the longest of its {len(branches)} branches"
                ] = None
                yield from self._inline(max(branches, key=self._length))
            else:
                yield computation, item

    def _length(self, computation: Computation) -> tuple[int, int]:
        """Return the cycles of a branch, then its instructions: loops in it count once."""
        if computation.name in self._lengths:
            return self._lengths[computation.name]
        called = [
            self._length(self.module.computations[name])
            for item in computation.instructions.values()
            if item.opcode in ("call", "while", "conditional")
            for name in item.called
        ]
        items = computation.instructions.values()
        self._lengths[computation.name] = (
            sum(item.cycles or 0 for item in items) + sum(cycles for cycles, _ in called),
            len(items) + sum(many for _, many in called),
        )
        return self._lengths[computation.name]

    def _trips(self, computation: Computation, loop: Instruction, body: Computation) -> int:
        """Return how often a loop runs; the arrays that it walks through must be long enough."""
        trips = trips_of(self.module, computation, loop)
        sizes = stack_sizes(self.module, body, trips.counter)
        if sizes and trips.count not in sizes:
            problem = (
                f"%{loop.name} runs {trips.count} times, but walks through arrays of "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
            if trips.count > max(sizes):
                raise HloError(problem, loop.line)
            self.warnings[problem] = None
        return trips.count

    def _close(self, draft: _Draft) -> list[int]:
        """Add a block, if anything happens in it, and return its number."""
        if not draft.tasks:
            return []
        phase = max(draft.weight, key=lambda name: draft.weight[name], default="forward")
        self.blocks.append(
            Block(
                name=draft.name,
                phase="backward" if phase == "recomputation" else phase,
                trips=draft.trips,
                tasks=tuple(draft.tasks),
            )
        )
        return [len(self.blocks) - 1]

    def _instruction(self, computation: Computation, item: Instruction, draft: _Draft) -> None:
        code = item.opcode
        if code in _REFUSED:
            raise HloError(f"%{item.name}: {code} is not understood", item.line)
        if code in FREE or (
            code == "custom-call" and custom_target(self.module, item) in FREE_TARGETS
        ):
            return
        if code in _HOST:
            self._transfer(computation, item, draft)
        elif code in KINDS:
            self._collective(item, draft, started=False)
        elif code in TRANSFERS:
            self._start_transfer(computation, item, draft)
        elif code == "async-update" and len(item.operands) > 1:
            self._opened(computation, item)
            self._call_start(computation.operand(item, 0), item.name, draft)
        elif code == "async-update":
            self._open[item.name] = self._opened(computation, item)
        elif code in ASYNC_DONE:
            if name := self._opened(computation, item):
                draft.tasks.append(Await(name=name))
        elif code == "async-start":
            self._async_start(computation, item, draft)
        elif code == "call-start":
            self._call_start(item, item.name, draft)
        elif code.endswith("-start"):
            self._collective(item, draft, started=True)
        elif code == "fusion" and (inside := self._works.costs.collectives_inside(item)):
            self._fused(computation, item, inside, draft)
        else:
            self._compute(computation, item, draft)

    def _transfer(self, computation: Computation, item: Instruction, draft: _Draft) -> None:
        """Read half of a collective between slices; other transfers by hosts have no price."""
        first = computation.operand(item, 0) if item.opcode.endswith("-done") else item
        kind = kind_of(first)
        if not kind or not self.slices:
            what = "a transfer to or from the host"
            self.warnings[f"%{item.name}: {item.opcode}, {what}, has no price"] = None
        elif item.opcode == "send":
            told = named(self.module, computation.operand(item, 0))
            found = CompiledCollective(
                name=item.name,
                kind=kind,
                mesh_axes=tuple(axis for axis, _, _ in self.slices),
                parts=tuple(part for part in self.slices if part[2] > 1),
                members=math.prod(members for _, members, _ in self.slices),
                regular=True,
                shifts=(),
                array_bytes=array_bytes(computation, item),
                origin="",
                op_name=told.op_name,
                source=source_of(self.module, told),
                block=draft.name,
                count=draft.trips,
                asynchronous=True,
            )
            self.collectives.append(found)
            self._between[rendezvous_of(item)] = item.name
            draft.tasks.append(Start(task=found.move()))
        elif item.opcode == "recv-done" and (name := self._between.pop(rendezvous_of(first), "")):
            draft.tasks.append(Await(name=name))

    def _opened(self, computation: Computation, item: Instruction) -> str:
        """Return what an -update or -done goes on with, and close it."""
        what = item.opcode.rpartition("-")[0]
        for operand in item.operands[:1]:
            same = computation[operand].opcode.rpartition("-")[0] == what
            if same and operand in self._open:
                return self._open.pop(operand)
        raise HloError(f"%{item.name}: {item.opcode} of nothing that was started", item.line)

    def _async_start(self, computation: Computation, item: Instruction, draft: _Draft) -> None:
        if is_prepared(item):
            self._open[item.name] = ""
            return
        inner = self.module.called(item)
        wrapped = inner[inner.root].opcode
        if wrapped in KINDS:
            self._collective(item, draft, started=True)
        elif wrapped in MOVES:
            self._start_transfer(computation, item, draft)
        elif "async_execution_thread" in item.attributes:
            self._call_start(item, item.name, draft)
        else:
            raise HloError(f"%{item.name}: an asynchronous {wrapped} is not understood", item.line)

    def _call_start(self, item: Instruction, name: str, draft: _Draft) -> None:
        """Start what another core does, as `name`: a collective, or moving data through HBM."""
        home, operation = offloaded(self.module, item)
        if operation.opcode in KINDS:
            self._collective(item, draft, started=True)
            return
        self._open[name] = name
        copied = copied_first(self.module, self.module.called(item)).values()
        moving = [(home, operation), *((inner, copy) for _, inner, copy in copied)]
        draft.tasks.append(
            Start(
                task=Copy(
                    name=name,
                    hbm_bytes=sum(self._works.costs.hbm_bytes(*one) for one in moving),
                    source=source_of(self.module, item),
                )
            )
        )

    def _collective(
        self, item: Instruction, draft: _Draft, started: bool, inside: Instruction | None = None
    ) -> None:
        """Add a collective, of a fusion the one `inside`; a started one stays open."""
        found = read_collective(
            self.module,
            item,
            self.mesh,
            block=draft.name,
            count=draft.trips,
            asynchronous=started,
            inside=inside,
            slices=self.slices,
        )
        if started:
            opened = item.name if inside is None else _opened_as(item.name, inside)
            self._open[opened] = "" if found is None else found.name
        if found is None:
            return
        if not found.regular:
            self.warnings[
                f"%{found.name}: its groups are no grid on the mesh; priced as whole "
                f"{', '.join(found.mesh_axes)}"
            ] = None
        self.collectives.append(found)
        draft.tasks.append(Start(task=found.move()) if started else found.move())

    def _fused(
        self, computation: Computation, item: Instruction, inside: list[Instruction], draft: _Draft
    ) -> None:
        """Read a fusion with collectives in it: parts of asynchronous chains, or one of its own.

        A chain begins where AsyncCollectiveStart reads it, goes on inside fusions that compute
        something else, and ends with AsyncCollectiveDone: it is one collective. A fusion may go on
        with one and begin another. One that shares its only fusion with a matmul runs beside that.
        """
        roles = {one.name: self._role(item, one) for one in inside}
        chains = {chain_of(one) for one in inside}
        if not any(chains) and not any(roles.values()):
            operation = self._works.read(computation, item, draft.trips)
            beside = operation is not None and bool(operation.matmuls)
            self._collective(item, draft, started=beside)
            if beside:
                name = self._open.pop(item.name)
                self._compute(computation, item, draft)
                if name:
                    draft.tasks.append(Await(name=name))
            return
        ended = {chain for chain in chains if (computation.name, chain) in self._ended}
        if ended and ended == chains and _START not in roles.values():
            # A part of a chain computed again after its end, by the compiler's rematerialisation.
            self.warnings[f"%{item.name}: repeats a step of a collective that is done"] = None
            self._compute(computation, item, draft)
            return
        for collective in inside:
            self._step(computation, item, collective, roles[collective.name], draft)
        if len(inside) > 1 or custom_target(self.module, item) not in (_START, _DONE):
            self._compute(computation, item, draft)

    def _step(
        self,
        computation: Computation,
        item: Instruction,
        collective: Instruction,
        role: str,
        draft: _Draft,
    ) -> None:
        """Start, go on with or end the chain of one collective inside the fusion `item`."""
        chain = chain_of(collective)
        key = computation.name, chain
        if role == _START and chain:
            if key in self._chains:
                raise HloError(f"%{item.name}: chain {chain} is started twice", item.line)
            self._chains[key] = item.name, collective
            self._ended.discard(key)
            self._collective(item, draft, started=True, inside=collective)
            return
        if not chain or key not in self._chains:
            raise HloError(f"%{item.name}: chain {chain} was not started", item.line)
        start, first = self._chains[key]
        self._same_collective(first, collective, item)
        if role == _DONE:
            self._ended.add(key)
            del self._chains[key]
            if name := self._open.pop(_opened_as(start, first)):
                draft.tasks.append(Await(name=name))

    def _role(self, item: Instruction, collective: Instruction) -> str:
        """Return whether a collective inside a fusion begins its chain, or ends it."""
        users = self.module.called(item).users[collective.name]
        targets = {custom_target(self.module, user) for user in users}
        return next((target for target in (_START, _DONE) if target in targets), "")

    def _same_collective(
        self, first: Instruction, collective: Instruction, item: Instruction
    ) -> None:
        keys = ("replica_groups", "source_target_pairs", "dimensions")
        same = first.opcode == collective.opcode and first.shape.form == collective.shape.form
        if not same or any(first.attributes.get(k) != collective.attributes.get(k) for k in keys):
            raise HloError(f"%{item.name}: not the collective of its chain", item.line)

    def _start_transfer(self, computation: Computation, item: Instruction, draft: _Draft) -> None:
        self._open[item.name] = item.name
        draft.tasks.append(Start(task=transfer_of(self.module, computation, item)))

    def _compute(self, computation: Computation, item: Instruction, draft: _Draft) -> None:
        operation = self._works.read(computation, item, draft.trips)
        if operation is None:
            return
        if operation.cycles is None and (operation.matmuls or item.opcode == "custom-call"):
            what = custom_target(self.module, item) or item.opcode
            if what == PALLAS:
                what = f"kernel {item.name.partition('.')[0]}"
            if kernel := self._works.costs.kernel(computation, item):
                what = operation.name.partition(".")[0]
                if kernel.problem:
                    self.warnings[f"%{item.name}: {kernel.problem}"] = None
            self.warnings[f"{what}: the compiler gives no cycles; priced by shape and bytes"] = None
        phase = operation.phase
        draft.weight[phase] = draft.weight.get(phase, 0.0) + float(operation.cycles or 0)
        self.operations.append(operation)
        draft.tasks += operation.tasks()
