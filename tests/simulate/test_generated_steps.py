"""Events of generated plans: the closed form wherever nothing contends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from building import MODELS, VIDEO, is_legal, plans, quiet
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from staged import staged

from shardsim.errors import PlanError
from shardsim.plan import Plan, Precision, Remat, resolve
from shardsim.plan.lengths import Lengths
from shardsim.plan.plan import TICKS
from shardsim.simulate import simulate_plan

# Permutes stop all work on the larger v5e.
MACHINES = ("v4:2x2x4", "v4:4x4x4", "v5e:4x4", "v5e:4x8", "2*v4:2x2x4")


@given(
    plans(models=(*MODELS, VIDEO, VIDEO), machines=MACHINES),
    st.sampled_from(["physical", "compiler"]),
)
# Most meshes let two groups share an axis, where the levels may differ.
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_events_agree_with_the_closed_form(plan: Plan, costs: str) -> None:
    assume(int(resolve(plan).pipeline.size) == 1)
    plan = replace(plan, model=replace(plan.model, layers=min(plan.model.layers, 4)))
    quiet(plan, costs)
    found = simulate_plan(plan, costs=costs)
    assert all(row.collective == row.other for row in found.events.contention)  # other groups of it
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)
    for mine in found.collectives:
        assert mine.exposed_s <= mine.time_s * (1 + 1e-9) + 1e-12


# What else a plan may be told, one at a time.
TECHNIQUES: tuple[dict[str, Any], ...] = (
    {"accumulation": "gathered"},
    {"accumulation": "scattered"},
    {"accumulation": "layered"},
    {"remat": Remat.of(save=frozenset(), offload=frozenset({"qkv", "layer_input"}))},
    {"offload_optimizer": True},
    {"forward_only": True},
    {"lengths": Lengths(held="packed", distribution="uniform", least=32, most=256)},
    {"lengths": Lengths(held="unpadded", distribution="uniform", least=32, most=256)},
    {"precision": Precision(weights="int8", compute="int8")},
    {"vocab_tiles": 2},
)


@given(plans(models=(*MODELS, VIDEO), machines=MACHINES), st.sampled_from(TECHNIQUES))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_events_of_techniques_agree_with_the_closed_form(plan: Plan, more: dict[str, Any]) -> None:
    assume(int(resolve(plan).pipeline.size) == 1)
    plan = replace(plan, model=replace(plan.model, layers=min(plan.model.layers, 4)))
    try:
        plan = replace(plan, **more)
    except PlanError:
        assume(False)
    assume(is_legal(plan))
    quiet(plan, "physical")
    found = simulate_plan(plan, costs="physical")
    assume(not found.events.contention)
    # Each turn of a ring takes as long as to the farthest neighbour; pieces pass near ones as well.
    turns = plan.model.layers * int(resolve(plan).context.size) * (plan.context.keys == "ring")
    least_s = (1 - 0.005) * found.events.analytic_step_time_s - 3 * turns * chip_hop_s(plan)
    assert least_s <= found.step_time_s <= 1.005 * found.events.analytic_step_time_s


def chip_hop_s(plan: Plan) -> float:
    """Return the seconds of a hop between neighbours of the torus."""
    return plan.machine.chip.hop_latency_s


@given(staged(), st.sampled_from(["physical", "compiler"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_events_of_stages_agree_with_the_closed_form(plan: Plan, costs: str) -> None:
    """Also beside other axes over slices, and of forward passes; a first stage in ticks sends one
    message before its tick begins."""
    quiet(plan, costs)
    found = simulate_plan(plan, costs=costs)
    assume(not found.events.contention)
    closed_s = found.events.analytic_step_time_s
    sends = [use for use in found.collectives if use.mesh_axes == ("p",) and use.kind == "permute"]
    ticks = plan.pipeline_schedule in TICKS
    one_s = sum(use.time_s / use.count for use in sends) if ticks else 0.0
    assert found.step_time_s == pytest.approx(closed_s, rel=0.005, abs=one_s)
