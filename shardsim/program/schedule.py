"""The Schedule: what one device does in a step, in order, and what runs beside it.

Planned and compiled programs are both Schedules; the closed form, the replay, the event simulation
and the timelines read nothing else. Work and moves run one after another; what is started runs
beside them until it is awaited. Every figure is a number or a numpy array, and all arrays of one
schedule broadcast together: it is one plan or many at once. A count of 0 means that a task does
not run, so an array of 0 and 1 leaves it to some of the plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Number = Any

Phase = Literal[
    "opening", "forward", "head", "backward", "weights", "boundary", "reduction", "update"
]
STAGE_PHASES = ("forward", "backward", "weights")  # a stage of a pipeline has its part of these
# The trips of a visit to a block in which something is started or awaited: a prefetch is started in
# the first for that one, and in all but the last for the next.
When = Literal[
    "each", "first", "but first", "last", "but last", "before the head", "after the head"
]

# What collectives of weights and their gradients are for.
PARAMETER_PURPOSES = frozenset(
    {
        "weights",  # of the layers, gathered before use; their gradients scattered
        "tables",  # the same of the vocabulary
        "ends",  # the same of the other matrices before and after the layers
        "gradient reduction",  # of matrices, over devices with the same weights
        "shared gradients",  # of matrices that the tensor axis does not split
        "small gradients",  # of biases, scales and other vectors
        "updated parameters",
    }
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How a kernel multiplies rows of many groups: in steps one after the other, while HBM brings
    what the next step reads; where another group begins that is more."""

    steps: Number
    step_bytes: Number
    groups: Number  # changes from one group's matrix to another's
    group_bytes: Number  # what the first step of a group needs
    slower: Number = 1.0  # work beyond the arrays' ends, in parts of their own


@dataclass(frozen=True, kw_only=True)
class Work:
    """One compiled operation on one device, or `count` equal ones in a row.

    A matmul multiplies `[m, k]` by `[k, n]`, `batch` of them, and executes `fraction` of that
    (causal attention skips half). `matmuls` counts products of that shape (or its transposes)
    inside one fused operation, as in a flash attention kernel. Operations without a matmul have
    `matmuls` 0. Bytes are those that cross HBM after fusion; vector operations are float32 ones.
    """

    name: str
    kind: str  # "matmul", "attention", "elementwise", "optimizer", "transfer", "copy", "transpose"
    m: Number = 0
    k: Number = 0
    n: Number = 0
    columns: Number = 0  # that a product makes: `n`, or more where some are padding
    batch: Number = 1
    matmuls: Number = 0
    fraction: Number = 1.0
    hbm_bytes: Number = 0
    vector_ops: Number = 0
    dtype: str = "bf16"
    sparse: bool = False  # one operand has two zeros in four numbers
    count: Number = 1
    fused: str = ""  # of a fused kernel: its vector operations run "beside" products, or "in turn"
    grid: Grid | None = None  # of a kernel of grouped products
    cycles: Number | None = None  # a compiler's estimate; it stands for the units' time
    source: str = ""  # of compiled code: file, line and function

    @property
    def flops(self) -> Number:
        """Multiply-adds of one operation, counted as two."""
        return 2.0 * self.m * self.k * self.n * self.batch * self.matmuls * self.fraction


@dataclass(frozen=True, kw_only=True)
class Move:
    """One collective over one group of devices, or `count` equal ones in a row.

    `bytes` is the size of the whole array that the group holds together: what an all-gather
    leaves on every device, what a reduce-scatter starts from, what an all-reduce sums. For
    all-to-all and permute it is what one device sends on.

    A planned one names a role of the layout. A compiled one has the role "" and names the mesh
    axes of its group; of the axes in `parts` it takes only some members at a stride.
    """

    name: str
    kind: str  # "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute"
    role: str = ""  # a role of the layout, or a joint one
    bytes: Number
    count: Number = 1
    messages: Number = 1  # separate arrays, each with its own latency
    # Only that part of the group's path: "torus" or "dcn"; of a hop round a ring "closing", the
    # way from the last member to the first.
    stage: str = "all"
    purpose: str = "block"  # what it is for: see PARAMETER_PURPOSES for those of weights
    ways: int = 0  # of a hop round a ring: 1, or 2 for half of the bytes to either side
    mesh_axes: tuple[str, ...] = ()
    parts: tuple[tuple[str, int, int], ...] = ()  # mesh axis, members, stride
    shifts: tuple[int, ...] = ()  # of a compiled permute: members passed over, negative: back
    source: str = ""  # of compiled code: file, line and function

    @property
    def moves(self) -> str:
        """Whether it moves "parameters" (or their gradients) or "activations"."""
        return "parameters" if self.purpose in PARAMETER_PURPOSES else "activations"


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy between memories of one device, or to and from its host."""

    name: str
    hbm_bytes: Number = 0  # read from HBM and written to it
    host_bytes: Number = 0  # to or from the host's memory
    keeps: str = ""  # to the host's: what remat policies call it
    moves: str = "activations"  # or "parameters", or "optimizer state"
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The point from which a move or a copy runs beside everything else."""

    task: Move | Copy
    when: When = "each"

    @property
    def name(self) -> str:
        """What an `Await` calls it."""
        return self.task.name


@dataclass(frozen=True, kw_only=True)
class Await:
    """The point where what was started as `name` must have ended; nothing if none is under way."""

    name: str
    when: When = "each"


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """Tasks that run `times` times in a row, and begin and end with nothing of theirs under way."""

    times: Number
    tasks: tuple[Task, ...]


Task = Work | Move | Copy | Start | Await | Repeat


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tasks that run in order, `trips` times in a step on each device."""

    name: str  # for people: "layer forward"
    phase: str  # of planned programs a `Phase`
    trips: Number
    tasks: tuple[Task, ...]
    group: int = 0  # of layers, where those of a planned program differ in a row
    of: tuple[int, ...] = ()  # of a reduction, the groups of layers whose gradients it sums

    def computes(self) -> Iterator[Work]:
        """Yield the work in order."""
        return (task for task, _, _ in every(self.tasks) if isinstance(task, Work))

    def collectives(self) -> Iterator[Move]:
        """Yield the moves in order."""
        return (task for task, _, _ in every(self.tasks) if isinstance(task, Move))


def every(
    tasks: tuple[Task, ...], times: Number = 1
) -> Iterator[tuple[Work | Move | Copy, Number, When]]:
    """Yield (task, how often it runs in a trip, in which trips) in order."""
    for task in tasks:
        if isinstance(task, Repeat):
            yield from every(task.tasks, times * task.times)
        elif isinstance(task, Start):
            yield task.task, times, task.when
        elif not isinstance(task, Await):
            yield task, times, "each"


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One block, or loops and blocks beginning with a loop, that run `times` times in a row."""

    times: Number
    body: tuple[int | Loop, ...]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the layers are spread over stages, each of which has `chunks` parts of them."""

    stages: Number = 1
    microbatches: Number = 1
    chunks: Number = 1
    # All stages run in ticks, all microbatches forward, then all backward (GPipe): the boundary is
    # part of a tick, and who has nothing to do runs a layer's collectives nevertheless.
    lockstep: Number = False
    in_turns: Number = False  # and in a tick one of them forward, one backward
    split_backward: Number = False  # gradients of weights are turns of their own (zero-bubble H1)
    in_a_row: Number = 1  # stages of a slice, where sends inside one are faster than between two
    shares: tuple[float, ...] = ()  # layers of each stage over those of the fullest; (): all alike

    @property
    def ticks(self) -> Number:
        """Ticks over those of them in which a stage has something to do; 1 without ticks."""
        return 1 + self.bubble * self.lockstep

    @property
    def bubble(self) -> Number:
        """Idle time as a fraction of the busy time of the layers."""
        return (self.stages - 1) / (self.microbatches * self.chunks)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All that one device does in one step."""

    blocks: tuple[Block, ...]
    # The blocks as they run: places in `blocks`. With pipeline stages, those of one that has the
    # head, without its waiting for others.
    order: tuple[int | Loop, ...]
    pipeline: Pipeline = Pipeline()
    warnings: tuple[str, ...] = ()

    def block(self, name: str) -> Block:
        """Return the block called `name`."""
        return next(block for block in self.blocks if block.name == name)

    def of_stage(self, stage: int) -> Schedule:
        """Return what one stage does, where stages have different numbers of layers: as of the
        fullest one, with fewer trips."""
        shares = self.pipeline.shares
        if not shares:
            return self
        return self.with_share(shares[stage], head=stage in (-1, len(shares) - 1))

    def with_share(self, share: float, head: bool) -> Schedule:
        """Return the same with so many times the trips through layers.

        Without any, what runs beside them for the `head` is waited for: nothing of a stage is there
        to hide it, as nothing hides the first gather of a pass over layers.
        """
        layers = {n for n, block in enumerate(self.blocks) if block.phase in STAGE_PHASES}

        def scaled(item: int | Loop) -> int | Loop:
            if isinstance(item, int):
                return item
            if item.body[0] in layers:
                return replace(item, times=item.times * share)
            return replace(item, body=tuple(map(scaled, item.body)))

        ahead, after = self.beside_the_head() if head and not share else ((), ())
        last = max(
            (n for n, block in enumerate(self.blocks) if block.phase == "reduction"), default=-1
        )

        def own(number: int, block: Block) -> Block:
            if number in layers:
                return replace(block, trips=block.trips * share)
            if block.phase == "head" and ahead:
                return replace(block, tasks=(*ahead, *block.tasks))
            if number == last and after:
                return replace(block, tasks=(*after, *block.tasks))
            return block

        blocks = tuple(own(number, block) for number, block in enumerate(self.blocks))
        return replace(self, blocks=blocks, order=tuple(map(scaled, self.order)))

    def beside_the_head(self) -> tuple[tuple[Move | Copy, ...], tuple[Move | Copy, ...]]:
        """Return what trips through layers do for the head: in each microbatch, and once a step,
        which are sums over replicas."""
        heads = sum(
            visit.many * visit.times for visit in self.visits() if self._is_head(visit.block)
        )
        found: dict[str, tuple[Move | Copy, Number]] = {}
        for visit in self.visits():
            block = self.blocks[visit.block]
            for task in block.tasks if block.phase in STAGE_PHASES else ():
                if isinstance(task, Start) and (
                    task.when.endswith("the head")
                    or (task.when == "first" and block.phase == "weights")
                ):
                    _, before = found.get(task.name, (task.task, 0))
                    found[task.name] = task.task, before + visit.trips(task.when)
        each = {name for name, (_, times) in found.items() if np.all(np.equal(times, heads))}
        return (
            tuple(task for name, (task, _) in found.items() if name in each),
            tuple(task for name, (task, _) in found.items() if name not in each),
        )

    def visits(self) -> Iterator[Visit]:
        """Yield the visits to blocks, those of loops over several blocks once for all rounds."""
        return self._visits(self.order, 1)

    def _visits(self, order: Sequence[int | Loop], many: Number) -> Iterator[Visit]:
        for item in self._items(order):
            if isinstance(item, Loop):
                yield from self._visits(item.body, many * item.times)
            else:
                yield replace(item, many=many)

    def trips(self) -> Iterator[Trip]:
        """Yield all trips of a single plan or program in order."""
        return self._trips(self.order)

    def _trips(self, order: Sequence[int | Loop]) -> Iterator[Trip]:
        for item in self._items(order):
            if isinstance(item, Loop):
                for _ in range(round(float(item.times))):
                    yield from self._trips(item.body)
            else:
                yield from item.each()

    def _items(self, order: Sequence[int | Loop]) -> Iterator[Visit | Loop]:
        """Yield what follows each other: loops over several blocks, and visits to one."""
        for place, item in enumerate(order):
            if isinstance(item, Loop) and not isinstance(item.body[0], int):
                yield item
                continue
            number, times = (item, 1) if isinstance(item, int) else (item.body[0], item.times)
            near = [order[at] if 0 <= at < len(order) else None for at in (place - 1, place + 1)]
            after, before = (self._is_head(other) for other in near)
            assert isinstance(number, int)
            yield Visit(block=number, times=times, many=1, after=after, before=before)

    def _is_head(self, item: int | Loop | None) -> bool:
        number = item.body[0] if isinstance(item, Loop) else item
        return isinstance(number, int) and self.blocks[number].phase == "head"

    def runs(self) -> Iterator[tuple[int, Work | Move | Copy, Number]]:
        """Yield (place of the block, task, how often it runs in a step), alike visits together."""
        grouped: dict[tuple[int, int, bool, bool], Visit] = {}
        for visit in self.visits():
            times = visit.times if isinstance(visit.times, int) else id(visit.times)
            key = visit.block, times, visit.after, visit.before
            known = grouped.get(key)
            many = visit.many if known is None else known.many + visit.many
            grouped[key] = replace(visit, many=many)
        for visit in grouped.values():
            for task, times, when in every(self.blocks[visit.block].tasks):
                yield visit.block, task, times * visit.trips(when)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A block that runs `times` times in a row, and that `many` times in a step."""

    block: int
    times: Number
    many: Number
    after: bool  # directly after the head
    before: bool  # directly before it

    def each(self) -> Iterator[Trip]:
        """Yield the trips of one visit of a single plan or program."""
        times = round(float(self.times))
        for number in range(times):
            yield Trip(
                block=self.block,
                first=number == 0,
                last=number == times - 1,
                after=self.after,
                before=self.before,
            )

    def trips(self, when: When) -> Number:
        """Return in how many trips of a step something is started."""
        if when == "each":
            return self.many * self.times
        if when in ("but first", "but last"):
            return self.many * (self.times - 1)
        if when in ("before the head", "after the head"):
            return self.many * (self.before if when == "before the head" else self.after)
        return self.many


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A trip through a block, or several that are alike."""

    block: int
    first: bool
    last: Number  # also the first, where there is no other
    after: bool  # of a visit directly after the head
    before: bool  # directly before it

    def has(self, when: When) -> Number:
        """Return whether something is started or awaited in it."""
        if when in ("first", "after the head"):
            return self.first and (when == "first" or self.after)
        if when in ("last", "before the head"):
            return self.last & (when == "last" or self.before)
        if when == "but last":
            return np.logical_not(self.last)
        return when == "each" or not self.first
