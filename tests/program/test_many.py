"""A layout of many plans is each of them alone, whatever an implementation makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from building import build, decoder

from shardsim.plan import resolve
from shardsim.plan.layout import ROLES, AxisLayout, Layout
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import IMPLEMENTATIONS, implemented
from shardsim.program.schedule import Move, Work
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Program

# Plans of one kind: they store arrays alike, but for sizes. Causal, and longer than a block of the
# fused kernel, which then skips some.
MESHES: tuple[dict[str, dict[str, int]], ...] = (
    {"fsdp": {"x": 4, "y": 4}},
    {"context": {"x": 4}, "fsdp": {"y": 4}},
    {"fsdp": {"x": 4}, "tensor": {"y": 4}},
    {"fsdp": {"x": 4}, "tensor": {"y": 2}, "data": {"y": 2}},
    {"context": {"x": 2}, "fsdp": {"x": 2}, "tensor": {"y": 4}},
    {"pipeline": {"x": 4}, "data": {"y": 4}},
)


def stacked(layouts: list[Layout]) -> Layout:
    """Return layouts that differ in their axes as one."""

    def together(parts: list[AxisLayout]) -> AxisLayout:
        return AxisLayout(
            factors=tuple(
                np.array(factors) for factors in zip(*(p.factors for p in parts), strict=True)
            ),
            strides=tuple(
                np.array(strides) for strides in zip(*(p.strides for p in parts), strict=True)
            ),
            slices=np.array([part.slices for part in parts]),
        )

    axes: dict[str, Any] = {role: together([one.role(role) for one in layouts]) for role in ROLES}
    striped = np.array([one.striped for one in layouts])
    return layouts[0].reshaped(**axes, names={}, striped=striped)


def sums_of_runs(program: Program, layout: Layout) -> dict[tuple[str, str, str], Any]:
    """Return the FLOPs and the moved bytes of all that a step runs, in its Schedule's order."""
    flops: Any = 0.0
    moved: Any = 0.0
    for _, task, times in overlap(program, layout).runs():
        if isinstance(task, Work):
            flops = flops + task.flops * task.count * times
        elif isinstance(task, Move):
            moved = moved + task.bytes * task.count * times
    return {("step", "", "flops"): flops, ("step", "", "bytes"): moved}


def figures(program: Program) -> dict[tuple[str, str, str], Any]:
    """Return what tasks of each kind come to in a step, by block and figure."""
    found: dict[tuple[str, str, str], Any] = {}
    for block in program.blocks:
        for task in block.computes():
            for figure, value in (
                ("hbm_bytes", task.hbm_bytes),
                ("vector_ops", task.vector_ops),
                ("flops", task.flops),
            ):
                key = block.phase, task.kind, figure
                found[key] = found.get(key, 0.0) + value * task.count * block.trips
        for move in block.collectives():
            key = block.phase, f"{move.kind} over {move.role}", "bytes"
            found[key] = found.get(key, 0.0) + move.bytes * move.count * block.trips
    return found


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("residual", ["", "seq", "embed"])
def test_many_plans_are_each_alone(name: str, residual: str) -> None:
    model = decoder(sequence=2048)
    options: dict[str, Any] = {"microbatches": 4, "pipeline_interleave": 2}
    plans = [build(model, "v5e:4x4", 64, where, residual=residual, **options) for where in MESHES]
    layouts = [resolve(plan) for plan in plans]
    work, machine = Workload.of(plans[0]), plans[0].machine

    def made(layout: Layout) -> dict[tuple[str, str, str], Any]:
        program = implemented(partition(work, layout), name, machine, layout)
        return figures(program) | sums_of_runs(program, layout)

    alone = [made(one.reshaped(residual=layouts[2].residual)) for one in layouts]
    together = made(stacked([one.reshaped(residual=layouts[2].residual) for one in layouts]))
    for key, value in together.items():
        expected = [float(one.get(key, 0.0)) for one in alone]
        assert np.broadcast_to(value, len(MESHES)) == pytest.approx(expected, rel=1e-12), key
    assert all(set(one) <= set(together) for one in alone)
