"""A Program as the operations that every chip runs in order: work, collectives, waits.

The same rules as in `cost/price.py`: "exposed" collectives stop the chip; "ring" ones are cut
into hops beside blocks of their matmuls where the compiler's test says that it pays; of those
"behind", gathers start one layer ahead and scatters are awaited one layer later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from shardsim.cost.collectives import collective_s, sent_bytes
from shardsim.cost.compute import compute_time
from shardsim.cost.network import Group
from shardsim.cost.overlap import BIDIRECTIONAL, ring_matmul_s
from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.plan.layout import Layout
from shardsim.program.tasks import Block, Collective, Compute, Program


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations in a row on the chip's compute stream."""

    parts: tuple[tuple[str, float], ...]  # name and seconds

    @property
    def time_s(self) -> float:
        """Seconds of all of them."""
        return sum(seconds for _, seconds in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """One collective of the program, as numbers."""

    name: str
    kind: str
    role: str
    bytes: float
    messages: float
    stage: str
    repeat: int
    moves: str  # "parameters" or "activations"
    sent_bytes: float  # by one member, once
    alone_s: float  # what the closed form says, once


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Run a collective and wait for it."""

    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start a collective; it is awaited at the end of the next layer."""

    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Host:
    """Start a transfer to or from the host, awaited at the end of the layer."""

    name: str
    time_s: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A collective cut into hops beside blocks of matmuls.

    `rounds` rounds of `blocks` blocks each, a hop beside every round but, in one direction of a
    gather, the last. A gather in both directions has one hop before, a scatter one after.
    """

    spec: Spec
    block_s: float
    blocks: int
    rounds: int
    leg: str
    hop_bytes: float
    before: bool
    after: bool
    beside_last: bool
    whole_s: float  # the matmuls, not cut
    partners: str


Op = Work | Sync | Start | Host | Ring


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One trip through a block."""

    name: str
    phase: str
    ops: tuple[Op, ...]
    prefetch: tuple[Spec, ...] = ()  # needed when it starts, gathered ahead
    reduce: tuple[Spec, ...] = ()  # started when its gradients are complete


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Units in the order in which they run, and when each unit's gathers start."""

    units: tuple[Unit, ...]
    order: tuple[int, ...]  # into `units`
    issue: dict[int, tuple[int, ...]]  # place in `order` -> places whose gathers start there
    legs: dict[str, set[str]] = field(default_factory=dict)  # by role: kind@stage, ring legs


def schedule(
    machine: Machine, layout: Layout, program: Program, links: Mapping[str, Group]
) -> Schedule:
    """Return what every chip of `machine` does in a step of `program`."""
    if int(layout.pipeline.size) > 1:
        raise PlanError(
            "the event simulation has no pipeline stages yet; use --fidelity analytic for "
            f"{int(layout.pipeline.size)} stages"
        )
    writer = _Writer(machine, layout, program, links)
    blocks = {block.name: block for block in program.blocks}
    layer = "layer forward"
    forward = writer.unit(blocks[layer])
    head = writer.unit(blocks["embedding and head"])
    backward = writer.unit(blocks["layer backward"])
    reductions = [block for block in program.blocks if block.phase == "reduction"]
    afterwards = [writer.unit(block) for block in reductions]
    # Gradients are complete in the last microbatch, and what may run behind it starts there.
    ahead = {block.name: writer.reductions.get(block.name, ()) for block in reductions}
    units = [
        forward,
        head,
        backward,
        replace(head, reduce=ahead.get("end gradient reduction", ())),
        replace(backward, reduce=ahead.get("gradient reduction", ())),
        writer.unit(blocks["update"]),
    ]
    microbatches = int(layout.microbatches)
    layers = round(float(blocks[layer].trips)) // microbatches
    order: list[int] = []
    for number in range(microbatches):
        final = number == microbatches - 1
        order += [0] * layers + [3 if final else 1] + [4 if final else 2] * layers
    for block, unit in zip(reductions, afterwards, strict=True):
        if unit.ops:
            order += [len(units)] * round(float(block.trips))
            units.append(unit)
    order.append(5)
    issue: dict[int, tuple[int, ...]] = {}
    latest = -1
    for place, number in enumerate(order):
        if units[number].prefetch:
            at = latest if latest >= 0 else place
            issue[at] = (*issue.get(at, ()), place)
        if units[number].name.startswith("layer"):
            latest = place
    return Schedule(units=tuple(units), order=tuple(order), issue=issue, legs=writer.legs)


class _Writer:
    def __init__(
        self, machine: Machine, layout: Layout, program: Program, links: Mapping[str, Group]
    ) -> None:
        self.machine = machine
        self.layout = layout
        self.program = program
        self.links = links
        self.legs: dict[str, set[str]] = {}
        self.reductions: dict[str, tuple[Spec, ...]] = {}

    def unit(self, block: Block) -> Unit:
        """Return one trip through `block`."""
        ops: list[Op] = []
        prefetch: list[Spec] = []
        times = {
            work.name: float(compute_time(self.machine.chip, work).total_s * work.count)
            for work in block.computes()
        }
        rings, inside = self._rings(block, times)
        host = self._host(block)
        if host is not None:
            ops.append(host)
        run: list[tuple[str, float]] = []

        def flush() -> None:
            if run:
                ops.append(Work(parts=tuple(run)))
                run.clear()

        for task in block.tasks:
            if isinstance(task, Compute):
                if task.name in rings:
                    flush()
                    ops.append(rings[task.name])
                elif task.name not in inside and times[task.name] > 0:
                    run.append((task.name, times[task.name]))
                continue
            if not isinstance(task, Collective):  # only compiled programs have others
                continue
            spec = self.spec(task)
            if spec is None or task.name in inside:
                continue
            behind = task.schedule == "behind" and bool(getattr(self.layout, task.switch))
            if behind and block.phase == "reduction":
                self.reductions[block.name] = (*self.reductions.get(block.name, ()), spec)
            elif behind and task.kind == "all-gather":
                prefetch.append(spec)
            else:
                flush()
                ops.append(Start(spec=spec) if behind else Sync(spec=spec))
        flush()
        return Unit(name=block.name, phase=block.phase, ops=tuple(ops), prefetch=tuple(prefetch))

    def spec(self, task: Collective) -> Spec | None:
        """Return a collective as numbers; None where it does not run."""
        group = self.links[task.role]
        repeat = int(task.count)
        total = float(task.bytes)
        moved = float(sent_bytes(task.kind, group, total, task.stage))
        if repeat == 0 or moved == 0:
            return None
        self.legs.setdefault(task.role, set()).add(f"{task.kind}@{task.stage}")
        alone = collective_s(task.kind, group, total, task.messages, task.stage)
        return Spec(
            name=task.name,
            kind=task.kind,
            role=task.role,
            bytes=total,
            messages=float(task.messages),
            stage=task.stage,
            repeat=repeat,
            moves=task.moves,
            sent_bytes=moved,
            alone_s=float(alone),
        )

    def _rings(self, block: Block, times: dict[str, float]) -> tuple[dict[str, Ring], set[str]]:
        """Return the rings of a block by the matmul in whose place they run, and all names that
        they stand for. A gather's ring runs where its first matmul was, a scatter's at the last.
        """
        rings: dict[str, Ring] = {}
        inside: set[str] = set()
        tasks = {work.name: work for work in block.computes()}
        for task in block.collectives():
            spec = self.spec(task) if task.schedule == "ring" else None
            if spec is None:
                continue
            names = [
                work.name
                for work in block.computes()
                if work.name in task.partners and times[work.name] > 0
            ]
            whole = sum(times[name] for name in names)
            size = int(self.links[task.role].size)
            block_s = sum(
                float(
                    compute_time(self.machine.chip, tasks[name], size).total_s * tasks[name].count
                )
                for name in names
            )
            made = ring_matmul_s(
                kind=task.kind,
                group=self.links[task.role],
                total_bytes=spec.bytes,
                matmul_s=whole,
                block_s=block_s,
                collective_s=spec.alone_s,
                mode=self.layout.matmul_overlap,
            )
            if not names or not bool(made.decomposed):
                continue
            ring = self._ring(spec, whole, block_s, size, " + ".join(names))
            rings[names[0] if task.kind == "all-gather" else names[-1]] = ring
            inside.update(names)
            inside.add(task.name)
            self.legs[task.role] |= {"ring+", ring.leg}
        return rings, inside

    def _ring(self, spec: Spec, whole_s: float, block_s: float, size: int, partners: str) -> Ring:
        both = int(self.layout.matmul_overlap) == BIDIRECTIONAL and size % 4 == 0
        gather = spec.kind == "all-gather"
        return Ring(
            spec=spec,
            block_s=block_s,
            blocks=2 if both else 1,
            rounds=size // 2 if both else size,
            leg="ring+-" if both else "ring+",
            hop_bytes=spec.bytes / size,
            before=both and gather,
            after=not gather,
            beside_last=both or not gather,
            whole_s=whole_s,
            partners=partners,
        )

    def _host(self, block: Block) -> Host | None:
        moved = float(np.max(self.program.offload_bytes))
        if moved == 0 or block.name not in ("layer forward", "layer backward"):
            return None
        chip = self.machine.chip
        rate = (chip.pcie_bytes_per_s or np.inf) / chip.devices_per_chip
        name = "offload activations" if block.phase == "forward" else "fetch activations"
        return Host(name=name, time_s=float(moved / rate), bytes=moved)
