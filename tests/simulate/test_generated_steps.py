"""Events of generated plans: the closed form wherever nothing contends."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
from building import MODELS, VIDEO, is_legal, plans, quiet
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from staged import staged

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.plan import Plan, Precision, Remat, plan_from_data, resolve
from shardsim.plan.lengths import Lengths
from shardsim.simulate import simulate_plan

# Permutes stop all work on the larger v5e.
MACHINES = ("v4:2x2x4", "v4:4x4x4", "v5p:2x2x4", "v5e:4x4", "v5e:4x8", "2*v4:2x2x4")


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


MODEL: dict[str, Any] = {
    **{"name": "small", "family": "decoder", "layers": 2, "embed": 512, "mlp": 1024, "vocab": 512},
    **{"heads": 16, "kv_heads": 16, "head_dim": 64, "causal": True},
}

# What else a plan may be told, one at a time.
TECHNIQUES: tuple[dict[str, Any], ...] = (
    {"accumulation": "gathered"},
    {"accumulation": "scattered"},
    {"accumulation": "layered"},
    {"remat": Remat.of(save=frozenset(), offload=frozenset({"qkv", "layer_input"}))},
    {"offload_optimizer": True},
    {"offload_parameters": True},
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
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


@pytest.mark.parametrize(
    ("machine", "mesh", "taken"),
    [
        ("v4:4x4x4", ("c", "d"), {"x": 2, "y": 2, "z": 2}),  # every other device of each axis
        ("v4:2x2x4", ("c", "d"), {"x": 2, "y": 2, "z": 2}),
        ("v5e:4x8", ("c", "d"), {"x": 4, "y": 4}),
        ("v5e:4x8", ("c", "d"), {"x": 2, "y": 8}),
    ],
)
def test_a_ring_over_members_that_are_not_neighbours_closes_as_it_goes_on(
    machine: str, mesh: tuple[str, str], taken: dict[str, int]
) -> None:
    """Of several axes of the torus its last hop is one along an axis, as the others are."""
    names = machine.partition(":")[2].split("x")
    left = {axis: int(n) // taken.get(axis, 1) for axis, n in zip("xyz", names, strict=False)}
    axes = {"c": taken, "d": {axis: n for axis, n in left.items() if n > 1}}
    data = {
        "model": {**MODEL, "sequence": 4096},
        "machine": machine,
        "batch": prod(left.values()),
        "mesh": {name: {"size": prod(axes[name].values()), "torus": axes[name]} for name in mesh},
        "rules": {"parameters": {}, "activations": {"batch": ["d"], "seq": ["c"]}},
        "context": {"keys": "ring"},
        "overlap": {"gradients": False, "weights": False},
        "attention": "flash",
    }
    found = simulate_plan(plan_from_data(data, "a ring"), costs="physical")
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=1e-4)


@given(staged(), st.sampled_from(["physical", "compiler"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_events_of_stages_agree_with_the_closed_form(plan: Plan, costs: str) -> None:
    """Also beside other axes over slices, and of forward passes."""
    quiet(plan, costs)
    found = simulate_plan(plan, costs=costs)
    assume(not found.events.contention)
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


@given(
    st.sampled_from([(8, 0), (0, 8), (7, 1)]),
    st.sampled_from([{"d": 8}, {"f": 8}, {"d": 2, "f": 4}]),
    st.sampled_from(["forward", "1f1b", "zb-h1"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_a_head_without_layers_beside_it_waits_for_its_tables(
    layers: tuple[int, int], inside: dict[str, int], schedule: str, weights: bool, gradients: bool
) -> None:
    """In a vocabulary as large as this one the head's stage is the one that others wait for."""
    data = {
        "model": {**MODEL, "layers": 8, "vocab": 65536, "sequence": 512},
        "machine": "v5p:2x2x4",
        "batch": 128,
        "mesh": {"p": 2, **inside},
        "rules": {
            "parameters": {"layers": ["p"], "embed": ["f"] if "f" in inside else []},
            "activations": {"batch": [*inside]},
        },
        "stage_layers": [*layers],
        "microbatches": 4,
        "forward_only": schedule == "forward",
        "pipeline_schedule": "1f1b" if schedule == "forward" else schedule,
        "overlap": {"weights": weights, "gradients": gradients},
    }
    found = simulate_plan(plan_from_data(data, "the head alone"))
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


@given(st.one_of(staged(), plans(models=MODELS, machines=MACHINES)))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_events_count_the_collectives_that_are_planned(plan: Plan) -> None:
    """What crosses no link is none; of stages that are alike the one with the head is shown."""
    assume(not plan.stage_layers)
    plan = replace(plan, model=replace(plan.model, layers=min(plan.model.layers, 8)))
    found, said = simulate_plan(plan, costs="physical"), predict(plan, costs="physical")
    counts = {(use.kind, use.mesh_axes, use.purpose): use.count for use in found.collectives}
    assert counts == pytest.approx(
        {(use.kind, use.mesh_axes, use.purpose): use.count for use in said.collectives}
    )


@given(staged(forward_only=False), st.permutations(range(4)))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_step_is_made_of_the_same_however_layers_are_dealt(plan: Plan, order: list[int]) -> None:
    """Where stages differ, the step's parts and its operations are those of all on average."""
    layers = plan.stage_layers
    assume(layers)
    dealt = tuple(layers[number] for number in order if number < len(layers))
    one, other = (predict(replace(plan, stage_layers=each)) for each in (layers, dealt))
    for part in ("compute_s", "hbm_bound_s"):
        assert one.time[part] == pytest.approx(other.time[part])
    for item in (one, other):
        assert sum(item.time.values()) == pytest.approx(item.step_time_s)
        assert item.time["bubble_s"] > -1e-9
        assert sum(cost.flops for cost in item.price.computes) == pytest.approx(item.price.flops)
    assert one.hfu * one.step_time_s == pytest.approx(other.hfu * other.step_time_s)
