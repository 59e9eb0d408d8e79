"""Compiled train steps, replayed."""

from __future__ import annotations

from dataclasses import replace

import hlo_samples as samples
import pytest

from shardsim.errors import PlanError
from shardsim.model import model_flops_per_token
from shardsim.plan.resolve import resolve
from shardsim.xla.replay import replay

NAMES = tuple(samples.DATA)


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up(name: str) -> None:
    plan, compiled = samples.plan_of(name), samples.compiled(name)
    result = replay(plan.machine, plan, compiled)
    assert sum(result.time.values()) == pytest.approx(result.step_time_s, rel=1e-12)
    assert sum(block.time_s for block in result.blocks) == pytest.approx(result.step_time_s)
    exposed = sum(cost.exposed_s for cost in result.collective_costs)
    assert exposed == pytest.approx(result.time["exposed_comm_s"])
    assert sum(use.exposed_s for use in result.collectives) == pytest.approx(exposed)
    assert sum(use.count for use in result.collectives) == sum(
        entry.count for entry in compiled.collectives
    )
    clock = plan.machine.chip.clock_hz
    kernels_s = sum(cost.unit_s for cost in result.computes if "splash" in cost.task.name)
    assert (kernels_s > 0) == (name in ("llama-splash", "llama-sparsecore"))
    assert result.time["compute_s"] == pytest.approx(compiled.cycles / clock + kernels_s)


@pytest.mark.parametrize("name", NAMES)
def test_mfu_counts_the_models_flops(name: str) -> None:
    plan = samples.plan_of(name)
    result = replay(plan.machine, plan, samples.compiled(name))
    flops = model_flops_per_token(plan.model, plan.sequence) * plan.tokens / plan.machine.chips
    peak = plan.machine.chip.peak("bf16")
    assert result.mfu == pytest.approx(flops / peak / result.step_time_s)
    devices = plan.machine.chip.devices_per_chip  # the peak is that of a chip
    executed = samples.compiled(name).flops * devices / peak / result.step_time_s
    assert result.hfu == pytest.approx(executed)


def test_a_layout_will_do() -> None:
    plan, compiled = samples.plan_of("vit-explicit"), samples.compiled("vit-explicit")
    by_plan = replay(plan.machine, plan, compiled)
    by_layout = replay(plan.machine, resolve(plan), compiled)
    assert by_layout.step_time_s == by_plan.step_time_s
    assert by_layout.mfu is None


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_no_shorter_on_slower_links(name: str) -> None:
    plan, compiled = samples.plan_of(name), samples.compiled(name)
    times = []
    for rate in (1.0, 0.3, 0.1, 0.01):
        chip = replace(
            plan.machine.chip, link_bytes_per_s=plan.machine.chip.link_bytes_per_s * rate
        )
        times.append(replay(replace(plan.machine, chip=chip), plan, compiled))
    steps = [result.step_time_s for result in times]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]
    assert len({result.time["compute_s"] for result in times}) == 1


def test_what_is_hidden_is_no_more_than_the_work_beside_it() -> None:
    plan, compiled = samples.plan_of("llama-microbatches"), samples.compiled("llama-microbatches")
    result = replay(plan.machine, plan, compiled)
    alone = sum(cost.time_s for cost in result.collective_costs)
    hidden = alone - result.time["exposed_comm_s"]
    assert 0 < hidden < result.step_time_s - result.time["exposed_comm_s"]
    waiting = {cost.task.name: cost for cost in result.collective_costs}
    for entry in compiled.collectives:
        cost = waiting[entry.name]
        if not entry.asynchronous:
            assert cost.exposed_s >= cost.time_s * (1 - 1e-9)


def test_another_mesh_is_refused() -> None:
    plan = samples.plan_of("vit-explicit")
    with pytest.raises(PlanError, match="the plan's mesh is"):
        replay(plan.machine, plan, samples.compiled("llama-partitioned"))


def test_a_clock_that_is_not_published_is_said() -> None:
    plan, compiled = samples.plan_of("vit-explicit"), samples.compiled("vit-explicit")
    assert replay(plan.machine, plan, compiled).warnings == ()
    figures = dict(plan.machine.chip.figures) | {"clock_hz": {"status": "recalled"}}
    machine = replace(plan.machine, chip=replace(plan.machine.chip, figures=figures))
    (warning,) = replay(machine, plan, compiled).warnings
    assert "1.05e+09 Hz, is recalled" in warning
