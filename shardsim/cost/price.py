"""Pricing a Program: the analytic level. One plan or a million go through the same lines."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from shardsim.cost.collectives import collective_s, sent_bytes
from shardsim.cost.compute import compute_time
from shardsim.cost.network import Links
from shardsim.cost.overlap import RingTime, behind_s, ring_matmul_s
from shardsim.machine import Machine
from shardsim.plan.layout import EMBED_SHARDED, Layout, Number
from shardsim.program.rings import ring_block
from shardsim.program.tasks import Block, Collective, Compute, Program

# Share of a layer's gathers that the TPU compiler does not overlap: of two large and four small
# matrices one large and one small forward, both large and two small ones backward (read off
# maxtext-22b, fully sharded on v4:4x4x4).
GATHERS_WAITING = {"forward": 0.42, "backward": 0.83}


class Total:
    """A sum that adds small arrays among themselves before it broadcasts them to large ones."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[int, ...], Any] = {}
        self._value: Number | None = None  # since the last addition

    def add(self, value: Number) -> None:
        """Add a number or an array."""
        shape = np.shape(value)
        before = self._by_shape.get(shape)
        self._by_shape[shape] = value if before is None else before + value
        self._value = None

    @property
    def value(self) -> Number:
        """The sum of all that was added."""
        if self._value is None:
            total: Number = 0.0
            for shape in sorted(self._by_shape, key=lambda shape: (prod(shape), shape)):
                total = total + self._by_shape[shape]
            self._value = total
        return self._value


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """One collective over a whole step, on one device."""

    task: Collective
    block: str
    count: Number
    sent_bytes: Number
    time_s: Number
    exposed_s: Number


@dataclass(frozen=True, kw_only=True)
class ComputeCost:
    """One compute task over a whole step, on one device."""

    task: Compute
    block: str
    count: Number
    time_s: Number
    unit_s: Number
    memory_s: Number
    flops: Number


@dataclass(kw_only=True)
class Price:
    """The time of a step by what it is made of; the five parts add up to `step_time_s`."""

    compute_s: Number
    hbm_bound_s: Number
    exposed_comm_s: Number
    bubble_s: Number
    overhead_s: Number
    flops: Number  # executed by one device in a step, recomputation included
    collectives: list[CollectiveCost] = field(default_factory=list)
    computes: list[ComputeCost] = field(default_factory=list)

    @property
    def step_time_s(self) -> Number:
        """Seconds of one optimizer step."""
        return (
            self.compute_s
            + self.hbm_bound_s
            + self.exposed_comm_s
            + self.bubble_s
            + self.overhead_s
        )


@dataclass(kw_only=True)
class _BlockTime:
    """Seconds of one trip through a block."""

    unit: Total = field(default_factory=Total)
    memory: Total = field(default_factory=Total)
    overhead: Total = field(default_factory=Total)
    exposed: Total = field(default_factory=Total)
    flops: Total = field(default_factory=Total)
    slack_s: Number = 0.0  # time in which the links of the gather group are free

    @property
    def busy_s(self) -> Number:
        """All but what is behind."""
        return self.unit.value + self.memory.value + self.overhead.value + self.exposed.value


def price(machine: Machine, layout: Layout, program: Program, detail: bool = False) -> Price:
    """Return the time of a step; with `detail` also every task's share of it."""
    links = Links(machine, layout)
    pricer = _Pricer(machine, layout, links, program, detail)
    times = {block.name: pricer.block(block) for block in program.blocks}
    parts = {name: Total() for name in ("unit", "memory", "overhead", "exposed", "flops")}
    bubble: Number = 0.0
    for block in program.blocks:
        time = times[block.name]
        for name, total in parts.items():
            total.add(getattr(time, name).value * block.trips)
        if block.name in ("layer forward", "layer backward"):
            bubble = bubble + time.busy_s * block.trips * program.bubble
    return Price(
        compute_s=parts["unit"].value,
        hbm_bound_s=parts["memory"].value,
        exposed_comm_s=parts["exposed"].value,
        bubble_s=bubble,
        overhead_s=parts["overhead"].value,
        flops=parts["flops"].value,
        collectives=pricer.collectives,
        computes=pricer.computes,
    )


def compiled_passes(machine: Machine, layout: Layout) -> dict[str, Number]:
    """Return by kind how often the links carry what is gathered or scattered over `gather`.

    Seen in compiled programs (docs/compiled.md): where the group is a whole slice, the TPU compiler
    makes an all-reduce of a reduce-scatter, and of an all-gather that is not to overlap.
    """
    if machine.chip.op_costs != "compiler":
        return {}
    inside = layout.gather.size / layout.gather.slices
    whole = np.equal(inside, machine.devices_per_slice) & np.greater(inside, 1)
    waiting = whole & np.logical_not(layout.weights_overlap)
    return {"reduce-scatter": np.where(whole, 2, 1), "all-gather": np.where(waiting, 2, 1)}


class _Pricer:
    def __init__(
        self,
        machine: Machine,
        layout: Layout,
        links: Links,
        program: Program,
        detail: bool,
    ) -> None:
        self.machine = machine
        self.chip = machine.chip
        self.layout = layout
        self.links = links
        self.program = program
        self.detail = detail
        self.collectives: list[CollectiveCost] = []
        self.computes: list[ComputeCost] = []
        self.slack_s: Number = 0.0  # of the last backward block
        self.shared = layout.gather.shares_links_with(layout.tensor)
        self.embed = np.equal(layout.residual, EMBED_SHARDED)
        self.compiled = machine.chip.op_costs == "compiler"
        self.passes = compiled_passes(machine, layout)

    def block(self, block: Block) -> _BlockTime:
        """Return one trip's time, and note every task's share of the step."""
        time = _BlockTime()
        whole: dict[str, Number] = {}
        cut: dict[str, Number] = {}
        rings = {name for task in block.collectives() for name in task.partners}
        for work in block.computes():
            if _never(work.count):
                continue
            cost = compute_time(self.chip, work)
            time.unit.add(cost.unit_s * work.count)
            time.memory.add(cost.memory_s * work.count)
            time.overhead.add(cost.overhead_s * work.count)
            time.flops.add(work.flops * work.count)
            if work.name in rings:
                whole[work.name] = cost.total_s * work.count
                part = ring_block(work, self.layout.tensor.size, self.embed)
                cut[work.name] = compute_time(self.chip, part).total_s * work.count
            if self.detail:
                self._note_compute(block, work, cost.total_s, cost.unit_s, cost.memory_s)
        behind = []
        ring_busy = Total()
        for task in block.collectives():
            if _never(task.count):
                continue
            alone = self._passes(task) * collective_s(
                task.kind, self.links[task.role], task.bytes, task.messages, task.stage
            )
            if task.schedule == "behind":
                behind.append((task, alone * task.count))
                continue
            exposed = alone * task.count
            sent: Number | None = None
            if task.schedule == "ring":
                matmul_s = sum(whole.get(name, 0.0) for name in task.partners)
                block_s = sum(cut.get(name, 0.0) for name in task.partners)
                ring = ring_matmul_s(
                    group=self.links[task.role],
                    total_bytes=task.bytes,
                    matmul_s=matmul_s,
                    block_s=block_s,
                    collective_s=alone,
                    mode=self.layout.matmul_overlap,
                )
                # What the blocks take beyond the whole matmuls is not communication, but HBM's.
                blocks_s = np.where(ring.decomposed, self.layout.tensor.size * block_s, matmul_s)
                exposed = (ring.total_s - blocks_s) * task.count
                if self.detail:
                    sent = self._ring_bytes(task, ring)
                    for name in task.partners:
                        blocks = self.layout.tensor.size * cut.get(name, 0.0)
                        more_s = np.where(ring.decomposed, blocks - whole.get(name, 0.0), 0.0)
                        self._lengthen(block, name, more_s * task.count)
                time.memory.add((blocks_s - matmul_s) * task.count)
            if task.role == "tensor":
                ring_busy.add(alone * task.count)
            time.exposed.add(exposed)
            if self.detail:
                self._note(block, task, alone, exposed, sent)
        self._offload(block, time)
        self._behind(block, time, behind, ring_busy.value)
        return time

    def _behind(
        self,
        block: Block,
        time: _BlockTime,
        tasks: list[tuple[Collective, Number]],
        ring_busy_s: Number,
    ) -> None:
        """Expose what does not fit behind the block's own work.

        Weights and gradients share the links of the gather group, so their times add; where the
        tensor axis lies on the same torus axes its traffic comes first.
        """
        window = time.busy_s
        if block.phase == "reduction":
            window = self.slack_s
        taken = self.shared * ring_busy_s if block.phase != "reduction" else 0.0
        for task, alone in tasks:
            switch = getattr(self.layout, task.switch)
            exposed = alone
            if hides := not _never(switch):
                exposed = behind_s(alone, np.maximum(window - taken, 0.0), switch)
                taken = taken + np.where(switch, alone, 0.0)
            if self.compiled and task.kind == "all-gather":
                exposed = np.maximum(exposed, alone * GATHERS_WAITING.get(block.phase, 0.0))
            time.exposed.add(exposed)
            if self.detail:
                self._note(block, task, alone / np.maximum(task.count, 1), exposed)
            if hides and block.phase in ("forward", "backward") and task.role == "gather":
                taken = taken - self._ends(block, task, time, alone - exposed)
        if block.phase == "backward":
            self.slack_s = np.maximum(window - taken, 0.0)

    def _ends(self, block: Block, task: Collective, time: _BlockTime, hidden: Number) -> Number:
        """Expose the first gather and the last scatter of a pass: nothing runs beside them.

        Return what a trip, on average, hides less for it.
        """
        first = block.phase == "forward" and task.kind == "all-gather"
        last = block.phase == "backward" and task.kind == "reduce-scatter"
        if not (first or last):
            return 0.0
        share = hidden * self.layout.microbatches / block.trips
        time.exposed.add(share)
        if self.detail:
            cost = self.collectives[-1]
            more_s = share * block.trips
            self.collectives[-1] = replace(cost, exposed_s=cost.exposed_s + more_s)
        return share

    def _offload(self, block: Block, time: _BlockTime) -> None:
        """Expose what copying kept activations to the host and back takes beyond the block."""
        moved = self.program.offload_bytes
        if np.all(np.equal(moved, 0)) or block.name not in ("layer forward", "layer backward"):
            return
        pcie_bytes_per_s = self.chip.pcie_bytes_per_s
        rate = np.inf if pcie_bytes_per_s is None else pcie_bytes_per_s / self.chip.devices_per_chip
        alone = moved / rate
        exposed = np.maximum(alone - time.busy_s, 0.0)
        time.exposed.add(exposed)
        if self.detail:
            name = "offload activations" if block.phase == "forward" else "fetch activations"
            task = Collective(name=name, kind="host-transfer", role="host", bytes=moved)
            self._note(block, task, alone, exposed)

    def _passes(self, task: Collective) -> Number:
        return self.passes.get(task.kind, 1) if task.role == "gather" else 1

    def _ring_bytes(self, task: Collective, ring: RingTime) -> Number:
        """Return what a member sends if the collective may be a ring beside matmuls."""
        group = self.links[task.role]
        whole = sent_bytes(task.kind, group, task.bytes, task.stage)
        return np.where(ring.decomposed, ring.hops * task.bytes / group.size, whole)

    def _note(
        self,
        block: Block,
        task: Collective,
        alone: Number,
        exposed: Number,
        sent: Number | None = None,
    ) -> None:
        count = task.count * block.trips
        group = self.links.get(task.role)
        if group is None:
            sent = task.bytes
        elif sent is None:
            sent = sent_bytes(task.kind, group, task.bytes, task.stage)
        self.collectives.append(
            CollectiveCost(
                task=task,
                block=block.name,
                count=count,
                sent_bytes=sent * count * self._passes(task),
                time_s=alone * count,
                exposed_s=exposed * block.trips,
            )
        )

    def _note_compute(
        self, block: Block, task: Compute, time_s: Number, unit_s: Number, memory_s: Number
    ) -> None:
        count = task.count * block.trips
        self.computes.append(
            ComputeCost(
                task=task,
                block=block.name,
                count=count,
                time_s=time_s * count,
                unit_s=unit_s * count,
                memory_s=memory_s * count,
                flops=task.flops * count,
            )
        )

    def _lengthen(self, block: Block, name: str, more_s: Number) -> None:
        """Add to a noted task, once a trip, what its blocks in a ring wait for HBM beyond it."""
        for index, cost in enumerate(self.computes):
            if cost.block == block.name and cost.task.name == name:
                step_s = more_s * block.trips
                self.computes[index] = replace(
                    cost, time_s=cost.time_s + step_s, memory_s=cost.memory_s + step_s
                )


def _never(count: Number) -> bool:
    """Return whether a task runs, or a switch is on, in none of the plans."""
    return not np.any(count)
