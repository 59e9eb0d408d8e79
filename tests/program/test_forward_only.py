"""Inference: one forward pass, of which nothing is kept, split by heads or by layers."""

from __future__ import annotations

from typing import Any

import pytest

from shardsim.cost.predict import predict
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, load_plan, plan_from_data, resolve
from shardsim.plan.io import plan_to_data
from shardsim.planner.changes import changed
from shardsim.program.partition import partition
from shardsim.program.shapes import Workload
from shardsim.simulate import simulate_plan

SMALL = ("ed-vit-whole", "ed-vit-part", "ed-vit-by-heads", "ed-vit-by-layers")


def flops(plan: Plan, kinds: tuple[str, ...] = ("matmul", "attention")) -> float:
    program = partition(Workload.of(plan), resolve(plan))
    return sum(
        float(task.flops * task.count * block.trips)
        for block in program.blocks
        for task in block.computes()
        if task.kind in kinds
    )


def test_a_forward_pass_is_a_third_of_training_and_keeps_nothing() -> None:
    plan = load_plan("llama2-70b-published-v6e-1x256")
    plan = changed(plan, {"remat": "none", "attention": "unfused"})
    forward = changed(plan, {"forward_only": True})
    assert flops(forward) == pytest.approx(flops(plan) / 3, rel=2e-3)
    item, trained = predict(forward), predict(plan)
    for part in ("optimizer_bytes", "gradients_bytes", "activations_bytes"):
        assert item.hbm[part] == 0
    assert item.hbm["parameters_bytes"] == trained.hbm["parameters_bytes"]
    assert item.hbm["parameters_bytes"] < item.hbm["peak_bytes"] < trained.hbm["peak_bytes"]
    assert item.peak_moment in ("layers", "output head")
    assert item.hfu == pytest.approx(
        flops(forward) / item.step_time_s / plan.machine.chip.peak("bf16"), rel=1e-6
    )
    # No gradient is reduced, and weights are gathered once.
    assert {use.kind for use in item.collectives} == {"all-gather"}
    assert plan_from_data(plan_to_data(forward), "again") == forward


@pytest.mark.parametrize("name", ["ed-vit-whole", "ed-vit-part", "ed-vit-by-heads"])
def test_events_agree_where_nothing_contends(name: str) -> None:
    plan = load_plan(name)
    assert simulate_plan(plan).step_time_s == pytest.approx(predict(plan).step_time_s, rel=5e-3)


def test_small_devices_by_heads_by_layers_and_by_parts() -> None:
    whole, part, heads, layers = (predict(name) for name in SMALL)
    devices = heads.plan.machine.devices
    assert flops(heads.plan, ("matmul",)) == pytest.approx(
        flops(whole.plan, ("matmul",)) / devices,
        rel=0.03,  # all embed patches
    )
    # One image goes through all stages in turn: no faster, a quarter of the memory each.
    assert layers.step_time_s > whole.step_time_s
    assert layers.hbm["parameters_bytes"] < 0.35 * whole.hbm["parameters_bytes"]
    # By heads the network carries two sums a layer; a part of its own carries nothing.
    sums = next(use for use in heads.collectives if use.kind == "all-reduce")
    assert sums.count == 2 * heads.plan.model.layers
    assert part.step_time_s < heads.step_time_s < whole.step_time_s
    slower: dict[str, Any] = {"chip.link_bytes_per_s": 12e6}
    assert predict(changed(heads.plan, slower)).step_time_s > 2 * heads.step_time_s


def test_a_forward_pass_is_not_exported() -> None:
    with pytest.raises(PlanError, match=r"forward_only: export of True is not supported"):
        plan_data(load_plan("ed-vit-whole"))
