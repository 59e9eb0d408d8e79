"""A compiled program as the rest of shardsim reads it: a Schedule, and what is beyond a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardsim.program.schedule import Schedule
from shardsim.xla.hlo.between import Part
from shardsim.xla.hlo.check import check_module
from shardsim.xla.hlo.collect import CompiledCollective
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.kernels import UNKNOWN, Masks
from shardsim.xla.hlo.module import Module
from shardsim.xla.hlo.operations import Operation
from shardsim.xla.hlo.steps import Steps
from shardsim.xla.hlo.text import parse_module


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What one device does in one run of a compiled module."""

    mesh: dict[str, int]
    schedule: Schedule = field(repr=False)
    collectives: tuple[CompiledCollective, ...] = field(repr=False)
    operations: tuple[Operation, ...] = field(repr=False)
    module: Module = field(repr=False)

    @property
    def copies(self) -> tuple[Operation, ...]:
        """Operations that only lay an array out anew, those with the most cycles first."""
        found = [item for item in self.operations if item.kind == "copy"]
        return tuple(sorted(found, key=lambda item: -(item.cycles or 0) * item.trips))

    @cached_property
    def flops(self) -> float:
        """FLOPs of all matmuls, recomputed ones too."""
        return sum(item.flops * item.trips for item in self.operations)

    @cached_property
    def matmul_flops(self) -> float:
        """FLOPs of matmuls without those inside attention."""
        return sum(i.flops * i.trips for i in self.operations if i.kind == "matmul")

    @cached_property
    def cycles(self) -> int:
        """Cycles of the compute stream, as the compiler estimates them."""
        return sum((item.cycles or 0) * item.trips for item in self.operations)


def read_hlo(
    text: str,
    mesh: Mapping[str, int],
    causal: bool | None = None,
    windows: Iterable[int] = (),
    striped: bool = False,
    pieces: bool = False,
    chunked: bool = False,
) -> CompiledProgram:
    """Read the scheduled HLO `text` of a program compiled for `mesh` (axis: size, major to minor).

    HLO leaves out the numbers of large constants, among them the masks of attention kernels:
    `causal` says whether those are causal (True) or whole (False). If it is None such a kernel
    counts as whole, with a warning. Causal ones may see only the last tokens, one of `windows`, or
    `chunked` those of such a chunk. `striped`: of a sequence that devices share each has an early
    part and a late one. `pieces`: keys pass round, and kernels attend to those that come.

    Raises `HloError`, with the line, for text that is damaged or not understood.
    """
    each = tuple(sorted(set(windows) - {0}))
    masks = Masks(causal=causal, windows=each, striped=striped, pieces=pieces, chunked=chunked)
    return read_module(parse_module(text), mesh, masks)


def read_module(
    module: Module, mesh: Mapping[str, int], masks: Masks = UNKNOWN, slices: Sequence[Part] = ()
) -> CompiledProgram:
    """Read a parsed module, as `read_hlo` does.

    A program of several slices is that of one: `mesh` has the sizes inside a slice, and `slices`
    what its axes have of them (axis, members, devices between them).
    """
    if not module.is_scheduled:
        raise HloError("the module is not scheduled: its lines are not in the order of execution")
    devices = math.prod(mesh.values())
    if module.partitions not in (None, devices):
        raise HloError(f"compiled for {module.partitions} devices, but the mesh has {devices}")
    check_module(module, mesh)
    steps = Steps(module, dict(mesh), masks, tuple(slices))
    schedule = Schedule(
        blocks=tuple(steps.blocks), order=tuple(steps.order), warnings=tuple(steps.warnings)
    )
    return CompiledProgram(
        mesh=dict(mesh),
        schedule=schedule,
        collectives=tuple(steps.collectives),
        operations=tuple(steps.operations),
        module=module,
    )
