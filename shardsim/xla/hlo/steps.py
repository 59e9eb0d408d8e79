"""From a scheduled module to a Schedule: blocks of tasks in the order of execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardsim.program.schedule import Await, Block, Copy, Start, Task
from shardsim.xla.hlo.calls import is_prepared, offloaded
from shardsim.xla.hlo.collect import (
    CompiledCollective,
    chain_of,
    custom_target,
    read_collective,
)
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.loops import trips_of
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import ASYNC_DONE, FREE, FREE_TARGETS, KINDS, MOVES, TRANSFERS
from shardsim.xla.hlo.operations import Operation, Works, transfer_of
from shardsim.xla.hlo.sources import source_of
from shardsim.xla.hlo.stacks import stack_sizes

MOST_TRIPS = 10**6  # through all blocks inside a loop
_REFUSED = frozenset(
    "conditional send send-done recv recv-done infeed outfeed"
    " fusion-start fusion-done custom-call-start custom-call-done".split()
)


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
    causal: bool | None  # as `Costs.causal`
    windows: tuple[int, ...]  # as `Costs.windows`
    blocks: list[Block] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    collectives: list[CompiledCollective] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._works = Works(self.module, self.causal, self.windows)
        self._open: dict[str, str] = {}  # what is started -> what is awaited, "" for nothing
        self._chains: dict[tuple[str, str], str] = {}  # computation and number: its start
        self._ended: set[tuple[str, str]] = set()
        self._loops = 0
        entry = self.module.computations[self.module.entry]
        self.order = self._walk(entry, "entry", 1)

    def _walk(self, computation: Computation, title: str, trips: int) -> list[int]:
        """Read a computation that runs `trips` times in a step; return its blocks as they run."""
        order: list[int] = []
        part = 1
        draft = _Draft(f"{title}, part {part}", trips)
        for item in computation.instructions.values():
            if item.opcode != "while":
                self._instruction(computation, item, draft)
                continue
            order += self._close(draft)
            self._loops += 1
            body = self.module.computations[item.attribute("body").removeprefix("%")]
            count = self._trips(computation, item, body)
            if count:
                inside = self._walk(body, f"loop {self._loops}", trips * count)
                if len(inside) * count > MOST_TRIPS:
                    raise HloError(f"%{item.name} runs {count} times: too often", item.line)
                order += inside * count
            part += 1
            draft = _Draft(f"{title}, part {part}", trips)
        order += self._close(draft)
        left = [name for name in self._open if name in computation.instructions]
        if left:
            raise HloError(f"%{left[0]} is started but never awaited", computation[left[0]].line)
        return order

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
        if code == "call":
            inner = self.module.called(item)
            for instruction in inner.instructions.values():
                if instruction.opcode == "while":
                    raise HloError(f"%{item.name}: a loop inside a call", item.line)
                self._instruction(inner, instruction, draft)
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
        draft.tasks.append(
            Start(
                task=Copy(
                    name=name,
                    hbm_bytes=self._works.costs.hbm_bytes(home, operation),
                    source=source_of(self.module, item),
                )
            )
        )

    def _collective(self, item: Instruction, draft: _Draft, started: bool) -> None:
        """Add a collective; a started one stays open under its name."""
        found = read_collective(
            self.module,
            item,
            self.mesh,
            block=draft.name,
            count=draft.trips,
            asynchronous=started,
        )
        if started:
            self._open[item.name] = "" if found is None else found.name
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
        """Read a fusion with collectives in it: part of an asynchronous chain, or one of its own.

        A chain begins with a fusion that ends in AsyncCollectiveStart, goes on inside fusions that
        compute something else, and ends with AsyncCollectiveDone: it is one collective. One that
        shares its only fusion with a matmul runs beside that.
        """
        target = custom_target(self.module, item)
        chains = [chain_of(collective) for collective in inside]
        if target == "AsyncCollectiveStart" and len(chains) == 1 and chains[0]:
            if (computation.name, chains[0]) in self._chains:
                raise HloError(f"%{item.name}: chain {chains[0]} is started twice", item.line)
            self._chains[computation.name, chains[0]] = item.name
            self._collective(item, draft, started=True)
            return
        if target != "AsyncCollectiveDone" and not any(chains):
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
        if ended and ended == set(chains):
            # A part of a chain computed again after its end, by the compiler's rematerialisation.
            self.warnings[f"%{item.name}: repeats a step of a collective that is done"] = None
            self._compute(computation, item, draft)
            return
        for chain, collective in zip(chains, inside, strict=True):
            start = self._chains.get((computation.name, chain))
            if not chain or start is None:
                raise HloError(f"%{item.name}: chain {chain} was not started", item.line)
            self._same_collective(computation[start], collective, item)
        if target == "AsyncCollectiveDone":
            (chain,) = chains
            self._ended.add((computation.name, chain))
            if name := self._open.pop(self._chains.pop((computation.name, chain))):
                draft.tasks.append(Await(name=name))
        else:
            self._compute(computation, item, draft)

    def _same_collective(
        self, start: Instruction, collective: Instruction, item: Instruction
    ) -> None:
        first = next(
            x for x in self.module.called(start).instructions.values() if x.opcode in KINDS
        )
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
            if kernel := self._works.costs.kernel(computation, item):
                what = operation.name.partition(".")[0]
                if kernel.problem:
                    self.warnings[f"%{item.name}: {kernel.problem}"] = None
            self.warnings[f"{what}: the compiler gives no cycles; priced by shape and bytes"] = None
        phase = operation.phase
        draft.weight[phase] = draft.weight.get(phase, 0.0) + float(operation.cycles or 0)
        self.operations.append(operation)
        draft.tasks += operation.tasks()
