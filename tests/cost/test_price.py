"""Laws that every price obeys, over plans of all kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from building import NAMES, build, decoder, plans, renamed, vit
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.collectives import move_s
from shardsim.cost.costs import costs_of
from shardsim.cost.network import Links
from shardsim.cost.predict import TIME_PARTS, Prediction, predict
from shardsim.cost.price import step_time_s
from shardsim.cost.sensitivity import sensitivity
from shardsim.machine import override_chip
from shardsim.plan import Overlap, Plan, resolve
from shardsim.program.schedule import Await, Block, Move, Schedule, Start

FASTER = (
    *("peak_flops.bf16", "vector_flops", "hbm_bytes_per_s", "link_bytes_per_s", "dcn_bytes_per_s"),
    *("matmul_efficiency", "hbm_efficiency", "link_efficiency", "dcn_efficiency"),
)
SHORTER = ("hop_latency_s", "dcn_hop_latency_s", "op_overhead_s", "collective_overhead_s")


def figures(prediction: Prediction) -> dict[str, Any]:
    """Return all numbers of a prediction, without names of axes."""
    data = prediction.to_data()
    for use in data["collectives"]:
        use.pop("mesh_axes")
    for key in ("limited_by", "warnings"):
        data.pop(key)
    return data


def with_figures(plan: Plan, changes: Mapping[str, float]) -> Plan:
    machine = plan.machine
    return replace(plan, machine=replace(machine, chip=override_chip(machine.chip, changes)))


@given(plans())
@settings(max_examples=120)
def test_the_parts_of_a_step_add_up(plan):
    prediction = predict(plan)
    parts = prediction.time
    assert set(parts) == set(TIME_PARTS)
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(prediction.step_time_s, rel=1e-12)
    # Exposed communication is that of the collectives, one by one.
    exposed = sum(use.exposed_s for use in prediction.collectives)
    assert exposed == pytest.approx(parts["exposed_comm_s"], rel=1e-9, abs=1e-15)
    assert 0 < prediction.hfu < 1
    stages = next((axis.size for axis in plan.mesh if axis.name == "p"), 1)
    if stages == 1:
        assert parts["bubble_s"] == 0


@given(plans(), st.sampled_from(FASTER), st.floats(1.01, 50.0))
@settings(max_examples=120)
def test_faster_parts_never_slow_the_step(plan, figure, times):
    chip = plan.machine.chip
    key = figure.partition(".")[2]
    before = chip.peak_flops[key] if key else getattr(chip, figure)
    after = before * times
    if figure.endswith("efficiency"):
        after = min(1.0, after)
    faster = predict(with_figures(plan, {figure: after}))
    assert faster.step_time_s <= predict(plan).step_time_s * (1 + 1e-12)


@given(plans(), st.sampled_from(SHORTER), st.floats(0.0, 0.99))
@settings(max_examples=120)
def test_shorter_latencies_never_slow_the_step(plan, figure, times):
    chip = plan.machine.chip
    shorter = predict(with_figures(plan, {figure: getattr(chip, figure) * times}))
    assert shorter.step_time_s <= predict(plan).step_time_s * (1 + 1e-12)


@given(plans())
def test_prefetching_weights_never_slows_the_step(plan):
    # The search relies on it.
    on, off = (
        replace(plan, overlap=replace(plan.overlap, weights=value)) for value in (True, False)
    )
    assert predict(on).step_time_s <= predict(off).step_time_s * (1 + 1e-12)


@given(plans())
def test_hiding_gradients_never_slows_the_step(plan):
    on, off = (
        replace(plan, overlap=replace(plan.overlap, gradients=value, dcn=value))
        for value in (True, False)
    )
    assert predict(on).step_time_s <= predict(off).step_time_s * (1 + 1e-12)


WORDS = st.from_regex(r"[a-z][a-z_0-9]{0,12}", fullmatch=True)


@given(plans(), st.lists(WORDS, min_size=len(NAMES), max_size=len(NAMES), unique=True))
def test_names_of_axes_cost_nothing(plan, words):
    other = renamed(plan, dict(zip(NAMES.values(), words, strict=True)))
    assert figures(predict(other)) == figures(predict(plan))


@given(plans(), st.randoms(use_true_random=False))
def test_the_order_of_keys_costs_nothing(plan, random):
    def shuffled(data: Mapping[str, Any]) -> dict[str, Any]:
        keys = list(data)
        random.shuffle(keys)
        return {key: data[key] for key in keys}

    other = replace(
        plan,
        mesh=tuple(replace(axis, torus=shuffled(axis.torus)) for axis in plan.mesh),
        parameters=shuffled(plan.parameters),
        activations=shuffled(plan.activations),
    )
    assert predict(other).to_data() == predict(plan).to_data()


@given(plans())
def test_predicting_twice_gives_the_same(plan):
    assert predict(plan).to_data() == predict(plan).to_data()


@pytest.mark.parametrize("slices", [2, 3, 4])
@pytest.mark.parametrize("fsdp", [{"x": 4, "y": 4}, {"x": 4}])
@pytest.mark.parametrize("over_data", [False, True])
def test_more_slices_of_data_parallelism_add_only_their_reduction(slices, fsdp, over_data):
    where: dict[str, dict[str, int]] = {"fsdp": fsdp}
    if "y" not in fsdp:
        where["tensor"] = {"y": 4}
    overlap = Overlap(gradients=False)
    model = decoder(embed=1536)  # three slices divide it too
    one = build(model, "v5e:4x4", 64, where, overlap=overlap)
    many = build(
        model,
        f"{slices}*v5e:4x4",
        64 * slices,
        {"data": {"dcn": slices}} | where,
        overlap=overlap,
        over_data=over_data,
    )
    before, after = predict(one), predict(many)
    purposes = ("gradient reduction", "updated parameters", "small gradients")
    totals = [
        sum(cost.exposed_s for cost in item.price.collectives if cost.task.purpose in purposes)
        for item in (before, after)
    ]
    reduction = float(totals[1] - totals[0])
    assert reduction > 0
    less_update = 0.0
    if over_data:
        # Each slice updates its part of the state.
        updates = [
            next(cost for cost in item.price.computes if cost.block == "update").time_s
            for item in (before, after)
        ]
        less_update = float(updates[0]) - float(updates[1])
        assert less_update > 0
    else:
        assert after.hbm == before.hbm
        assert after.time["compute_s"] == before.time["compute_s"]
    added = after.step_time_s - before.step_time_s
    assert added == pytest.approx(reduction - less_update, rel=1e-9)


def test_an_open_axis_costs_twice_a_ring():
    # v5e closes an axis of 16 only; the same gathers over 8 x 16 and over 16 x 8.
    model = vit(layers=4)
    options: dict[str, Any] = {"remat": "none"}
    long = build(model, "v5e:8x16", 256, {"data": {"x": 8}, "fsdp": {"y": 16}}, **options)
    chip = override_chip(long.machine.chip, {"hop_latency_s": 0.0, "collective_overhead_s": 0.0})
    closed = replace(long, machine=replace(long.machine, chip=chip))
    times = {}
    for name, plan in (("closed", closed), ("half", _on_half(closed))):
        use = next(use for use in predict(plan).collectives if use.kind == "all-gather")
        times[name] = use.time_s / use.bytes_per_chip
    assert times["half"] == pytest.approx(2 * times["closed"], rel=1e-12)


def _on_half(plan: Plan) -> Plan:
    """Return the plan with its parameters sharded over half of the closed axis."""
    data, fsdp = plan.mesh
    return replace(
        plan,
        mesh=(
            replace(data, size=16, torus={"x": 8, "y": 2}),
            replace(fsdp, size=8, torus={"y": 8}),
        ),
    )


@given(st.integers(1, 6))
def test_layers_add_up(layers):
    # Nothing is shared between layers: the time of L layers is linear in L.
    times = [
        predict(build(decoder(layers=count), "v4:1x1x1", 2, {"data": {}}, remat="full")).step_time_s
        for count in (layers, layers + 1, layers + 2)
    ]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0], rel=1e-9)


@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_collectives_are_counted_over_the_whole_step(layers, microbatches):
    # Weights of a layer are gathered for each pass and its gradients scattered once, together; so
    # are those of embedding and head, which are gathered once. Vectors are summed at the end.
    where = {"fsdp": {"x": 4}, "tensor": {"y": 4}}
    plan = build(decoder(layers=layers), "v5e:4x4", 64, where, microbatches=microbatches)
    found = {use.kind: use.count for use in predict(plan).collectives if "f" in use.mesh_axes}
    assert found == {
        "all-gather": (2 * layers + 1) * microbatches,
        "reduce-scatter": (layers + 1) * microbatches,
        "all-reduce": 1,
    }


@pytest.mark.parametrize("shared", [False, True])
def test_weights_wait_for_the_tensor_axis_where_they_share_links(shared):
    # 4 x 2 devices for the weights, 2 for the tensor axis, on the same axis or on another.
    where = (
        {"fsdp": {"x": 4, "y": 2}, "tensor": {"y": 2}}
        if shared
        else {"fsdp": {"x": 4}, "tensor": {"y": 4}}
    )
    plan = build(decoder(sequence=64), "v5e:4x4", 8, where, overlap=Overlap(matmul="off"))
    slow = with_figures(plan, {"link_bytes_per_s": 2e9})
    detail = predict(slow).price
    layers = 8
    work_s = sum(float(c.time_s) for c in detail.computes if c.block == "layer forward") / layers
    tensor_s = weights_s = exposed_s = 0.0
    for cost in detail.collectives:
        if cost.block == "layer forward" and cost.task.role == "tensor":
            tensor_s += float(cost.time_s) / layers
        if cost.task.name == "gather weights forward":
            weights_s, exposed_s = float(cost.time_s) / layers, float(cost.exposed_s) / layers
    assert tensor_s > 0
    free_s = work_s + tensor_s - (tensor_s if shared else 0.0)
    assert free_s < weights_s  # something is left over
    left_s = weights_s - free_s
    # The first layer's gather has nothing to hide behind.
    expected = left_s + (weights_s - left_s) / layers
    assert exposed_s == pytest.approx(expected, rel=1e-9)


def test_a_move_in_turn_delays_what_shares_its_links():
    # The tensor axis is a part of y, weights go over x and y. Behind the start of a gather over
    # tensor and another of weights, one more over tensor goes before the weights on the links of
    # both: all three pass one after the other.
    where = {"fsdp": {"x": 4, "y": 2}, "tensor": {"y": 2}}
    plan = build(decoder(), "v5e:4x4", 8, where)
    layout, chip = resolve(plan), plan.machine.chip
    first, weights, second = (
        Move(name=name, kind="all-gather", role=role, bytes=size)
        for name, role, size in (("a", "tensor", 1e7), ("b", "fsdp", 9e7), ("c", "tensor", 3e7))
    )
    tasks = (Start(task=first), Start(task=weights), second, Await(name="a"), Await(name="b"))
    block = Block(name="block", phase="forward", trips=1, tasks=tasks)
    took_s = step_time_s(
        plan.machine, layout, Schedule(blocks=(block,), order=(0,)), costs_of("physical", chip)
    )
    links = Links(plan.machine, layout)
    alone = [float(move_s(links[move.role], move)) for move in (first, weights, second)]
    assert float(took_s) == pytest.approx(sum(alone), rel=1e-9)


def test_what_is_started_on_the_same_links_queues():
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": {"x": 4, "y": 4}})
    layout, chip = resolve(plan), plan.machine.chip
    moves = [
        Move(name=n, kind="all-gather", role="fsdp", bytes=s) for n, s in (("a", 4e7), ("b", 9e7))
    ]
    tasks = (*(Start(task=move) for move in moves), *(Await(name=move.name) for move in moves))
    schedule = Schedule(
        blocks=(Block(name="block", phase="forward", trips=1, tasks=tasks),), order=(0,)
    )
    took_s = step_time_s(plan.machine, layout, schedule, costs_of("physical", chip))
    links = Links(plan.machine, layout)
    alone_s = [float(move_s(links["fsdp"], move)) for move in moves]
    assert float(took_s) == pytest.approx(sum(alone_s), rel=1e-9)


@given(plans())
@settings(max_examples=20)
def test_elasticities_are_those_of_two_predictions(plan):
    for found in sensitivity(plan)[:3]:
        figure, now = found.figure, plan.machine.chip
        name = "peak_flops.bf16" if figure == "peak_flops" else figure
        value = now.peak("bf16") if figure == "peak_flops" else getattr(now, figure)
        if figure == "peak_flops" and plan.precision.compute != "bf16":
            continue
        if not value or (figure.endswith("efficiency") and value * 1.01 > 1):
            continue
        up, down = (
            predict(with_figures(plan, {name: value * factor})).step_time_s
            for factor in (1.01, 0.99)
        )
        expected = math.log(up / down) / math.log(1.01 / 0.99)
        assert found.elasticity == pytest.approx(expected, abs=1e-6), figure


@pytest.mark.parametrize(("optimizer", "state"), [("adamw", 8), ("momentum", 4), ("sgd", 0)])
def test_the_update_reads_and_writes_what_it_changes(optimizer, state):
    # Weight and gradient in, weight out; state in and out.
    model = decoder()
    plan = build(model, "v4:1x1x1", 1, {"data": {}}, optimizer=optimizer)
    chip = plan.machine.chip
    costs = [cost for cost in predict(plan).price.computes if cost.block == "update"]
    moved = model.parameters_all * (4 + 4 + 4 + 2 * state)
    expected = moved / (chip.hbm_bytes_per_s * chip.hbm_efficiency) + chip.op_overhead_s
    assert sum(float(cost.time_s) for cost in costs) == pytest.approx(expected, rel=1e-9)
